"""Second derivatives of loops: where carries that are saved would be wrong without a word."""

from __future__ import annotations

from typing import Any

import loops
import pytest
import torch
from tolerances import META_GRADIENT, relative_error

import torchopt
from torchopt.diff import Checkpointed, Unrolled, grad_and_value, unroll


@pytest.mark.parametrize("name", ["plain", *loops.EXACT])
def test_the_hessian_against_central_differences(name: str) -> None:
    adjoint: Any = {"plain": Unrolled(), **loops.EXACT}[name]
    values, function = loops.inputs(), loops.meta_loss(adjoint)
    v = loops.direction(values)
    up, down = (loops.gradient(function, loops.moved(values, v, s * 1e-5)) for s in (1, -1))
    actual = loops.hessian_product(function, values, v)
    assert relative_error(actual, (up - down) / 2e-5) <= META_GRADIENT


@pytest.mark.parametrize("name", ["every 1", "sqrt", "log"])
def test_the_hessian_where_steps_call_autograd(name: str) -> None:
    values = loops.inputs()
    v = loops.direction(values)
    expected = loops.hessian_product(loops.meta_loss(Unrolled()), values, v)
    actual = loops.hessian_product(loops.meta_loss(loops.EXACT[name], autograd=True), values, v)
    assert relative_error(actual, expected) <= 1e-10


@pytest.mark.parametrize("name", ["log"])
def test_third_derivatives(name: str) -> None:
    values = loops.inputs()

    def third(adjoint: Any) -> torch.Tensor:
        by = loops.leaves(values)
        grads = torch.autograd.grad(loops.meta_loss(adjoint)(*by), by, create_graph=True)
        square = sum(g.square().sum() for g in grads)
        grads = torch.autograd.grad(square, by, create_graph=True)  # pyright: ignore
        square = sum(g.square().sum() for g in grads)
        return loops.flat(torch.autograd.grad(square, by))  # pyright: ignore

    assert relative_error(third(loops.EXACT[name]), third(Unrolled())) <= 1e-10


# Batches of cotangents ---------------------------------------------------------------------------


def by_batched_grads(rows: torch.Tensor, w: torch.Tensor, by: list[torch.Tensor]) -> Any:
    return torch.autograd.grad(w, by, rows, is_grads_batched=True, create_graph=True)


def by_vmap(rows: torch.Tensor, w: torch.Tensor, by: list[torch.Tensor]) -> Any:
    def pulled(row: torch.Tensor) -> Any:
        return torch.autograd.grad(w, by, row, create_graph=True)

    return torch.vmap(pulled)(rows)


@pytest.mark.parametrize("jacobian", [by_batched_grads, by_vmap])
@pytest.mark.parametrize("name", loops.EXACT)
def test_a_jacobian_by_batches_can_be_differentiated(name: str, jacobian: Any) -> None:
    """Twice more: no node may hold a batch, which ends with the call that made it."""
    start, rate = torch.tensor([0.3, -0.7, 0.9]).double(), torch.tensor(1.3).double()
    rows, weights = torch.randn(4, 3).double(), torch.randn(4).double()

    def derivatives(adjoint: Any) -> list[torch.Tensor]:
        by = [start.clone().requires_grad_(), rate.clone().requires_grad_()]
        torch.manual_seed(5)

        def loss(w: torch.Tensor) -> torch.Tensor:
            return (w * by[1]).sin().sum() + w.square().sum().cos()

        def step(w: torch.Tensor, _: None) -> tuple[torch.Tensor, None]:
            grad, _ = grad_and_value(loss)(w)
            return w - 0.3 * by[1] * grad + 0.1 * torch.rand_like(w) * w.square(), None

        w, _ = unroll(step, by[0], length=5, adjoint=adjoint)
        along = rows.clone().requires_grad_()
        found = jacobian(along, w, by)
        value = sum((weights @ j.square().reshape(4, -1)).sum() for j in found)
        second = torch.autograd.grad(value, [*by, along], create_graph=True)  # pyright: ignore
        third = torch.autograd.grad(sum(g.square().sum() for g in second), by)  # pyright: ignore
        return [*found, *second, *third]

    for a, b in zip(derivatives(loops.EXACT[name]), derivatives(Unrolled())):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("jacobian", [by_batched_grads, by_vmap])
def test_a_jacobian_of_a_block_by_batches_can_be_differentiated(jacobian: Any) -> None:
    x, rows = torch.randn(5, 3).double(), torch.randn(2, 3).double()

    def derivative(adjoint: Any) -> torch.Tensor:
        torch.manual_seed(1)
        net, lr = torch.nn.Linear(3, 1).double(), torch.tensor(0.1).double().requires_grad_()
        start = net.weight
        with torchopt.inner_loop(net, torchopt.sgd(lr), adjoint=adjoint) as inner:
            for _ in range(3):
                inner.step(lambda: net(x).sin().square().mean())
            found = jacobian(rows, net.weight[0], [start, lr])
        value = sum(j.square().sum() for j in found)
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, [start, lr])])  # pyright: ignore

    found, expected = derivative(Checkpointed("sqrt")), derivative(Unrolled())
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
