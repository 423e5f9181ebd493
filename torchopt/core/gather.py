"""Gather one update: whichever API asks, parameters in lists become one :class:`Call`.

And make the first slots.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchopt.base import misuse
from torchopt.base.numerics import HALF, to_compute_dtype
from torchopt.core.engine import Call, Leaves, common_of
from torchopt.core.packed import Packed, Packing
from torchopt.core.protocols import PartLike, TransformationLike
from torchopt.core.resolving import Known, resolve
from torchopt.typing import Step


@dataclasses.dataclass
class Members:
    """Parameters with hyperparameters in common: a tree, a parameter group, a network.

    Attributes:
        values: The hyperparameters as they were given, by name.
        leaves: The parameters.
        names: A function that returns their names.
        count: How often they have been updated, for schedules.
        known: What a dict of hyperparameters may name besides; see ``resolving.match_by_name``.
        row: The hyperparameters of each parameter, if they are known to be the same for all.
    """

    values: Mapping[str, Any]
    leaves: Sequence[Any]
    names: Callable[[], Sequence[str]]
    count: Step = 0
    known: Sequence[str] | Callable[[], Known] = ()
    row: dict[str, Any] | None = None


def gather(
    tx: TransformationLike,
    members: Sequence[Members],
    call: Call,
    counters: Mapping[str, Sequence[Any]],
    *,
    order: Sequence[int] | None = None,
    fresh: Sequence[bool] = (),
    uniform: bool = False,
) -> Call:
    """Complete a call: the hyperparameters and counters of this update, and slots that are new.

    Args:
        tx: The transformation.
        members: All parameters, those with hyperparameters in common together.
        call: The rest; its slots are those that there are.
        counters: The counters before this update, by name, of each parameter.
        order: Where the parameters of the call stand among the members, if elsewhere.
        fresh: Which parameters get new slots.
        uniform: Whether all parameters have the same counters and have taken as many steps.
    """
    plan = tx.plan
    rows: list[dict[str, Any]] = []
    for one in members:
        if one.row is not None:
            rows += [one.row] * len(one.leaves)
            continue
        rows += resolve(one.values, plan.hyper_specs, one.leaves, one.names, one.count, one.known)
    if order is not None:
        rows = [rows[k] for k in order]
    call.hyper = plan.counted_rows(rows, call.t, counters, uniform) if plan.counters else rows
    if True in fresh:
        _fill_slots(tx, call, fresh)
    return call


def _fill_slots(tx: TransformationLike, call: Call, fresh: Sequence[bool]) -> None:
    """Give the parameters that have taken no step their first slots."""
    if call.pack_slots and all(fresh):
        packed = initialise_packed(tx, call, call.packing)
        if packed is not None:
            call.slots = packed
            return
    given = call.p
    # not dataclasses.replace, which torch 2.6 cannot compile
    call.p = [p if f else None for p, f in zip(given, fresh)]
    initial = initialise(tx, call)
    call.p = given
    for name, column in initial.items():
        old: Any = call.slots.get(name)
        if isinstance(old, Packed) or old is None:
            old = list(old or column)
        call.slots[name] = [x if f else y for f, x, y in zip(fresh, column, old)]


def initialise(tx: TransformationLike, call: Call) -> dict[str, list[Any]]:
    """Return the initial slots of every parameter of ``call``."""
    index = [i for i, p in enumerate(call.p) if p is not None]
    for i in index:
        if not isinstance(call.p[i], Tensor):
            path = call.names()[i]
            what = f"parameter {path!r} to be a tensor or None" if path else "a tree of tensors"
            raise TypeError(
                f"init expects {what}, got {misuse.given(call.p[i])}."
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
