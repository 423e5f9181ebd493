"""The engine under the three APIs: flat lists of tensors through the parts of a transformation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from torchopt.base import tree
from torchopt.base.distributed import any_spread, placed
from torchopt.base.numerics import HALF
from torchopt.core import step_tags
from torchopt.core.gradient_checks import check_gradients, refuse_update
from torchopt.core.packed import Packed, Packing
from torchopt.core.plan import Plan
from torchopt.core.protocols import TransformationLike
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


@dataclasses.dataclass(frozen=True)
class Common:
    """What all gradients and parameters of a call have in common: the usual case."""

    types: set[type]
    shapes: list[torch.Size]
    dtype: torch.dtype
    device: torch.device


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


def common_of(call: Call) -> Common | None:
    """Return what gradients and parameters have in common, or ``None`` if they need a closer look.

    In the first case everything that :func:`check_gradients` asks for holds.
    """
    g, p = call.g, call.p
    if not g or any(x is None for x in p):
        return None
    both = [*g, *p]
    types = {type(x) for x in both}
    if not all(issubclass(t, Tensor) for t in types):
        return None
    shapes = [x.shape for x in g]
    if (
        len({x.dtype for x in both}) > 1
        or len({x.device for x in both}) > 1
        or not g[0].is_floating_point()
        or {x.layout for x in both} != {torch.strided}
        or [x.shape for x in p] != shapes
    ):
        return None
    return Common(types, shapes, g[0].dtype, g[0].device)


def advance(
    tx: TransformationLike, call: Call, apply: bool = False
) -> tuple[list[Any], dict[str, list[Any]]]:
    """Compute the updates and the new slots of one call, leaving its inputs as they are.

    With ``apply`` the new parameters are returned instead of the updates.
    """
    plan = tx.plan
    # whether the slots are no longer as they were given
    refreshes = bool(plan.refreshing) and any(name in call.extra for name in plan.reads)
    # a kernel reads half precision as it is, but no slots in a dtype of their own
    by_kernels = not refreshes and not plan.narrow and accelerates(plan)
    if by_kernels:
        again = accelerator.take_cached(plan, call, apply)
        if again is not None:
            return again
    index = [i for i, g in enumerate(call.g) if g is not None]
    common = common_of(call) if len(index) == len(call.g) else None
    if common is None:
        check_gradients(tx, call, index)
    if not index:
        return [None] * len(call.g), dict(call.slots)
    whole = len(index) == len(call.g)
    g, p = [call.g[i] for i in index], [call.p[i] for i in index]
    t, rows = [call.t[i] for i in index], [call.hyper[i] for i in index]
    leaves = Leaves(g, p, t, [], rows, index, call, common)
    columns: dict[str, Any] = dict(call.slots)
    if not whole:
        columns = {name: [column[i] for i in index] for name, column in columns.items()}
    first_node = step_tags.begin()
    fused = accelerator.take_whole(plan, leaves, columns, apply) if by_kernels else None
    if fused is None:
        fused = _advance_by_parts(tx, leaves, columns, apply)
        if first_node >= 0:
            step_tags.end(first_node, plan, leaves, call.slots, columns, fused)
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
#: Where to tell why updates are not fused, while somebody asks (``torchopt.kernels.why``).
asked: ContextVar[list[str] | None] = ContextVar("asked", default=None)
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
    return not plan.never_fused or asked.get() is not None


def packs(plan: Plan) -> bool:
    """Whether packed slots pay: kernels compute the whole plan, and read them as they are."""
    return accelerates(plan) and not plan.narrow and accelerator.covers(plan)


def _advance_by_parts(
    tx: TransformationLike, given: Leaves, columns: dict[str, Any], apply: bool
) -> list[Tensor]:
    """Convert to the dtype of computation, run the parts one after the other, convert back."""
    is_complex = [g.is_complex() for g in given.g]
    g, p = _entered(given.g, is_complex), _entered(given.p, is_complex)
    same = all(x is y for x, y in zip(g, given.g))
    leaves = given if same else given.with_tensors(g, p, None)
    narrow = tx.plan.narrow
    own: dict[str, Any] = {name: _entered(c, is_complex) for name, c in columns.items()}
    for name in narrow:
        own[name] = _widened(own[name], leaves.g)
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


def _entered(column: Any, is_complex: Sequence[bool]) -> Any:
    """Return tensors in the dtype of computation: half precision in float32, as its slots are.

    A complex parameter is updated as its real and imaginary parts, as ``torch.optim`` does.
    """
    if isinstance(column, Packed) and not any(is_complex):
        return column  # slots in half precision are float32 already
    found = []
    for x, c in zip(column, is_complex):
        if x is not None and c:
            x = torch.view_as_real(x) if x.is_complex() else x
        elif x is not None and x.dtype in HALF:
            x = x.float()
        found.append(x)
    return found


def run(
    plan: Plan, leaves: Leaves, columns: dict[str, list[Any]], apply: bool = False
) -> tuple[list[Tensor], bool]:
    """Apply all parts of a plan one after the other; ``columns`` receives the new slots.

    Returns:
        The updates, and whether they have been added to the parameters, as ``apply`` allows.
    """
    if plan.refreshing and leaves.call.extra:
        _refresh(plan, leaves, columns)
    if not accelerates(plan):
        return run_by_rules(plan, 0, len(plan.parts), leaves, columns), False
    g, position = leaves.g, 0
    while position < len(plan.parts):
        # the position tells, for torch 2.6 compiles `is` between lists as a comparison of tensors
        own = leaves if position == 0 else leaves.with_tensors(g, leaves.p, None)
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
        updates, slots = plan.parts[position].step(own)
        # by a tensor as hyperparameter it may be wider; the next part expects the gradient's dtype
        g = [
            u.to(x.dtype)
            if isinstance(u, Tensor) and u.dtype != x.dtype and u.is_floating_point()
            else u
            for u, x in zip(updates, g)
        ]
        for name, column in zip(names, zip(*slots)):
            columns[name] = list(column)
    return g


def _widened(column: Sequence[Any], like: Sequence[Any]) -> list[Any]:
    """Return slots that are kept in a dtype of their own as a rule sees them."""
    return [
        x if x is None or y is None else x.to(torch.promote_types(x.dtype, y.dtype))
        for x, y in zip(column, like)
    ]


def _leave(x: Tensor, is_complex: bool, dtype: torch.dtype) -> Tensor:
    """Undo the conversions on the way in (a 0-d parameter may also have been promoted)."""
    if is_complex and not x.is_complex():
        x = torch.view_as_complex(x)
    return x if x.dtype == dtype else x.to(dtype)
