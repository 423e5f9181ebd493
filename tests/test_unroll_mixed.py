"""Inner gradients whose derivative is forward mode over reverse mode."""

from __future__ import annotations

from typing import Any

import loops
import pytest
import torch
from tolerances import relative_error
from torch import Tensor, nn

from torchopt.diff import Mixed, Unrolled, grad_and_value, unroll
from torchopt.diff.replay.watch import saved_behind


F64 = torch.float64


def descent(loss_fn: Any) -> Any:
    def step(w: Tensor, _: None) -> tuple[Tensor, Tensor]:
        grads, loss = grad_and_value(loss_fn)(w)
        return w - 0.1 * grads, loss

    return step


def differentiated(loss_fn: Any, by: list[Tensor], adjoint: Any) -> Tensor:
    w, losses = unroll(descent(loss_fn), by[0], length=3, adjoint=adjoint)
    return loops.flat(torch.autograd.grad(w.square().sum() + losses.sum(), by, retain_graph=True))


def test_tensors_closed_over_by_the_inner_loss() -> None:
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return 2 * grads[0]

        @staticmethod
        def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
            return 2 * tangents[0]

    w0, leaf = (torch.tensor([a, 0.3], dtype=F64, requires_grad=True) for a in (0.5, -0.4))
    made = leaf.exp()
    loss_fn = lambda w: (Twice.apply(w * made).sin() * w).sum()  # noqa: E731
    by = [w0, leaf, made]
    expected = differentiated(loss_fn, by, Unrolled())
    assert relative_error(differentiated(loss_fn, by, Mixed()), expected) <= 1e-12


def test_random_numbers_are_drawn_again_alike() -> None:
    w0 = torch.linspace(-1, 1, 6, dtype=F64).requires_grad_()
    dropped = lambda w: (nn.functional.dropout(w, 0.5) ** 4).sum()  # noqa: E731
    results = []
    for adjoint in (Unrolled(), Mixed()):
        torch.manual_seed(1)
        results.append(differentiated(dropped, [w0], adjoint))
    assert relative_error(results[1], results[0]) <= 1e-12


def test_an_operation_without_a_forward_derivative_is_named_or_reversed() -> None:
    w0 = torch.linspace(-1, 1, 4, dtype=F64).requires_grad_()

    def loss_fn(w: Tensor) -> Tensor:
        return nn.functional.huber_loss(w.sin() * 2, torch.ones(4, dtype=F64), delta=1.3)

    with pytest.raises(RuntimeError, match=r"huber_loss.*fallback=\"reverse\""):
        differentiated(loss_fn, [w0], Mixed())
    actual = differentiated(loss_fn, [w0], Mixed(fallback="reverse"))
    assert relative_error(actual, differentiated(loss_fn, [w0], Unrolled())) <= 1e-12


def test_what_it_cannot_do_is_said() -> None:
    w0 = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match='"raise" or "reverse"'):
        Mixed(fallback="none")
    with pytest.raises(RuntimeError, match=r"torchopt\.diff\.grad_and_value"):
        unroll(lambda w, _: (w.sin(), None), w0, length=2, adjoint=Mixed())
    step = descent(lambda w: (w**3).sum())
    with pytest.raises(RuntimeError, match="eager mode"):
        torch.func.grad(lambda w: unroll(step, w, length=2, adjoint=Mixed())[0].sum())(w0.detach())
    with pytest.raises(ValueError, match="scalar"):
        unroll(descent(lambda w: w**3), w0, length=2, adjoint=Mixed())


def test_a_node_remembers_its_inputs_only() -> None:
    """Where the plain unroll saves every intermediate result of the inner loss."""

    def saved(adjoint: Any) -> int:
        w0 = torch.ones(100, requires_grad=True)
        wide = lambda w: w.sin().sin().sin().sin().sin().sin().sum()  # noqa: E731
        w, _ = unroll(descent(wide), w0, length=4, adjoint=adjoint)
        storages = [t.untyped_storage() for t in saved_behind([w])]
        return sum({s.data_ptr(): s.nbytes() for s in storages}.values())

    assert saved(Mixed()) < saved(Unrolled()) / 3
