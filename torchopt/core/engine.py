"""The engine under the three APIs: flat lists of tensors through the parts of a transformation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchopt.base import misuse, tree
from torchopt.base.distributed import any_spread, placed
from torchopt.base.numerics import HALF, to_compute_dtype
from torchopt.core import step_tags
from torchopt.core.gradient_checks import Common, check_gradients, common_of, refuse_update
from torchopt.core.packed import Packed, Packing
from torchopt.core.plan import Plan
from torchopt.core.protocols import PartLike, TransformationLike
from torchopt.core.sparse_entries import ChangedSlot
from torchopt.typing import PyTree, Step


@dataclasses.dataclass
class Call:
    """One update as an API asks for it: lists with one entry per parameter, ``None`` if absent."""

    g: list[Any]
    p: list[Any]
    t: list[Step]
    slots: dict[str, list[Any]]
    hyper: list[dict[str, Any]]
    names: Callable[[], Sequence[str]]
    reference: PyTree  # a tree with the structure of the parameters, for masks
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    pack_slots: bool = False  # whether new slots may come back as Packed
    known: Any = ()  # parameters that a mask may name besides; see resolving.match_by_name
    pairs: dict[int, Any] = dataclasses.field(default_factory=dict)  # by id: torchopt.core.whole
    labels: Any = None  # of the parameters, for a partition, where the API knows them
    packing: Packing | None = None  # where an update leaves what it found out for the next one
    overwrites: bool = False  # whether new slots may come back as ChangedSlot


@dataclasses.dataclass
class Leaves:
    """What one part of a transformation sees: the parameters that have a gradient.

    Attributes:
        g: Gradients, or what earlier parts made of them.
        p: Parameters; entries are ``None`` if the caller gave none.
        t: Step counts, 1 at the first update.
        slots: The part's buffers of each parameter, in the order of its ``slots``.
        hyper: The part's hyperparameters of each parameter.
        index: Positions among all parameters of ``call``.
        call: The whole call.
        common: What is known of ``g`` and ``p``, if they are alike.
    """

    g: list[Tensor]
    p: list[Any]
    t: list[Step]
    slots: list[tuple[Any, ...]]
    hyper: list[dict[str, Any]]
    index: list[int]
    call: Call
    common: Common | None = None

    def name(self, position: int) -> str:
        """Return the quoted name of a parameter, for error messages."""
        return tree.quoted(self.call.names()[self.index[position]])

    def with_tensors(self, g: list[Tensor], p: list[Any], common: Common | None) -> Leaves:
        """Return the leaves with other gradients and parameters."""
        # spelled out, for torch 2.6 cannot compile dataclasses.replace
        return Leaves(g, p, self.t, self.slots, self.hyper, self.index, self.call, common)

    def subset(self, positions: Sequence[int]) -> Leaves:
        """Return the leaves at some positions."""

        def at(values: Any) -> list[Any]:
            return [values[k] for k in positions] if len(values) else []

        # spelled out, for torch 2.6 cannot compile dataclasses.replace
        index = at(self.index)
        return Leaves(
            at(self.g), at(self.p), at(self.t), at(self.slots), at(self.hyper), index, self.call
        )


def initialise(tx: TransformationLike, call: Call) -> dict[str, list[Any]]:
    """Return the initial slots of every parameter of ``call``."""
    index = [i for i, p in enumerate(call.p) if p is not None]
    for i in index:
        if not isinstance(call.p[i], Tensor):
            name = tree.quoted(call.names()[i])
            raise TypeError(
                f"Parameter {name} must be a tensor or None, got {type(call.p[i]).__name__}."
                f"{misuse.advice_for_leaf(call.p[i])}"
            )
    params = [to_compute_dtype(call.p[i]) for i in index]
    columns: dict[str, list[Any]] = {name: [None] * len(call.p) for name in tx.plan.slot_names}
    rows = [call.hyper[i] for i in index]
    for position, part in enumerate(tx.plan.parts):
        leaves = Leaves(params, params, [], [], tx.plan.rows_of(position, rows), index, call)
        for i, values in zip(index, part_slots(part, leaves)):
            for name, value in zip(tx.plan.slots[position], values):
                columns[name][i] = value
    return columns


def initialise_packed(
    tx: TransformationLike, call: Call, packing: Packing | None = None
) -> dict[str, Any] | None:
    """Return the initial slots of all parameters packed; ``None`` if they have to be made singly.

    The parts must treat entries alike, whatever tensor they are in, and those that have slots must
    have the same hyperparameters for all. ``packing`` is one that fits, if there is one already.
    """
    elementwise = all(part.elementwise for part in tx.plan.parts)
    row = call.hyper[0] if call.hyper else {}
    common = common_of(call)
    if not elementwise or common is None:
        return None
    if any(other is not row for other in call.hyper):
        fields = zip(tx.plan.fields, tx.plan.slots)
        read = [name for own, slots in fields if slots for name in own.values()]
        if any(other[name] is not row[name] for other in call.hyper for name in read):
            return None
    packing = packing or Packing(common.shapes)
    flat: Tensor | None = None
    shapes = dict.fromkeys(common.shapes)
    columns: dict[str, Any] = {}
    for position, names in enumerate(tx.plan.slots):
        if not names:
            continue
        (own,) = tx.plan.rows_of(position, [row])
        for name in names:
            slot = tx.plan.slot_of[name]
            if slot.shape is not None or slot.dtype is not None:
                return None
            columns[name] = [None] * len(call.p)
            if not all(slot.needed(shape, own) for shape in shapes):
                continue
            if slot.is_number:
                dtype = torch.float32 if common.dtype in HALF else common.dtype
                start: Any = slot.start
                columns[name] = packing.filled(float(start), dtype, common.device)
                continue
            if torch.is_grad_enabled() and any(p.requires_grad for p in call.p):
                return None  # what each leads to would be joined
            if any(isinstance(value, Tensor) and value.dim() for value in own.values()):
                return None  # a start with a value for each entry of a parameter
            if flat is None:
                flat = to_compute_dtype(packing.pack(call.p))
            first = slot.first(flat, own)
            assert first is not None
            columns[name] = Packed(first, packing)
    return columns


def part_slots(part: PartLike, leaves: Leaves) -> list[tuple[Any, ...]]:
    """Return the initial slots of one part for the parameters ``leaves.p``.

    Raises:
        ValueError: If the part has no rule for one of them.
    """
    for k, p in enumerate(leaves.p) if part.is_selective else ():
        if reason := part.refuses(p):
            raise ValueError(f"{leaves.name(k)} {reason}")
    own: Any = getattr(part, "init_all_slots", None)
    if own is not None:
        return own(leaves)
    return [part.first_slots(p, **h) for p, h in zip(leaves.p, leaves.hyper)]


def advance(
    tx: TransformationLike, call: Call, apply: bool = False
) -> tuple[list[Any], dict[str, list[Any]]]:
    """Compute the updates and the new slots of one call, leaving its inputs as they are.

    With ``apply`` the new parameters are returned instead of the updates.
    """
    # whether the slots are no longer as they were given
    refreshes = bool(tx.plan.refreshing) and any(name in call.extra for name in tx.plan.reads)
    # a kernel reads half precision as it is, but no slots in a dtype of their own
    by_kernels = not refreshes and not tx.plan.narrow and accelerates(tx.plan)
    if by_kernels:
        again = accelerator.take_cached(tx.plan, call, apply)
        if again is not None:
            return again
    index = [i for i, g in enumerate(call.g) if g is not None]
    common = common_of(call) if len(index) == len(call.g) else None
    if common is None:
        check_gradients(tx, call, index)
    if not index:
        return [None] * len(call.g), dict(call.slots)
    whole = len(index) == len(call.g)
    leaves = _leaves(call, index)
    leaves.common = common
    columns: dict[str, Any] = dict(call.slots)
    if not whole:
        columns = {name: [column[i] for i in index] for name, column in columns.items()}
    first_node = step_tags.begin()
    fused = accelerator.take_whole(tx.plan, leaves, columns, apply) if by_kernels else None
    if fused is None:
        fused = _advance_by_parts(tx, leaves, columns, apply)
        if first_node >= 0:
            step_tags.end(first_node, tx.plan, leaves, call.slots, columns, fused)
    if whole:
        return fused, columns
    results: list[Any] = [None] * len(call.g)
    slots = {name: list(column) for name, column in call.slots.items()}
    for position, i in enumerate(index):
        results[i] = fused[position]
        for name, column in columns.items():
            slots[name][i] = column[position]
    return results, slots


#: The fused engine (torchopt.kernels.fused), once it is loaded; the mathematics does without.
accelerator: Any = None
#: What steps in place (torchopt.kernels.inplace.Stepper), once it is loaded.
in_place_stepper: Any = None


def accelerates(plan: Plan) -> bool:
    """Whether to ask the fused engine.

    Not while compiling, for a compiler fuses the rules itself, unless a part requires a kernel; nor
    where all parts are without kernels, unless somebody wants to be told so.
    """
    if accelerator is None:
        return False
    if torch.compiler.is_compiling():
        return any(part.use_accelerated_op for part in plan.parts)
    return not plan.never_fused or accelerator.is_asked()


def packs(plan: Plan) -> bool:
    """Whether packed slots pay: kernels compute the whole plan, and read them as they are."""
    return accelerates(plan) and not plan.narrow and accelerator.covers(plan)


def _leaves(call: Call, index: list[int]) -> Leaves:
    return Leaves(
        g=[call.g[i] for i in index],
        p=[call.p[i] for i in index],
        t=[call.t[i] for i in index],
        slots=[],
        hyper=[call.hyper[i] for i in index],
        index=index,
        call=call,
    )


def _advance_by_parts(
    tx: TransformationLike, given: Leaves, columns: dict[str, Any], apply: bool
) -> list[Tensor]:
    """Convert to the dtype of computation, run the parts one after the other, convert back."""
    is_complex = [g.is_complex() for g in given.g]
    enter = [_view_as_real if c else to_compute_dtype for c in is_complex]

    def entered(column: Any, like: Sequence[Any] | None = None) -> Any:
        if isinstance(column, Packed) and not any(is_complex):
            return column  # slots in half precision are float32 already
        found = [None if x is None else convert(x) for convert, x in zip(enter, column)]
        return found if like is None else _widened(found, like)

    g, p = entered(given.g), entered(given.p)
    same = all(x is y for x, y in zip(g, given.g))
    leaves = given.with_tensors(g, p, given.common if same else None)
    narrow = tx.plan.narrow
    own = {n: entered(c, leaves.g if n in narrow else None) for n, c in columns.items()}
    # the sum is taken in the parameters' own dtype
    applies = apply and same
    updates, applied = run(tx.plan, leaves, own, applies)
    results = []
    for position, (g, c, u) in enumerate(zip(leaves.g, is_complex, updates)):
        if not isinstance(u, Tensor) or u.shape != g.shape:
            refuse_update(tx, u, g, given.name(position))
        u = _leave(u, c, given.g[position].dtype)
        results.append(given.p[position] + u if apply and not applied else u)
    for name, column in own.items():
        if isinstance(column, Packed):
            columns[name] = column
            continue
        columns[name] = [x if type(x) is ChangedSlot else y for x, y in zip(column, columns[name])]
        for position, (c, value) in enumerate(zip(is_complex, column)):
            if value is not None and type(value) is not ChangedSlot:
                old = columns[name][position]
                if name in narrow:
                    dtype = narrow[name]
                elif old is not None:
                    dtype = old.dtype
                else:  # made in this call, in the dtype of computation unless it is no such number
                    dtype = leaves.g[position].dtype if value.is_floating_point() else value.dtype
                columns[name][position] = _leave(value, c, dtype)
    if any_spread(given.g):
        results = list(map(placed, results, given.g))
        columns.update({n: list(map(placed, columns[n], given.g)) for n in own})
    return results


def run(
    plan: Plan, leaves: Leaves, columns: dict[str, list[Any]], apply: bool = False
) -> tuple[list[Tensor], bool]:
    """Apply all parts of a plan one after the other; ``columns`` receives the new slots.

    Returns:
        The updates, and whether they have been added to the parameters, as ``apply`` allows.
    """
    if plan.refreshing and leaves.call.extra:
        _refresh(plan, leaves, columns)
    g, position = leaves.g, 0
    while position < len(plan.parts):
        # the position tells, for torch 2.6 compiles `is` between lists as a comparison of tensors
        own = leaves if position == 0 else leaves.with_tensors(g, leaves.p, None)
        fused = None
        if accelerates(plan):
            fused = accelerator.take_segment(plan, position, own, columns, apply)
        if fused is not None:
            position, g, applied = fused
            if applied:
                return g, True
        else:
            g = run_by_rules(plan, position, position + 1, own, columns)
            position += 1
    return g, False


def _refresh(plan: Plan, leaves: Leaves, columns: dict[str, list[Any]]) -> None:
    """Let parts change their slots by the extra values of a call, before the step."""
    for position in plan.refreshing:
        part, names = plan.parts[position], plan.slots[position]
        if any(name in leaves.call.extra for name in part.reads):
            slots = list(zip(*(columns[name] for name in names)))
            rows = plan.rows_of(position, leaves.hyper)
            own = Leaves(leaves.g, leaves.p, leaves.t, slots, rows, leaves.index, leaves.call)
            for name, column in zip(names, zip(*part.refreshed(own))):
                columns[name] = list(column)


def run_by_rules(
    plan: Plan, first: int, last: int, leaves: Leaves, columns: dict[str, list[Any]]
) -> list[Tensor]:
    """Apply the parts ``first`` to ``last - 1`` by their own rules."""
    g = leaves.g
    for position in range(first, last):
        names = plan.slots[position]
        slots = list(zip(*(columns[name] for name in names))) if names else [()] * len(g)
        rows = plan.rows_of(position, leaves.hyper)
        own = Leaves(g, leaves.p, leaves.t, slots, rows, leaves.index, leaves.call)
        before = g
        g, slots = plan.parts[position].step(own)
        if _may_promote(rows):
            g = [_like(u, x) for u, x in zip(g, before)]
        for name, column in zip(names, zip(*slots)):
            columns[name] = list(column)
    return g


def _may_promote(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether a hyperparameter is a tensor, whose dtype may be wider than that of a gradient."""
    # torch 2.6 cannot compile `is` between dicts: there each row is looked at
    previous, each = None, tree.compiler_is_old()
    for row in rows:
        if each or row is not previous:
            for value in row.values():
                if isinstance(value, Tensor):
                    return True
                if isinstance(value, tuple) and any(isinstance(x, Tensor) for x in value):
                    return True
            previous = row
    return False


def _like(u: Any, g: Tensor) -> Any:
    """Return an update in the dtype of its gradient, in which the next part expects it."""
    wider = isinstance(u, Tensor) and u.dtype != g.dtype and u.is_floating_point()
    return u.to(g.dtype) if wider else u


def _widened(column: Sequence[Any], like: Sequence[Any]) -> list[Any]:
    """Return slots that are kept in a dtype of their own as a rule sees them."""
    return [
        x if x is None or y is None else x.to(torch.promote_types(x.dtype, y.dtype))
        for x, y in zip(column, like)
    ]


def _view_as_real(x: Tensor) -> Tensor:
    """A complex parameter is updated as its real and imaginary parts, as torch.optim does."""
    return torch.view_as_real(x) if x.is_complex() else x


def _leave(x: Tensor, is_complex: bool, dtype: torch.dtype) -> Tensor:
    """Undo the conversions on the way in (a 0-d parameter may also have been promoted)."""
    if is_complex and not x.is_complex():
        x = torch.view_as_complex(x)
    return x if x.dtype == dtype else x.to(dtype)
