"""The last steps of a loop are recorded in its first sweep, and not taken again."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from torchopt.diff import Checkpointed, Unrolled, unroll


LENGTH = 9
#: How many of the last steps are recorded at once.
TURNS = [
    (Checkpointed(), 1),
    (Checkpointed(2), 1),
    (Checkpointed(4, graphs=4), 1),  # what is left of 9
    (Checkpointed(6, graphs=2), 1),
    (Checkpointed(5, graphs=5), 4),
    (Checkpointed("log"), 1),
    (Checkpointed("revolve", slots=2, graphs=3), 3),
    (Checkpointed("sqrt", store="cpu"), 1),
]


@pytest.fixture
def rate() -> Tensor:
    return torch.tensor(0.3, dtype=torch.float64, requires_grad=True)


def counted(rate: Tensor) -> tuple[Callable[..., Any], list[bool]]:
    """Return a step that draws, and a list that it writes to."""
    taken: list[bool] = []

    def step(w: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        taken.append(torch.is_grad_enabled())
        noise = torch.randn_like(w)
        return w - rate * (w * x + noise).sin(), (w * rate).cos().sum()

    return step, taken


def differentiated(step: Any, rate: Tensor, adjoint: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    w, xs = (torch.linspace(0.1, 1, 3 * n, dtype=torch.float64) for n in (1, LENGTH))
    w, xs = w.requires_grad_(), xs.reshape(LENGTH, 3).requires_grad_()
    torch.manual_seed(3)
    last, ys = unroll(step, w, xs, adjoint=adjoint)
    return last.sum() + ys.square().sum(), (w, xs, rate)


@pytest.mark.parametrize(("adjoint", "turn"), TURNS, ids=repr)
def test_the_last_steps_are_not_taken_again(adjoint: Any, turn: int, rate: Tensor) -> None:
    step, taken = counted(rate)
    value, by = differentiated(step, rate, adjoint)
    forward = len(taken)
    # the first is watched, and taken again if the backward pass does not start from all carries
    assert forward == LENGTH + (adjoint.schedule(LENGTH).kept() != list(range(LENGTH)))
    found = torch.autograd.grad(value, by)
    plan = adjoint.plan(LENGTH)
    assert len(taken) - forward == LENGTH + plan.advances - turn
    value, by = differentiated(step, rate, Unrolled())
    for a, b in zip(found, torch.autograd.grad(value, by)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_second_backward_pass_takes_them(rate: Tensor) -> None:
    step, taken = counted(rate)
    value, by = differentiated(step, rate, Checkpointed())
    first = torch.autograd.grad(value, by, retain_graph=True)
    before = len(taken)
    second = torch.autograd.grad(value, by)
    assert len(taken) - before == LENGTH
    assert all(torch.equal(a, b) for a, b in zip(first, second))


class Saved:
    """Stands in a graph for a tensor that is saved there."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def test_only_the_latest_loop_keeps_its_last_steps(rate: Tensor) -> None:
    """Of many loops that are differentiated together each would keep the graph of a step."""
    alive: weakref.WeakSet[Saved] = weakref.WeakSet()

    def pack(tensor: Tensor) -> Saved:
        alive.add(saved := Saved(tensor))
        return saved

    def step(w: Tensor, _: None) -> tuple[Tensor, None]:
        return (w * rate).sin(), None  # saves three tensors

    w = torch.ones(3, dtype=torch.float64, requires_grad=True)
    gc.disable()
    try:
        ends, kept = [], []
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
            for _ in range(4):
                ends.append(unroll(step, w, length=3, adjoint=Checkpointed())[0])
                kept.append(len(alive))
    finally:
        gc.enable()
    assert kept == [3 + 2 * loops for loops in (1, 2, 3, 4)]  # w and rate for each loop
    found = torch.autograd.grad([end.sum() for end in ends], (w, rate))
    plain = unroll(step, w, length=3, adjoint=Unrolled())[0].sum()
    for a, b in zip(found, torch.autograd.grad(4 * plain, (w, rate))):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("graphs", [1, 2])
def test_what_has_changed_since_is_noticed_before_the_turn(graphs: int) -> None:
    w, settings = torch.ones(3, dtype=torch.float64, requires_grad=True), {"rate": 0.3}

    def step(w: Tensor, _: None) -> tuple[Tensor, None]:
        return w - settings["rate"] * w.sin(), None

    adjoint = Checkpointed(2, graphs=graphs)
    value = unroll(step, w, length=4, adjoint=adjoint)[0].sum()
    settings["rate"] = 0.2
    with pytest.raises(RuntimeError, match=rf"Step {4 - graphs} of 4 gives another value"):
        torch.autograd.grad(value, w)
