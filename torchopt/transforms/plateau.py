"""Smaller steps when the loss stops getting better."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from torchopt.base.numerics import exact
from torchopt.core.engine import Call, Leaves
from torchopt.core.hyper import choice, hyper
from torchopt.core.slots import Slot
from torchopt.core.transform import GradientTransformation, transformation
from torchopt.transforms.clip import all_zero
from torchopt.typing import Hyperparameter


@transformation
class ReduceOnPlateau(GradientTransformation):
    """Multiply by a scale that falls on plateaus; see :func:`reduce_on_plateau`."""

    factor: Hyperparameter = hyper(0.1, gt=0, lt=1, scalar=True)
    patience: int = hyper(10, ge=1, integer=True)
    rtol: Hyperparameter = hyper(1e-4, ge=0, le=1, scalar=True)
    atol: Hyperparameter = hyper(0.0, ge=0, scalar=True)
    cooldown: int = hyper(0, ge=0, integer=True)
    accumulation_size: int = hyper(1, ge=1, integer=True)
    min_scale: Hyperparameter = hyper(0.0, ge=0, le=1, scalar=True)
    mode: str = choice("min", among=("min", "max"))

    slots = (Slot("plateau", when=lambda shape, **_: False),)  # one for all parameters
    reads = ("value",)

    def whole_slots(self) -> dict[str, tuple[Any, tuple[Any, ...]]]:
        """Return that ``"plateau"`` is of all parameters together."""
        return {"plateau": (self, ())}

    def renewed(self) -> GradientTransformation:
        """Return the same with a state of its own."""
        return dataclasses.replace(self)

    def first_state(self, call: Call, chosen: frozenset[int] | None) -> dict[str, Tensor]:
        """Return the state before the first value."""
        tensors = [x for x in (*call.p, *call.g) if isinstance(x, Tensor)]
        device = tensors[0].device if tensors else torch.device("cpu")
        none = torch.zeros((), dtype=torch.int64, device=device)
        number = exact(none)
        return {
            "scale": number + 1.0,
            "best_value": number + math.inf,
            "plateau_count": none,
            "cooldown_count": none.clone(),
            "count": none.clone(),
            "avg_value": number,
        }

    def step(self, leaves: Leaves) -> tuple[list[Tensor], list[tuple[Tensor | None, ...]]]:
        """Take the value of the loss in, and multiply all gradients by the scale that is now."""
        own = leaves.call.pairs[id(self)]
        row, given = _common_row(leaves.hyper), leaves.call.extra.get("value")
        if given is not None or not all_zero(leaves.g):
            value = _value(given, own.value["avg_value"])
            own.value = _after(own.value, -value if row["mode"] == "max" else value, **row)
        scale = own.value["scale"]
        return [g * scale.to(device=g.device, dtype=g.dtype) for g in leaves.g], leaves.slots


def _common_row(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the hyperparameters of all parameters.

    Raises:
        ValueError: If they differ.
    """
    first = rows[0]
    for row in rows:
        for name in first if row is not first else ():
            x, y = row[name], first[name]
            if x is not y and (isinstance(x, Tensor) or isinstance(y, Tensor) or x != y):
                raise ValueError(
                    f"{name} of reduce_on_plateau is of all parameters together, but some have "
                    f"{y!r} and others {x!r}: a plateau is seen in the one loss. For groups with "
                    "plateaus of their own take torchopt.partition."
                )
    return first


def _value(value: Any, like: Tensor) -> Tensor:
    """Return the value of the loss as a number without history."""
    if not isinstance(value, (int, float, Tensor)) or (
        isinstance(value, Tensor) and value.numel() != 1
    ):
        given = "none" if value is None else f"{value!r:.60}"
        raise ValueError(
            f"reduce_on_plateau needs the value of the loss, a single number, got {given}. Write "
            "tx.update(grads, state, params, value=loss), optimizer.step(closure) with a closure "
            "that returns the loss, or inner.step(grads=..., value=loss)."
        )
    if isinstance(value, Tensor):
        return value.detach().reshape(()).to(like)
    return torch.full_like(like, value)


def _after(
    state: dict[str, Tensor],
    value: Tensor,
    *,
    factor: Any,
    patience: int,
    rtol: Any,
    atol: Any,
    cooldown: int,
    accumulation_size: int,
    min_scale: Any,
    mode: str,
) -> dict[str, Tensor]:
    """Return the state after another value; lower is better."""
    scale, best = state["scale"], state["best_value"]
    plateau, cooling, count = state["plateau_count"], state["cooldown_count"], state["count"]
    average = (count * state["avg_value"] + value) / (count + 1)
    count = count + 1
    finite = torch.where(best.isinf(), 0.0, best)
    better = average < torch.where(best.isinf(), best, best - rtol * finite.abs() - atol)
    waited = torch.where(better, 0, plateau + 1)
    falls = (cooling == 0) & (waited >= patience)
    reduced = scale * factor
    reduced = torch.where(reduced < min_scale, torch.zeros_like(reduced) + min_scale, reduced)
    new = {
        "scale": torch.where(falls, reduced, scale),
        "best_value": torch.where(better, average, best),
        "plateau_count": torch.where((cooling > 0) | falls, 0, waited),
        "cooldown_count": torch.where(falls, cooldown, (cooling - 1).clamp(min=0)),
        "count": torch.zeros_like(count),
        "avg_value": torch.zeros_like(average),
    }
    if accumulation_size == 1:
        return new
    between = {**state, "count": count, "avg_value": average}
    whole = count >= accumulation_size
    return {name: torch.where(whole, new[name], old) for name, old in between.items()}


def reduce_on_plateau(
    factor: Hyperparameter = 0.1,
    patience: int = 10,
    rtol: Hyperparameter = 1e-4,
    atol: Hyperparameter = 0.0,
    cooldown: int = 0,
    accumulation_size: int = 1,
    min_scale: Hyperparameter = 0.0,
    mode: str = "min",
) -> GradientTransformation:
    r"""Multiply updates by a scale that falls when the loss stops improving.

    The scale :math:`s` begins at 1. A value :math:`f` is better than the best one :math:`b` if

    .. math::
        f < b - r\,|b| - a

    After ``patience`` values in a row that are not better, :math:`s \leftarrow \max(s \phi,
    s_{\min})`, starting with this update, and the count starts over. It comes after the optimizer:
    ``chain(adam(1e-3), reduce_on_plateau())``.

    The value comes with each update: ``update(grads, state, params, value=loss)``; in the
    object-oriented API from the closure of ``step(closure)``; in the differentiable one it is the
    loss of ``step(loss)``. (For values that come more seldom, one for an epoch, there is
    ``torch.optim.lr_scheduler.ReduceLROnPlateau``, which drives any :class:`torchopt.Optimizer`.)
    No schedule can do this: those are functions of the step alone.

    Args:
        factor: :math:`\phi`, in (0, 1).
        patience: How many values that are no better are waited for, >= 1. In torch's scheduler
            one more falls first: its ``patience`` is one less.
        rtol: :math:`r`, in [0, 1]. Optax takes :math:`b` instead of :math:`|b|`, so that a
            negative loss that stays as it is counts as better.
        atol: :math:`a \ge 0`.
        cooldown: How many values after a fall are not waited on.
        accumulation_size: Means of so many values are compared, for losses of small batches.
        min_scale: :math:`s_{\min}`, in [0, 1].
        mode: ``"max"`` for values that are to rise.

    State: ``plateau``, a dict for all parameters together: ``scale``, ``best_value``,
    ``plateau_count``, ``cooldown_count``, ``count`` and ``avg_value`` as 0-d tensors, which
    :func:`torchopt.tree_get` finds by name. A value that is ``nan`` is no better.

    Differentiable in gradients, ``factor`` and ``min_scale``. When the scale falls is no
    differentiable function of the values and tolerances: nothing flows through them.

    Raises:
        ValueError: If a number is out of bounds, no value is given, or a number is not the same for
            all parameters.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.chain(
        ...     torchopt.sgd(lr=1.0), torchopt.reduce_on_plateau(factor=0.5, patience=2)
        ... )
        >>> params = [torch.zeros(1)]
        >>> state = tx.init(params)
        >>> for loss in (3.0, 2.0, 2.0, 2.0, 2.0):
        ...     updates, state = tx.update([torch.ones(1)], state, params, value=loss)
        ...     print(loss, updates[0].item())
        3.0 -1.0
        2.0 -1.0
        2.0 -1.0
        2.0 -0.5
        2.0 -0.5
        >>> torchopt.tree_get(state, "scale")
        tensor(0.5000, dtype=torch.float64)
    """
    return ReduceOnPlateau(
        factor, patience, rtol, atol, cooldown, accumulation_size, min_scale, mode
    )
