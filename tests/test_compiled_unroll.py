"""Loops of the library's own optimizers under ``torch.compile``, as a whole and step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tolerances import relative_error
from torch import Tensor

import torchopt
from torchopt.diff import Checkpointed, FirstOrder, Unrolled, unroll


G = torch.Generator().manual_seed(0)
X = torch.randn(8, 3, dtype=torch.float64, generator=G)
W = torch.randn(3, dtype=torch.float64, generator=G)
TX = torchopt.adam(0.1)


def inner(w: Tensor) -> Tensor:
    return ((X @ w).tanh() - 0.5).square().mean()


def step(carry: Any, _: Any) -> Any:
    w, state = carry
    updates, state = TX.update(torch.func.grad(inner)(w), state, w, inplace=False)
    return (w + updates, state), inner(w)


def outer(w: Tensor, step: Any = step, length: int = 2, adjoint: Any = Unrolled()) -> Tensor:  # noqa: B008
    (w, _), losses = unroll(step, (w, TX.init(w)), length=length, adjoint=adjoint)
    return inner(w) + losses.sum()


def test_the_meta_gradient_through_adam_compiles_in_one_graph() -> None:
    meta_gradient = torch.func.grad(outer)
    compiled = torch.compile(meta_gradient, fullgraph=True, backend="eager")
    assert relative_error(compiled(W), meta_gradient(W)) <= 1e-12


@pytest.mark.parametrize("every", ["sqrt", "log"])
def test_a_compiled_step_of_adam_is_replayed(every: Any) -> None:
    """The step that is watched first runs as it was written: no compiler reads under a watch."""
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled, counts = torch.compile(step, backend=counter), []
    for length in (3, 5):
        w = W.clone().requires_grad_()
        value = outer(w, compiled, length, Checkpointed(every))
        found = torch.autograd.grad(value, w)[0]
        counts.append(counter.frame_count)
        assert relative_error(found, torch.func.grad(outer)(W, length=length)) <= 1e-12
    assert counts[0] == counts[1] <= 3


@pytest.mark.parametrize("compiles", [False, True])
def test_looking_at_steps_costs_none_where_nothing_is_compiled(compiles: bool) -> None:
    """``torch.func`` brings the compiler along; that by itself compiles nothing."""
    torch.compiler.reset()
    taken, length = [], 8
    half = torch.compile(lambda x: 0.5 * x, backend="eager") if compiles else lambda x: 0.5 * x

    def step(w: Tensor, _: None) -> tuple[Tensor, None]:
        taken.append(torch.is_grad_enabled())
        return w - half(torch.func.grad(inner)(w)), None

    w = W.clone().requires_grad_()
    value = unroll(step, w, length=length, adjoint=Checkpointed())[0].cos().sum()
    assert len(taken) == length + (3 if compiles else 0)
    (found,) = torch.autograd.grad(value, w)
    assert len(taken) == 2 * length + (3 if compiles else -1)  # the last one was kept
    value = unroll(step, w, length=length)[0].cos().sum()
    assert relative_error(found, torch.autograd.grad(value, w)[0]) <= 1e-12


def test_first_order_finds_the_gradients_of_a_compiled_step() -> None:
    """What is compiled hides its calls of autograd: second derivatives were in it all the same."""
    torch.compiler.reset()
    gradients = []
    for taken in (step, torch.compile(step, backend="aot_eager")):
        w = W.clone().requires_grad_()
        value = outer(w, taken, 3, FirstOrder())
        gradients.append(torch.autograd.grad(value, w)[0])
    assert relative_error(gradients[1], gradients[0]) <= 1e-12
    assert relative_error(gradients[0], torch.func.grad(outer)(W, length=3)) > 1e-3
