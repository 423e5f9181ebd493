"""The weights to evaluate with, of optimizers that train at other weights than they recommend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torchopt.core.engine import Call, Leaves


def evaluates(tx: Any) -> bool:
    """Whether the weights to evaluate with are others than those that are trained."""
    return any(part.evaluates for part in tx.plan.parts)


def converted(tx: Any, call: Call, to_eval: bool) -> list[Any]:
    """Return the parameters of a call as they are evaluated, or as they are trained again.

    Parameters that have taken no step have no slots, and are the same for both.
    """
    params = list(call.p)
    index = [i for i, p in enumerate(params) if p is not None]
    columns = call.slots
    parts = list(enumerate(tx.plan.parts))
    for position, part in parts if to_eval else reversed(parts):
        if not part.evaluates:
            continue
        names = tx.plan.slots[position]
        own = [tuple(columns[name][i] for name in names) for i in index]
        rows = tx.plan.rows_of(position, [call.hyper[i] for i in index])
        now = [params[i] for i in index]
        leaves = Leaves(now, now, [call.t[i] for i in index], own, rows, index, call)
        for i, p in zip(index, part.converted(leaves, to_eval)):
            params[i] = p
    return params


def converted_inside(
    plan: Any, leaves: Leaves, columns: Mapping[str, Sequence[Any]], to_eval: bool
) -> list[Any]:
    """Return the parameters of a part that holds others (a mask, a label), converted by those."""
    params: list[Any] = list(leaves.p)
    parts = list(enumerate(plan.parts))
    for position, part in parts if to_eval else reversed(parts):
        if part.evaluates:
            names = plan.slots[position]
            slots = list(zip(*(columns[name] for name in names))) if names else [()] * len(params)
            rows = plan.rows_of(position, leaves.hyper)
            own = Leaves(params, params, leaves.t, slots, rows, leaves.index, leaves.call)
            params = part.converted(own, to_eval)
    return params
