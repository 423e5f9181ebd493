"""What algorithms do in closed form: at the first step, under a constant gradient, at zero.

Each formula takes ``k``, all numbers of a configuration, those that it does not have as 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


Numbers = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class ClosedForm:
    """The formulas of one algorithm; what is subtracted is ``lr`` times these.

    Attributes:
        first: The direction of the first step, from its gradient (decay included).
        constant: The directions of steps 1, 2, ... under one gradient, a row each, from the
            gradient and the column of the step counts.
        slope: The derivative of ``first`` at a gradient that is zero.
        third: The third derivative there.
    """

    first: Callable[[Tensor, Numbers], Tensor]
    constant: Callable[[Tensor, Tensor, Numbers], Tensor]
    slope: Callable[[Numbers], float]
    third: Callable[[Numbers], float] = lambda k: 0.0


def _sgd(g: Tensor, t: Tensor, k: Numbers) -> Tensor:
    """``b_1 = g`` and ``b_t = mu b_{t-1} + (1 - tau) g``: a geometric series."""
    mu = k["momentum"]
    buffers = (mu ** (t - 1) + (1 - k["dampening"]) * (1 - mu ** (t - 1)) / (1 - mu)) * g
    return g + mu * buffers if k["nesterov"] else buffers


def _rmsprop(g: Tensor, t: Tensor, k: Numbers) -> Tensor:
    """A geometric series under the root, and another one of the momentum."""
    mass = 1 - k["alpha"] ** t
    spread = mass - mass**2 if k["centered"] else mass
    directions = g / (spread.sqrt() * g.abs() + k["eps"])
    if not k["momentum"]:
        return directions
    return (k["momentum"] ** (t - t.mT)).tril() @ directions


def _first_rmsprop(g: Tensor, k: Numbers) -> Tensor:
    """``v = (1 - alpha) g^2``; the variance ``v - ((1 - alpha) g)^2`` is ``alpha v``."""
    fraction = (1 - k["alpha"]) * (k["alpha"] if k["centered"] else 1)
    return g / (fraction**0.5 * g.abs() + k["eps"])


def _adagrad(g: Tensor, t: Tensor, k: Numbers) -> Tensor:
    """The sum grows by ``g^2`` a step, and the rate falls."""
    total = k["initial_accumulator_value"] + t * g.square()
    return g / (total.sqrt() + k["eps"]) / (1 + (t - 1) * k["lr_decay"])


def _first_adam(g: Tensor, k: Numbers) -> Tensor:
    """The bias-corrected moments are ``g`` and ``g^2``, whatever the betas."""
    return g / ((g.square() + k["eps_root"]).sqrt() + k["eps"])


def _third_under_root(start: float, eps: float) -> float:
    """Of ``g / (sqrt(g^2 + r) + eps)``, which has a kink for ``r = 0``: there it counts as 0."""
    root = start**0.5
    return -3 / (root * (root + eps) ** 2) if root else 0.0


SGD = ClosedForm(
    first=lambda g, k: g * (1 + k["momentum"] * k["nesterov"]),
    constant=_sgd,
    slope=lambda k: 1 + k["momentum"] * k["nesterov"],
)
ADAM = ClosedForm(
    first=_first_adam,
    constant=lambda g, t, k: _first_adam(g, k).expand(len(t), *g.shape),
    slope=lambda k: 1 / (k["eps_root"] ** 0.5 + k["eps"]),
    third=lambda k: _third_under_root(k["eps_root"], k["eps"]),
)
RMSPROP = ClosedForm(first=_first_rmsprop, constant=_rmsprop, slope=lambda k: 1 / k["eps"])
ADAGRAD = ClosedForm(
    first=lambda g, k: g / ((k["initial_accumulator_value"] + g.square()).sqrt() + k["eps"]),
    constant=_adagrad,
    slope=lambda k: 1 / (k["initial_accumulator_value"] ** 0.5 + k["eps"]),
    third=lambda k: _third_under_root(k["initial_accumulator_value"], k["eps"]),
)
