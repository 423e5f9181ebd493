"""The weights to evaluate with, of optimizers that train at other weights than they recommend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torchopt.core.engine import Call, Leaves
from torchopt.core.plan import Plan
from torchopt.core.protocols import TransformationLike


def evaluates(tx: TransformationLike) -> bool:
    """Whether the weights to evaluate with are others than those that are trained."""
    return any(part.evaluates for part in tx.plan.parts)


def converted_call(tx: TransformationLike, call: Call, to_eval: bool) -> list[Any]:
    """Return the parameters of a call as they are evaluated, or as they are trained again.

    Parameters that have taken no step have no slots, and are the same for both.
    """
    params = list(call.p)
    index = [i for i, p in enumerate(params) if p is not None]
    p, t = [params[i] for i in index], [call.t[i] for i in index]
    rows = [call.hyper[i] for i in index]
    columns = {name: [column[i] for i in index] for name, column in call.slots.items()}
    leaves = Leaves(p, p, t, [()] * len(index), rows, index, call)
    for i, found in zip(index, converted(tx.plan, leaves, columns, to_eval)):
        params[i] = found
    return params


def converted(
    plan: Plan, leaves: Leaves, columns: Mapping[str, Sequence[Any]], to_eval: bool
) -> list[Any]:
    """Return parameters converted by the parts of a plan, the last first on the way back.

    Args:
        plan: Whose parts; those of a transformation inside a mask or label as well.
        leaves: The parameters with the hyperparameters that the plan names.
        columns: The slots by the names of the plan.
        to_eval: Whether to the weights to evaluate with, or back to those that are trained.
    """
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
