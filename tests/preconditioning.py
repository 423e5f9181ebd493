"""Problems of matrices, for the tests of Shampoo and SOAP."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from conftest import nonzero
from tolerances import META_GRADIENT, assert_close
from torch import Tensor, nn

import torchopt


F64: Any = {"dtype": torch.float64}
SHAPES = ((4, 3), (3,), (3, 2, 2))


def counted(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(math.prod(shape), **F64)


def assert_ends_at(tx: torchopt.GradientTransformation, expected: list[list[float]]) -> None:
    """Take 8 steps with ``cos(0.7 i^2 + 1.3 t (i + 1))`` from ``sin(1 + i)``, for entries i."""
    params = [(1 + counted(shape)).sin().reshape(shape) for shape in SHAPES]
    state = tx.init(params)
    for t in range(1, 9):
        entries = [counted(shape) for shape in SHAPES]
        grads = [
            (0.7 * i * i + 1.3 * t * (i + 1)).cos().reshape(shape)
            for i, shape in zip(entries, SHAPES)
        ]
        params, state = tx.apply_gradients(grads, state, params, inplace=False)
    for p, row in zip(params, expected):
        if row:
            assert_close(p.flatten(), torch.tensor(row, **F64))


def low_rank_problem(rank: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return a 4 x 3 matrix and a loss whose gradient by it has a rank."""
    x, y = nonzero(rank, 3), nonzero(rank, 4)
    return nonzero(4, 3), lambda w: (((x @ w.mT).tanh() - y) ** 2).sum()


def unrolled(
    tx: torchopt.GradientTransformation, loss: Callable[[Tensor], Tensor], w: Tensor, steps: int
) -> Tensor:
    """Return an outer loss after some steps."""
    state, outer = tx.init(w), torch.linspace(-1.0, 1.3, w.numel(), **F64).reshape(w.shape)
    for _ in range(steps):
        g = torch.func.grad(loss)(w)
        w, state = tx.apply_gradients(g, state, w, inplace=False)
    return (outer * w.sin()).sum()


def assert_meta_gradient(function: Callable[[Tensor], Tensor], x: Tensor, h: float = 1e-4) -> None:
    """Hold a derivative to central differences of order 4, in reverse and in forward mode."""
    steps = h * torch.eye(x.numel(), **F64).reshape(-1, *x.shape)
    with torch.no_grad():
        at = lambda k: torch.stack([function(x + k * s) for s in steps])  # noqa: E731
        measured = (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * h)
    size = measured.abs().max()
    assert size > 1e-3
    for found in (torch.func.grad(function)(x), torch.func.jacfwd(function)(x)):
        error = (found.flatten() - measured).abs().max()
        assert error <= 10 * META_GRADIENT * size, (found.flatten(), measured)


def meta_gradient(inner_of: Any, w: Tensor, loss: Callable[[Tensor], Tensor], steps: int) -> Tensor:
    """Return the derivative of the outer loss of :func:`unrolled` by the differentiable API."""
    net = nn.ParameterDict({"w": w.clone()})
    start = net["w"]
    inner = inner_of(net)
    outer = torch.linspace(-1.0, 1.3, w.numel(), **F64).reshape(w.shape)
    for _ in range(steps):
        inner.step(loss(net["w"]))
    return torch.autograd.grad((outer * net["w"].sin()).sum(), start)[0]
