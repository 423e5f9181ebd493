"""The engine under the three faces: flat lists of tensors through the parts of a transformation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Union

import torch
from torch import Tensor

from torchopt import tree
from torchopt.numerics import exact
from torchopt.packed import Packed, Packing
from torchopt.typing import PyTree, Step


HALF = (torch.float16, torch.bfloat16)


@dataclasses.dataclass
class Call:
    """One update as a face asks for it: lists with one entry per parameter, ``None`` if absent."""

    g: list[Any]
    p: list[Any]
    t: list[Step]
    slots: dict[str, list[Any]]
    hyper: list[dict[str, Any]]
    names: Callable[[], Sequence[str]]
    reference: PyTree  # a tree with the structure of the parameters, for masks
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    pack_slots: bool = False  # whether new slots may come back as Packed


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

    def subset(self, positions: Sequence[int]) -> Leaves:
        """Return the leaves at some positions."""
        picked = {
            field: [values[k] for k in positions] if len(values := getattr(self, field)) else []
            for field in ("g", "p", "t", "slots", "hyper", "index")
        }
        return dataclasses.replace(self, common=None, **picked)


class Plan:
    """Where each part of a transformation finds its hyperparameters and slots by public name."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = tuple(parts)
        self.hyper_specs: dict[str, Any] = {}
        self.values: dict[str, Any] = {}
        self.slot_names: tuple[str, ...] = ()
        self.optional_slots: set[str] = set()
        self.fields: list[dict[str, str]] = []
        self.slots: list[tuple[str, ...]] = []
        for part in self.parts:
            specs = part.hyper_specs()
            fields = {name: _free_name(name, self.hyper_specs) for name in specs}
            self.hyper_specs.update({fields[name]: spec for name, spec in specs.items()})
            names = tuple(_free_name(name, self.slot_names) for name in part.slot_names())
            self.fields.append(fields)
            self.slots.append(names)
            self.slot_names += names
            values = part.hyperparameters()
            self.values.update({fields[name]: values[name] for name in specs})
            own = part.slot_names()
            self.optional_slots |= {n for n, slot in zip(names, own) if slot in part.optional_slots}

    def check_slots(self, given: Iterable[str], owner: object) -> None:
        """Refuse a state that another transformation has made.

        Raises:
            ValueError: Naming the slots that are unknown or missing.
        """
        names = set(given)
        unknown = sorted(names - set(self.slot_names))
        missing = [n for n in self.slot_names if n not in names and n not in self.optional_slots]
        if unknown or missing:
            what = f"has {unknown}" if unknown else f"lacks {missing}"
            raise ValueError(
                f"The state belongs to another optimizer: it {what}, while {owner} keeps "
                f"{list(self.slot_names)}."
            )

    def rows_of(self, position: int, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Pick a part's own hyperparameters; rows that are one object stay one object."""
        fields = self.fields[position]
        previous: dict[str, Any] | None = None
        picked: dict[str, Any] = {}
        result = []
        for row in rows:
            if row is not previous:
                picked = {name: row[public] for name, public in fields.items()}
                previous = row
            result.append(picked)
        return result


def _free_name(name: str, taken: Any) -> str:
    candidate, occurrence = name, 1
    while candidate in taken:
        occurrence += 1
        candidate = f"{name}_{occurrence}"
    return candidate


def step_list(old: Union[Step, list[Any]], count: int) -> list[Step]:
    """Return the step count of every parameter at this update."""
    if isinstance(old, list):
        return [step + 1 for step in old]
    step = exact(old) + 1 if isinstance(old, Tensor) else old + 1
    return [step] * count


def next_step(old: Union[Step, list[Any]], grads: Sequence[Any]) -> Union[Step, list[Any]]:
    """Return the step counts to remember: one number while all parameters agree."""
    if isinstance(old, Tensor):
        return old + 1
    previous = old if isinstance(old, list) else [old] * len(grads)
    steps = [step if g is None else step + 1 for step, g in zip(previous, grads)]
    if not steps:
        return old + 1 if isinstance(old, int) else old
    return steps[0] if all(step == steps[0] for step in steps) else steps


def initialise(tx: Any, call: Call) -> dict[str, list[Any]]:
    """Return the initial slots of every parameter of ``call``."""
    index = [i for i, p in enumerate(call.p) if p is not None]
    for i in index:
        if not isinstance(call.p[i], Tensor):
            name = tree.quoted(call.names()[i])
            raise TypeError(
                f"Parameter {name} must be a tensor or None, got {type(call.p[i]).__name__}."
            )
    params = [_to_compute_dtype(call.p[i].detach()) for i in index]
    columns: dict[str, list[Any]] = {name: [None] * len(call.p) for name in tx.slot_names()}
    rows = [call.hyper[i] for i in index]
    for position, part in enumerate(tx.plan.parts):
        if not tx.plan.slots[position] and not hasattr(part, "init_all_slots"):
            continue
        leaves = Leaves(params, params, [], [], tx.plan.rows_of(position, rows), index, call)
        for i, values in zip(index, part_slots(part, leaves)):
            for name, value in zip(tx.plan.slots[position], values):
                columns[name][i] = value
    return columns


def initialise_packed(tx: Any, call: Call) -> dict[str, Any] | None:
    """Return the initial slots of all parameters packed; ``None`` if they have to be made singly.

    The parts must treat entries alike, whatever tensor they are in, and have one row of
    hyperparameters for all.
    """
    elementwise = all(getattr(part, "elementwise", False) for part in tx.plan.parts)
    row = call.hyper[0] if call.hyper else {}
    common = _common(call)
    if not elementwise or common is None or any(other is not row for other in call.hyper):
        return None
    packing = Packing(common.shapes)
    flat = _to_compute_dtype(packing.pack([p.detach() for p in call.p]))
    columns: dict[str, Any] = {}
    for position, part in enumerate(tx.plan.parts):
        if tx.plan.slots[position]:
            (own,) = tx.plan.rows_of(position, [row])
            for name, value in zip(tx.plan.slots[position], part.init_slots(flat, **own)):
                columns[name] = [None] * len(call.p) if value is None else Packed(value, packing)
    return columns


def part_slots(part: Any, leaves: Leaves) -> list[tuple[Any, ...]]:
    """Return the initial slots of one part for the parameters ``leaves.p``."""
    if hasattr(part, "init_all_slots"):
        return part.init_all_slots(leaves)
    return [part.init_slots(p, **h) for p, h in zip(leaves.p, leaves.hyper)]


def advance(tx: Any, call: Call, apply: bool = False) -> tuple[list[Any], dict[str, list[Any]]]:
    """Compute the updates and the new slots of one call, leaving its inputs as they are.

    With ``apply`` the new parameters are returned instead of the updates.
    """
    index = [i for i, g in enumerate(call.g) if g is not None]
    common = _common(call) if len(index) == len(call.g) else None
    if common is None:
        _check_gradients(tx, call, index)
    if not index:
        return [None] * len(call.g), dict(call.slots)
    whole = len(index) == len(call.g)
    leaves = _leaves(call, index)
    leaves.common = common
    columns: dict[str, Any] = dict(call.slots)
    if not whole:
        columns = {name: [column[i] for i in index] for name, column in columns.items()}
    # a kernel reads half precision as it is
    fused = (
        accelerator.take_whole(tx.plan, leaves, columns, apply) if accelerates(tx.plan) else None
    )
    if fused is None:
        fused = _advance_by_parts(tx, leaves, columns, apply)
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
    """Whether to ask the fused engine: not while compiling, for a compiler fuses the rules itself.

    Raises:
        RuntimeError: If a part requires a kernel while compiling.
    """
    if not torch.compiler.is_compiling():
        return accelerator is not None
    for part in plan.parts:
        if part.use_accelerated_op:
            raise RuntimeError(
                "use_accelerated_op=True requires a fused kernel, but torch.compile is at work, "
                "which fuses the rules itself. Pass None to use kernels where they are available."
            )
    return False


def packs(plan: Plan) -> bool:
    """Whether packed slots pay: kernels compute the whole plan, and read them as they are."""
    return accelerates(plan) and accelerator.covers(plan)


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


def _advance_by_parts(tx: Any, given: Leaves, columns: dict[str, Any], apply: bool) -> list[Tensor]:
    """Convert to the dtype of computation, run the parts one after the other, convert back."""
    is_complex = [g.is_complex() for g in given.g]
    enter = [_view_as_real if c else _to_compute_dtype for c in is_complex]

    def entered(column: Any) -> Any:
        if isinstance(column, Packed) and not any(is_complex):
            return column  # slots in half precision are float32 already
        return [None if x is None else convert(x) for convert, x in zip(enter, column)]

    leaves = dataclasses.replace(given, g=entered(given.g), p=entered(given.p))
    if any(x is not y for x, y in zip(leaves.g, given.g)):
        leaves.common = None
    own = {name: entered(column) for name, column in columns.items()}
    # the sum is taken in the parameters' own dtype
    applies = apply and all(x is y for x, y in zip(leaves.g, given.g))
    updates, applied = run(tx.plan, leaves, own, applies)
    results = []
    for position, (g, c, u) in enumerate(zip(leaves.g, is_complex, updates)):
        if not isinstance(u, Tensor) or u.shape != g.shape:
            _refuse_update(tx, u, g, given.name(position))
        u = _leave(u, c, given.g[position].dtype)
        results.append(given.p[position] + u if apply and not applied else u)
    for name, column in own.items():
        if isinstance(column, Packed):
            columns[name] = column
            continue
        columns[name] = list(columns[name])
        for position, (c, value) in enumerate(zip(is_complex, column)):
            if value is not None:
                old = columns[name][position]
                columns[name][position] = _leave(
                    value, c, value.dtype if old is None else old.dtype
                )
    return results


def run(
    plan: Plan, leaves: Leaves, columns: dict[str, list[Any]], apply: bool = False
) -> tuple[list[Tensor], bool]:
    """Apply all parts of a plan one after the other; ``columns`` receives the new slots.

    Returns:
        The updates, and whether they have been added to the parameters, as ``apply`` allows.
    """
    g, position = leaves.g, 0
    while position < len(plan.parts):
        own = leaves if g is leaves.g else dataclasses.replace(leaves, g=g, common=None)
        fused = None
        if accelerates(plan):
            fused = accelerator.take_run(plan, position, own, columns, apply)
        if fused is not None:
            position, g, applied = fused
            if applied:
                return g, True
        else:
            g = run_by_rules(plan, position, position + 1, own, columns)
            position += 1
    return g, False


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
        g, slots = plan.parts[position].step(own)
        for name, column in zip(names, zip(*slots)):
            columns[name] = list(column)
    return g


def _to_compute_dtype(x: Tensor) -> Tensor:
    """Half precision is computed, and its slots are kept, in float32.

    In float16 the default eps and small squared gradients are zero, and in bfloat16 a beta of
    0.999 is 1, so rules evaluated in these dtypes give infinite or frozen updates.
    """
    return x.float() if x.dtype in HALF else x


def _view_as_real(x: Tensor) -> Tensor:
    """A complex parameter is updated as its real and imaginary parts, as torch.optim does."""
    return torch.view_as_real(x) if x.is_complex() else x


def _leave(x: Tensor, is_complex: bool, dtype: torch.dtype) -> Tensor:
    """Undo the conversions on the way in (a 0-d parameter may also have been promoted)."""
    if is_complex and not x.is_complex():
        x = torch.view_as_complex(x)
    return x if x.dtype == dtype else x.to(dtype)


def _refuse_update(tx: Any, update: Any, g: Tensor, name: str) -> None:
    given = f"shape {tuple(update.shape)}" if isinstance(update, Tensor) else repr(update)
    raise ValueError(
        f"{tx!r} returned an update of {given} for the gradient of {name}, whose shape is "
        f"{tuple(g.shape)}. A rule must return a tensor of the shape of its gradient."
    )


def _common(call: Call) -> Common | None:
    """Return what gradients and parameters have in common, or ``None`` if they need a closer look.

    In the first case everything that :func:`_check_gradients` asks for holds.
    """
    g, p = call.g, call.p
    if not g or any(x is None for x in p):
        return None
    types = {*map(type, g), *map(type, p)}
    if not all(issubclass(t, Tensor) for t in types):
        return None
    shapes = [x.shape for x in g]
    dtypes = {x.dtype for x in g} | {x.dtype for x in p}
    devices = {x.device for x in g} | {x.device for x in p}
    if (
        len(dtypes) > 1
        or len(devices) > 1
        or not g[0].is_floating_point()
        or {x.layout for x in g} | {x.layout for x in p} != {torch.strided}
        or [x.shape for x in p] != shapes
    ):
        return None
    return Common(types, shapes, g[0].dtype, g[0].device)


def _check_gradients(tx: Any, call: Call, index: Sequence[int]) -> None:
    for i in index:
        g, p = call.g[i], call.p[i]
        if not isinstance(g, Tensor):
            name = tree.quoted(call.names()[i])
            raise TypeError(
                f"The gradient of {name} must be a tensor or None, got {type(g).__name__}."
            )
        if g.layout != torch.strided:
            _check_sparse(tx, call, i)
        elif not (g.is_floating_point() or g.is_complex()):
            name = tree.quoted(call.names()[i])
            raise TypeError(
                f"The gradient of {name} must be floating-point or complex, got {g.dtype}."
            )
        if p is None and any(x is not None for x in call.p):
            name = tree.quoted(call.names()[i])
            raise ValueError(f"{name} has a gradient but its parameter is None.")
        if p is not None:
            _check_same("parameter", g, p, call, i)
            continue
        for column in call.slots.values():
            if column[i] is not None:
                _check_same("state", g, column[i], call, i)
                break


def _check_sparse(tx: Any, call: Call, i: int) -> None:
    for position, part in enumerate(tx.plan.parts):
        (row,) = tx.plan.rows_of(position, [call.hyper[i]])
        if not part.takes_sparse(**row):
            raise TypeError(
                f"The gradient of {tree.quoted(call.names()[i])} is sparse ({call.g[i].layout}), "
                f"and {type(part).__name__} has no sparse rule. Use to_dense(), or an embedding "
                "with sparse=False."
            )


def _check_same(what: str, g: Tensor, p: Tensor, call: Call, i: int) -> None:
    if what == "state":
        same_dtype = g.dtype == p.dtype or g.dtype in HALF
    else:
        same_dtype = g.dtype == p.dtype
    if g.shape == p.shape and same_dtype and g.device == p.device:
        return
    message = (
        f"The gradient of {tree.quoted(call.names()[i])} does not fit its {what}: gradient "
        f"{g.dtype} {tuple(g.shape)} on {g.device}, {what} {p.dtype} {tuple(p.shape)} on "
        f"{p.device}."
    )
    raise (ValueError if same_dtype else TypeError)(message)
