"""``is_grads_batched=True`` (``vectorize=True``), in a graph that is to be differentiated itself.

PyTorch's batches there are of an older kind, which no hand-written node can hold: what the node is
differentiated by would be lost without a word. Each is compared with one call for each row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import nonzero
from torch import Tensor

import torchopt
from torchopt import linear_solve
from torchopt.diff import implicit, zero_order


Function = Callable[[Tensor], Tensor]
ROWS = 2


def solution(solver: Any) -> Function:
    a = torch.randn(3, 3).double()

    def function(x: Tensor) -> Tensor:
        matrix = a @ a.T + 3 * torch.eye(3).double() + x.outer(x)
        return solver(lambda v: matrix @ v, x)

    return function


def root(x: Tensor) -> Tensor:
    def condition(y: Tensor, x: Tensor) -> Tensor:
        return y**3 + y * x.square() - x.sin()

    @implicit.custom_root(condition, argnums=1)
    def solve(start: Tensor, x: Tensor) -> Tensor:
        y = start
        for _ in range(60):
            y = y - condition(y, x) / (3 * y.square() + x.square())
        return y.detach()

    return solve(torch.ones(3).double(), x)


def smoothed(x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    normal = torch.distributions.Normal(torch.zeros((), dtype=x.dtype), 1.0)

    @zero_order.zero_order(normal, "antithetic", num_samples=5, generator=generator)
    def function(x: Tensor) -> Tensor:
        return x.sin().sum()

    return torch.stack([function(x), function(x.square())])


def updates(tx: Any) -> Function:
    params = [nonzero(3), nonzero(3, 2)]
    state = tx.init(params)
    for _ in range(2):
        _, state = tx.update([nonzero(3), nonzero(3, 2)], state, params, inplace=False)

    def function(x: Tensor) -> Tensor:
        grads = [x, x.outer(x)[:, :2]]
        found, _ = tx.update(grads, state, params, inplace=False)
        return torch.cat([u.flatten() for u in found])

    return function


FUNCTIONS = {
    "solve_cg": lambda: solution(linear_solve.solve_cg()),
    "solve_gmres": lambda: solution(linear_solve.solve_gmres()),
    "solve_cholesky": lambda: solution(linear_solve.solve_cholesky()),
    "custom_root": lambda: root,
    "zero_order": lambda: smoothed,
    "adam": lambda: updates(torchopt.adam(0.1)),
    "shampoo": lambda: updates(torchopt.shampoo(0.1)),
    "soap": lambda: updates(torchopt.soap(0.1)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_batches_are_what_the_rows_are_one_by_one(name: str) -> None:
    function = FUNCTIONS[name]()
    start, found = nonzero(3), []
    rows = torch.randn(ROWS, *function(start).shape).double()
    for batched in (True, False):
        x = start.clone().requires_grad_()
        y = function(x)
        if batched:
            (first,) = torch.autograd.grad(y, x, rows, is_grads_batched=True, create_graph=True)
        else:
            each = [torch.autograd.grad(y, x, row, create_graph=True)[0] for row in rows]
            first = torch.stack(each)
        second = torch.autograd.grad(first.square().sum(), x)[0]
        assert second.abs().max() > 0
        found.append((first, second))
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["custom_root", "adam", "shampoo"])
def test_a_jacobian_of_torch_can_be_differentiated(name: str) -> None:
    function, start = FUNCTIONS[name](), nonzero(3)

    def square(x: Tensor, vectorize: bool) -> Tensor:
        jacobian: Any = torch.autograd.functional.jacobian(
            function, x, create_graph=True, vectorize=vectorize
        )
        return torch.autograd.grad(jacobian.square().sum(), x)[0]

    found, expected = (square(start.clone().requires_grad_(), v) for v in (True, False))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


class Inside(torch.autograd.Function):
    """A function whose backward pass asks for batched gradients through an update itself."""

    @staticmethod
    def forward(ctx: Any, function: Function, of_both: bool, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.function, ctx.of_both = function, of_both
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        with torch.enable_grad():
            y = ctx.saved_tensors[0].detach().requires_grad_()
            u = ctx.function(y)
            rows = torch.ones(2, len(u)).double()
            if ctx.of_both:
                rows = rows * grad.sum()
            (found,) = torch.autograd.grad(u, y, rows, is_grads_batched=True)
        return None, None, grad * found.sum(0)


def test_a_batched_gradient_inside_of_another() -> None:
    function, start = updates(torchopt.adam(0.1)), nonzero(3)
    found = []
    for batched in (True, False):
        x, eye = start.clone().requires_grad_(), torch.eye(3).double()
        y = Inside.apply(function, False, x)
        if batched:
            found.append(torch.autograd.grad(y, x, eye, is_grads_batched=True)[0])
        else:
            each = [torch.autograd.grad(y, x, row, retain_graph=True)[0] for row in eye]
            found.append(torch.stack(each))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)
    x = start.clone().requires_grad_()
    y = Inside.apply(function, True, x)
    with pytest.raises(NotImplementedError, match=r"batch of another such call.*torch\.func\.vmap"):
        torch.autograd.grad(y, x, torch.eye(3).double(), is_grads_batched=True)
