"""Adjoints that are approximations, hold on by definition, and one that chooses."""

from __future__ import annotations

import logging
from typing import Any

import loops
import pytest
import torch
from tolerances import relative_error
from torch import Tensor

from torchopt.diff import Auto, Checkpointed, FirstOrder, Offloaded, Truncated, Unrolled, unroll


F64 = torch.float64


def problem() -> tuple[Any, Tensor, Tensor]:
    torch.manual_seed(0)
    lr = torch.tensor(0.3, dtype=F64, requires_grad=True)
    w0 = torch.randn(3, dtype=F64, requires_grad=True)
    step = lambda w, _: (w - lr * torch.func.grad(lambda w: w.cosh().log().sum())(w), w.sum())  # noqa: E731
    return step, w0, lr


@pytest.mark.parametrize("last", [1, 2, 4])
def test_truncated_is_the_unroll_of_the_last_steps(last: int) -> None:
    step, w0, lr = problem()
    w, ys = unroll(step, w0, length=6, adjoint=Truncated(last))
    weights = torch.arange(1, 7, dtype=F64)
    by_w0, by_lr = torch.autograd.grad(
        w.square().sum() + (weights * ys).sum(), (w0, lr), allow_unused=True
    )
    start = unroll(step, w0, length=6 - last)[0].detach()
    end, late = unroll(step, start, length=last)
    expected = torch.autograd.grad(end.square().sum() + (weights[6 - last :] * late).sum(), lr)[0]
    assert by_w0 is None
    assert relative_error(by_lr, expected) <= 1e-12
    assert torch.equal(ys[:-last], unroll(step, w0, length=6)[1][:-last])


def test_truncated_serves_steps_that_call_autograd() -> None:
    values = loops.inputs()
    results = [
        loops.meta_loss(Truncated(3), autograd=a)(*loops.leaves(values)) for a in (False, True)
    ]
    assert relative_error(results[1], results[0]) <= 1e-12


@pytest.mark.parametrize("transform", [False, True])
def test_first_order_takes_gradients_for_constants(transform: bool) -> None:
    _, w0, lr = problem()

    def loss(w0: Tensor, lr: Tensor) -> Tensor:
        step = lambda w, _: (w - lr * torch.func.grad(lambda w: w.cosh().log().sum())(w), None)  # noqa: E731
        return unroll(step, w0, length=4, adjoint=FirstOrder())[0].square().sum()

    if transform:
        by_w0, by_lr = torch.func.grad(loss, argnums=(0, 1))(w0.detach(), lr.detach())
    else:
        by_w0, by_lr = torch.autograd.grad(loss(w0, lr), (w0, lr))
    w, total = w0.detach(), torch.zeros(3, dtype=F64)
    for _ in range(4):
        total, w = total + w.tanh(), w - lr.detach() * w.tanh()
    assert relative_error(by_w0, 2 * w) <= 1e-12
    assert relative_error(by_lr, -(2 * w * total).sum()) <= 1e-12


def test_offloaded_has_the_derivatives_of_the_plain_unroll() -> None:
    values = loops.inputs()
    v = loops.direction(values)
    function = loops.meta_loss(Offloaded(), autograd=True)
    expected = loops.hessian_product(loops.meta_loss(Unrolled()), values, v)
    assert relative_error(loops.hessian_product(function, values, v), expected) <= 1e-10


W0 = torch.ones(1000, requires_grad=True)  # a step saves 4 kB, a carry takes as much


def sine(w: Tensor, _: None) -> tuple[Tensor, None]:
    return w.sin(), None


@pytest.mark.parametrize(
    ("memory", "adjoint"),
    [
        (400_000, Unrolled()),
        ("210 KB", Checkpointed(2, graphs=2)),
        ("150KiB", Checkpointed(3, graphs=3)),
        (80_000, Checkpointed(10, graphs=10)),
        (24_000, Checkpointed("revolve", slots=5)),
    ],
)
def test_auto_takes_the_fastest_that_fits(memory: Any, adjoint: Any) -> None:
    assert Auto(memory).choose(sine, W0, length=100).adjoint == adjoint


def test_auto_keeps_all_carries_where_steps_save_much_more() -> None:
    step = lambda w, _: (w.sin().sin().sin().sin(), None)  # noqa: E731
    choice = Auto(450_000).choose(step, W0, length=100)
    assert choice.adjoint == Checkpointed()
    assert "16.0 kB" in str(choice)
    assert Auto(160_000).choose(step, W0, length=100).adjoint == Checkpointed(5, graphs=5)
    assert Auto(159_999).choose(step, W0, length=100).adjoint == Checkpointed("sqrt", graphs=1)


def test_auto_says_what_it_took(caplog: pytest.LogCaptureFixture) -> None:
    said: list[Any] = []
    with caplog.at_level(logging.INFO, "torchopt.diff"):
        w, _ = unroll(sine, W0, length=100, adjoint=Auto(24_000, report=said.append))
    (expected,) = torch.autograd.grad(unroll(sine, W0, length=100)[0].sum(), W0)
    assert torch.equal(torch.autograd.grad(w.sum(), W0)[0], expected)
    assert [choice.adjoint for choice in said] == [Checkpointed("revolve", slots=5)]
    assert "Checkpointed('revolve', slots=5): 100 steps" in caplog.text
    inside = torch.func.grad(lambda w: unroll(sine, w, length=100, adjoint=Auto(10**6))[0].sum())
    assert torch.equal(inside(W0.detach()), expected)
