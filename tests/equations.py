"""Systems of equations, fixed points and least squares for the tests of their solvers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


F64: dict[str, Any] = {"dtype": torch.float64}
N = 4


def tridiagonal(x: Tensor, c: Tensor) -> Tensor:
    """Broyden's tridiagonal equations, with a right-hand side ``c``."""
    zero = x.new_zeros(1)
    left, right = torch.cat([zero, x[:-1]]), torch.cat([x[1:], zero])
    return (3 - 2 * x) * x - left - 2 * right + c


def mixing(x: Tensor, c: Tensor) -> Tensor:
    """Nonsymmetric equations with a Jacobian near the identity."""
    return x + 0.3 * torch.roll(x, 1).sin() - 0.2 * x.cos().mean() - c


def contraction(x: Tensor, c: Tensor) -> Tensor:
    """A layer of a deep equilibrium model: nonsymmetric, a contraction."""
    n = x.numel()
    grid = torch.arange(n, **F64)
    w = torch.sin(grid[:, None] * 1.7 + grid * 0.9) * 0.8 / n**0.5
    return (w @ x + c).tanh()


def decay(p: Tensor, y: Tensor) -> Tensor:
    """Residuals of two exponentials; not zero at the solution where ``y`` has noise."""
    t = torch.linspace(0, 2, y.numel(), **F64)
    return p[0] * torch.exp(-p[1] * t) + p[2] * torch.cos(p[3] * t) - y


def decay_data(noise: float = 0.02) -> tuple[Tensor, Tensor]:
    """Return noisy values and a start."""
    truth = torch.tensor([2.0, 1.5, 0.7, 2.0], **F64)
    y = decay(truth, torch.zeros(20, **F64)) + noise * torch.randn(20, **F64)
    return y, torch.tensor([1.5, 1.0, 0.5, 1.8], **F64)


def central_jacobian(
    function: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-5
) -> Tensor:
    """Return the Jacobian of a function of a vector by central differences."""
    columns = []
    for k in range(at.numel()):
        move = torch.zeros_like(at)
        move[k] = step
        columns.append((function(at + move) - function(at - move)).detach() / (2 * step))
    return torch.stack(columns, -1)
