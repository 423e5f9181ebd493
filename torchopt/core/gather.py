"""Gather one update: whichever API asks, parameters in lists become one :class:`Call`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torchopt.core.engine import Call, initialise, initialise_packed
from torchopt.core.packed import Packed
from torchopt.core.protocols import TransformationLike
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
    new = [p if f else None for p, f in zip(call.p, fresh)]
    initial = initialise(tx, dataclasses.replace(call, p=new))
    for name, column in initial.items():
        old: Any = call.slots.get(name)
        if isinstance(old, Packed) or old is None:
            old = list(old or column)
        call.slots[name] = [x if f else y for f, x, y in zip(fresh, column, old)]
