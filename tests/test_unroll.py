"""Loops: what they return, and that every exact adjoint has the plain unroll's derivative."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import loops
import pytest
import torch
from tolerances import META_GRADIENT, relative_error
from torch import Tensor, nn

import torchopt
from torchopt.diff import (
    Auto,
    Checkpointed,
    FirstOrder,
    Forward,
    Offloaded,
    Truncated,
    Unrolled,
    unroll,
)


EXACT = 1e-10
F64 = torch.float64


@pytest.mark.parametrize("name", loops.EXACT)
def test_the_meta_gradient_is_that_of_the_plain_unroll(name: str) -> None:
    values = loops.inputs()
    expected = loops.gradient(loops.meta_loss(Unrolled()), values)
    assert (expected.split([3, 3, 1, 1, 60])[3] != 0).all()  # by what reaches the inner loss only
    actual = loops.gradient(loops.meta_loss(loops.EXACT[name]), values)
    assert relative_error(actual, expected) <= EXACT


@pytest.mark.parametrize("adjoint", [*loops.REPLAYING.values(), Offloaded()], ids=repr)
def test_steps_may_call_autograd_themselves(adjoint: Any) -> None:
    values = loops.inputs()
    expected = loops.gradient(loops.meta_loss(Unrolled()), values)
    actual = loops.gradient(loops.meta_loss(adjoint, autograd=True), values)
    assert relative_error(actual, expected) <= EXACT


@pytest.mark.parametrize(
    "adjoint",
    [Unrolled(), Truncated(9), Offloaded(), *(loops.REPLAYING[n] for n in ("log", "segments"))],
    ids=repr,
)
def test_a_gradient_by_one_leaf_takes_the_others_as_constants(adjoint: Any) -> None:
    """Though the step before has computed the average, which the loss reads, from the weights."""
    w, average = (torch.randn(3, dtype=F64).requires_grad_() for _ in range(2))

    def step(carry: Any, _: None) -> tuple[Any, None]:
        w, average = carry
        (grad,) = torch.autograd.grad(0.5 * (w - average).square().sum(), w, create_graph=True)
        w = w - 0.3 * grad
        return (w, 0.9 * average + 0.1 * w), None

    (last, _), _ = unroll(step, (w, average), length=4, adjoint=adjoint)
    matrix = torch.tensor([[0.7, 0.3], [0.07, 0.93]], dtype=F64).matrix_power(4)
    torch.testing.assert_close(last, matrix[0, 0] * w + matrix[0, 1] * average)
    found = torch.stack(torch.autograd.grad(last.sum(), (w, average)))
    torch.testing.assert_close(found, matrix[0, :, None].expand(2, 3))


def test_the_meta_gradient_against_central_differences() -> None:
    values = loops.inputs()
    v, function = loops.direction(values), loops.meta_loss(Checkpointed("log"))
    up, down = (function(*loops.moved(values, v, s * 1e-5).values()) for s in (1, -1))
    actual = loops.gradient(function, values) @ v
    assert relative_error(actual, (up - down) / 2e-5) <= META_GRADIENT


@pytest.mark.parametrize("adjoint", [Unrolled(), *loops.REPLAYING.values(), Forward()], ids=repr)
def test_the_closed_form_of_a_quadratic(adjoint: Any) -> None:
    """Gradient descent on ``0.5 w'Hw + w'Bx``: the start by a power, x by a geometric series."""
    torch.manual_seed(0)
    root = torch.randn(3, 3, dtype=F64)
    h, b, lr = root @ root.T + torch.eye(3, dtype=F64), torch.randn(3, 2, dtype=F64), 0.05
    w0, x = (torch.randn(n, dtype=F64, requires_grad=True) for n in (3, 2))

    def step(w: Tensor, _: None) -> tuple[Tensor, None]:
        loss = lambda w: 0.5 * w @ h @ w + w @ b @ x  # noqa: E731
        return w - lr * torch.func.grad(loss)(w), None

    w, ys = unroll(step, w0, length=7, adjoint=adjoint)
    assert ys is None
    u = torch.randn(3, dtype=F64)
    by_w0, by_x = torch.autograd.grad(w, (w0, x), u)
    m = torch.eye(3, dtype=F64) - lr * h
    series = sum(torch.linalg.matrix_power(m, k) for k in range(7))
    assert relative_error(by_w0, torch.linalg.matrix_power(m, 7) @ u) <= EXACT
    assert relative_error(by_x, -lr * b.T @ series @ u) <= EXACT


@pytest.mark.parametrize("adjoint", [Checkpointed(), Checkpointed("log")], ids=repr)
def test_two_backward_passes_and_no_third(adjoint: Any) -> None:
    w0 = torch.tensor([0.3, -0.7], dtype=F64, requires_grad=True)
    w, _ = unroll(lambda w, _: (w.sin() * w, None), w0, length=6, adjoint=adjoint)
    (first,) = torch.autograd.grad(w.sum(), w0, retain_graph=True)
    (second,) = torch.autograd.grad(w.sum(), w0)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(w.sum(), w0)


def test_random_numbers_are_drawn_again_alike() -> None:
    w0 = torch.randn(4, dtype=F64, requires_grad=True)

    def run(adjoint: Any) -> list[Tensor]:
        torch.manual_seed(3)
        step = lambda w, _: (nn.functional.dropout(w, 0.5) + w.sin(), torch.rand(2))  # noqa: E731
        w, ys = unroll(step, w0, length=6, adjoint=adjoint)
        forward = torch.rand(1)
        (grad,) = torch.autograd.grad(w.sum(), w0, create_graph=True)
        (hessian,) = torch.autograd.grad(grad.sum(), w0)
        return [w, ys, grad, hessian, forward, torch.rand(1)]  # and go on as if nothing had been

    expected = run(Unrolled())
    for name, adjoint in loops.REPLAYING.items():
        for a, e in zip(run(adjoint), expected):
            assert relative_error(a, e) <= EXACT, name


def test_autocast_is_put_back() -> None:
    weight = torch.randn(8, 8, requires_grad=True)

    def run(adjoint: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            step = lambda h, _: ((h @ weight).float(), None)  # noqa: E731
            h, _ = unroll(step, torch.ones(2, 8), length=1, adjoint=adjoint)
        return torch.autograd.grad(h.square().sum(), weight)[0]

    half, whole = (
        run(Unrolled()),
        torch.autograd.grad((torch.ones(2, 8) @ weight).square().sum(), weight)[0],
    )
    assert torch.equal(run(Checkpointed()), half)
    assert not torch.allclose(half, whole, rtol=1e-5)


@pytest.mark.parametrize(
    "adjoint", [*loops.REPLAYING.values(), Forward(), Auto("1GB"), FirstOrder()], ids=repr
)
def test_nothing_is_recorded_where_nothing_is_wanted(adjoint: Any) -> None:
    calls = []

    def step(w: Tensor, _: None) -> tuple[Tensor, None]:
        calls.append(1)
        return 2 * w, None

    with torch.no_grad():
        w, _ = unroll(step, torch.ones(2, requires_grad=True), length=3, adjoint=adjoint)
    assert len(calls) == 3
    w2, _ = unroll(step, torch.ones(2), length=3, adjoint=adjoint)
    assert not w.requires_grad
    assert not w2.requires_grad
    assert w.tolist() == w2.tolist() == [8, 8]


def test_a_zero_second_moment_has_a_finite_derivative() -> None:
    tx = torchopt.adam(0.1)
    w0 = torch.tensor([0.0, 1.0], dtype=F64, requires_grad=True)  # a gradient that is always zero

    def step(carry: Any, _: None) -> Any:
        w, state = carry
        updates, state = tx.update(
            torch.func.grad(lambda w: (w**4).sum())(w), state, w, inplace=False
        )
        return (w + updates, state), None

    grads = []
    for adjoint in (Unrolled(), Checkpointed(), Checkpointed("log")):
        (w, _), _ = unroll(step, (w0, tx.init(w0.detach())), length=3, adjoint=adjoint)
        grads.append(torch.autograd.grad(w.sum(), w0)[0])
    assert all(torch.isfinite(g).all() and relative_error(g, grads[0]) <= EXACT for g in grads)


def test_what_has_no_derivative_says_so() -> None:
    w0 = torch.ones(2, requires_grad=True)

    def step(carry: Any, _: None) -> Any:
        w, n, constant = carry
        return (w * 2, n + 1, constant * 2), w.detach()

    start = w0, torch.tensor(0), torch.ones(1).detach()
    for adjoint in (Unrolled(), Checkpointed()):
        (w, n, _), ys = unroll(step, start, length=2, adjoint=adjoint)
        assert (w.requires_grad, n.requires_grad, ys.requires_grad) == (True, False, False)
        assert int(n) == 2


def test_a_loop_is_freed_with_its_result() -> None:
    w0 = torch.ones(2, requires_grad=True)

    def run() -> tuple[Tensor, weakref.ref[Tensor]]:
        held = torch.ones(2)
        w, _ = unroll(lambda w, _: (w * held, None), w0, length=3, adjoint=Checkpointed("sqrt"))
        return w, weakref.ref(held)

    w, held = run()
    w.sum().backward()
    assert held() is not None  # by the step, which the graph may need again
    gc.disable()
    try:
        del w
        assert held() is None  # no cycle runs through the graph
    finally:
        gc.enable()


def test_tensors_from_outside_are_found_wherever_they_are() -> None:
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return 2 * grads[0]

    w0 = torch.tensor(0.5, dtype=F64, requires_grad=True)
    leaf = torch.tensor(0.3, dtype=F64, requires_grad=True)
    hidden = torch.tensor(0.2, dtype=F64, requires_grad=True)
    behind = hidden.exp()  # which only the hand-written node reads
    net = nn.Linear(1, 1, dtype=F64)

    def step(w: Tensor, _: None) -> tuple[Tensor, Tensor]:
        return Twice.apply(behind) * w.sin() + Twice.apply(leaf) + net(w[None])[0], leaf

    by = (w0, leaf, hidden, *net.parameters())

    def run(adjoint: Any) -> Tensor:
        w, ys = unroll(step, w0, length=4, adjoint=adjoint)
        grads = torch.autograd.grad(w + (ys * torch.arange(4)).sum(), by, retain_graph=True)
        return loops.flat(grads)

    for adjoint in (Checkpointed(), Checkpointed("log")):
        assert relative_error(run(adjoint), run(Unrolled())) <= EXACT


def test_no_carry_is_kept_that_the_graph_does_not_need() -> None:
    values = loops.inputs()
    for adjoint in (Truncated(last=loops.STEPS), Auto("1GB")):
        actual = loops.gradient(loops.meta_loss(adjoint), values)
        assert relative_error(actual, loops.gradient(loops.meta_loss(Unrolled()), values)) == 0
