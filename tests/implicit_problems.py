"""Conditions without any symmetry, their solvers, and the derivatives of their solutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


torch.manual_seed(3)
_A = torch.randn(4, 4, dtype=torch.float64) * 0.4
#: Far from symmetric, so that a product with the matrix in the place of its transpose shows.
assert (_A - _A.T).norm() > 1.0


def condition(x: dict[str, Tensor], theta: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a vector and a number, in a vector and a number."""
    joined = torch.cat([x["w"], x["b"].reshape(1)])
    right = torch.cat([theta["u"].sin(), theta["v"].exp().reshape(1)])
    value = joined + 0.4 * torch.tanh(_A @ joined * (1 + theta["v"])) - right
    return {"w": value[:3], "b": value[3]}


def joined(x: dict[str, Tensor]) -> Tensor:
    return torch.cat([x["w"], x["b"].reshape(1)])


def newton(
    x: dict[str, Tensor], theta: dict[str, Tensor], function: Callable[..., Any] = condition
) -> dict[str, Tensor]:
    """Newton's method with a loop that ends by a condition, in which no derivative is recorded."""

    def flat(z: Tensor) -> Tensor:
        return joined(function({"w": z[:3], "b": z[3]}, theta))

    z = joined(x)
    for _ in range(50):
        value = flat(z)
        if value.abs().max() < 1e-14:
            break
        z = z - torch.linalg.solve(torch.func.jacrev(flat)(z), value)
    return {"w": z[:3], "b": z[3]}


def start() -> dict[str, Tensor]:
    return {"w": torch.zeros(3, dtype=torch.float64), "b": torch.zeros((), dtype=torch.float64)}


def tree_of(theta: Tensor) -> dict[str, Tensor]:
    return {"u": theta[:3], "v": theta[3]}


def outer(x: dict[str, Tensor]) -> Tensor:
    """A number of a solution, with a second derivative of its own."""
    return (x["w"] ** 3).sum() + x["b"] * x["w"][0]


def exact(theta: Tensor) -> Tensor:
    """The same of a solution without a graph."""
    return outer(newton(start(), tree_of(theta)))


def differences(function: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-5) -> Tensor:
    """Return the Jacobian of a function by central differences; inputs are the last dimension."""
    at = at.detach()
    columns = []
    for k in range(at.numel()):
        delta = torch.zeros_like(at).view(-1)
        delta[k] = step
        delta = delta.view_as(at)
        columns.append((function(at + delta) - function(at - delta)) / (2 * step))
    return torch.stack(columns, -1).detach()


def theta() -> Tensor:
    return torch.tensor([0.3, -0.8, 1.1, 0.2], dtype=torch.float64)
