"""Steps that are not the same when they are taken again are named."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from torchopt.diff import Checkpointed, Unrolled, unroll


Step = Callable[[Any, Any], Any]
EPS = torch.finfo(torch.float64).eps


@pytest.fixture
def w() -> Tensor:
    return torch.tensor([0.3, 0.7], dtype=torch.float64, requires_grad=True)


def own_generator() -> Step:
    generator = torch.Generator().manual_seed(0)
    return lambda w, _: (w * torch.rand((), generator=generator), None)


def of_numpy() -> Step:
    generator = np.random.default_rng(0)
    return lambda w, _: (w * generator.uniform(1, 2), None)


def of_python() -> Step:
    return lambda w, _: (w * random.uniform(1, 2), None)


def next_batch() -> Step:
    batches = itertools.count(1)
    return lambda w, _: (w - 0.1 * next(batches) * w.sin(), None)


def only_in_y() -> Step:
    calls = itertools.count(1)
    return lambda w, _: (w.sin(), {"calls": w.sum() * next(calls)})


def number_in_y() -> Step:
    calls = itertools.count(1)
    return lambda w, _: (w.sin(), {"calls": next(calls)})


STEPS = {
    own_generator: "of the carry",
    of_numpy: "of the carry",
    of_python: "of the carry",
    next_batch: "of the carry",
    only_in_y: "of leaf 'calls' of y",
    number_in_y: "of leaf 'calls' of y",
}


def total(result: Any) -> Tensor:
    last, ys = result
    return last.sum() + (0 if ys is None else ys["calls"].double().sum())


@pytest.mark.parametrize("made", STEPS, ids=lambda made: made.__name__)
@pytest.mark.parametrize("adjoint", [Checkpointed(), Checkpointed("sqrt")], ids=repr)
def test_the_backward_pass_of_a_short_loop_names_it(made: Any, adjoint: Any, w: Tensor) -> None:
    """It takes the first step again anyway, so that it is taken once before."""
    random.seed(0)
    value = total(unroll(made(), w, length=5, adjoint=adjoint))
    random.seed(0)
    torch.testing.assert_close(value, total(unroll(made(), w, length=5)), rtol=1e-12, atol=0)
    said = rf"Step \d of 5 gives another value {STEPS[made]} .*Generator of its own.*Unrolled"
    with pytest.raises(RuntimeError, match=said):
        torch.autograd.grad(value, w)


@pytest.mark.parametrize("made", STEPS, ids=lambda made: made.__name__)
@pytest.mark.parametrize(
    ("adjoint", "length"),
    [(Checkpointed(), 64), (Checkpointed(2), 5), (Checkpointed("log"), 20)],
    ids=repr,
)
def test_a_long_loop_names_it_at_once(made: Any, adjoint: Any, length: int, w: Tensor) -> None:
    said = rf"The step gives another value {STEPS[made]} .*Generator of its own.*Unrolled"
    with pytest.raises(RuntimeError, match=said):
        unroll(made(), w, length=length, adjoint=adjoint)


def test_a_loop_of_one_step_is_compared_too(w: Tensor) -> None:
    value = total(unroll(only_in_y(), w, length=1, adjoint=Checkpointed()))
    with pytest.raises(RuntimeError, match="Step 1 of 1 gives another value of leaf 'calls' of y"):
        torch.autograd.grad(value, w)


def test_each_backward_pass_compares(w: Tensor) -> None:
    factor = [2.0]
    step = lambda w, _: ((w * factor[0]).sin(), None)  # noqa: E731
    value = total(unroll(step, w, length=2, adjoint=Checkpointed()))
    torch.autograd.grad(value, w, retain_graph=True, create_graph=True)
    factor[0] = 2.5
    with pytest.raises(RuntimeError, match=r"Step \d of 2 gives another value of the carry"):
        torch.autograd.grad(value, w)


@pytest.mark.parametrize("length", [1, 2, 6])
@pytest.mark.parametrize(
    "adjoint", [Checkpointed(), Checkpointed(2, graphs=2), Checkpointed("log")], ids=repr
)
def test_what_changes_before_the_second_derivative_is_noticed(
    adjoint: Any, length: int, w: Tensor
) -> None:
    settings = {"rate": 2.0}
    step = lambda w, _: ((w * settings["rate"]).sin(), None)  # noqa: E731
    value = total(unroll(step, w, length=length, adjoint=adjoint))
    (first,) = torch.autograd.grad(value, w, create_graph=True)
    torch.autograd.grad(first.sum(), w, retain_graph=True)
    settings["rate"] = 2.5
    with pytest.raises(
        RuntimeError, match=rf"Step \d of {length} gives another value of the carry"
    ):
        torch.autograd.grad(first.sum(), w)


def watched_otherwise(by: float) -> Step:
    """Return a step that is another one by a factor when it is watched: it is given no leaf."""
    return lambda w, _: (w.sin() * (1 if w.is_leaf else 1 + by), w.cos())


def test_what_rounds_otherwise_when_it_is_watched_is_no_other_step(w: Tensor) -> None:
    for adjoint in (Checkpointed(), Checkpointed(2)):
        last, ys = unroll(watched_otherwise(4 * EPS), w, length=4, adjoint=adjoint)
        found = torch.autograd.grad(last.sum() + ys.sum(), w)[0]
        last, ys = unroll(watched_otherwise(0), w, length=4, adjoint=Unrolled())
        expected = torch.autograd.grad(last.sum() + ys.sum(), w)[0]
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "adjoint", [Checkpointed(), Checkpointed(2), Checkpointed("log")], ids=repr
)
def test_a_step_that_rounds_otherwise_without_a_graph_has_a_second_derivative(
    adjoint: Any, compiled: bool, length: int, w: Tensor
) -> None:
    """As kernels do that are for inference only; also where the first step is compared at once."""
    if compiled:
        torch.compile(torch.sin, backend="eager")

    def step(w: Tensor, _: None) -> tuple[Tensor, None]:
        return (w.sin() * (1 + 4 * EPS if torch.is_grad_enabled() else 1)) * 2, None

    def second(adjoint: Any) -> Tensor:
        value = total(unroll(step, w, length=length, adjoint=adjoint))
        (first,) = torch.autograd.grad(value, w, create_graph=True)
        return torch.autograd.grad(first.sum(), w)[0]

    torch.testing.assert_close(second(adjoint), second(Unrolled()), rtol=1e-10, atol=1e-12)


def test_what_differs_by_more_than_rounding_is_another_step(w: Tensor) -> None:
    last, _ = unroll(watched_otherwise(0.1), w, length=4, adjoint=Checkpointed())
    with pytest.raises(RuntimeError, match="Step 1 of 4 gives another value of the carry"):
        torch.autograd.grad(last.sum(), w)
    with pytest.raises(RuntimeError, match="The step gives another value of the carry"):
        unroll(watched_otherwise(0.1), w, length=4, adjoint=Checkpointed(2))


@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_a_compiled_step_rounds_otherwise_than_as_it_was_written(length: int, w: Tensor) -> None:
    """It is watched as it was written, and taken as it was compiled."""

    def rounding(module: Any, _: Any) -> Any:
        return lambda *inputs: [x * (1 + 4 * EPS) for x in module(*inputs)]

    step = torch.compile(lambda w, _: ((2 * w).sin(), None), backend=rounding)
    value = total(unroll(step, w, length=length, adjoint=Checkpointed()))
    first = torch.autograd.grad(value, w, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(value, w)[0], first)


def test_what_the_first_step_hands_on_is_not_copied(w: Tensor) -> None:
    fixed = torch.ones(3)
    carry, y = unroll(
        lambda c, _: ({"w": c["w"].sin(), "fixed": c["fixed"]}, c["fixed"]),
        {"w": w, "fixed": fixed},
        length=3,
        adjoint=Checkpointed(),
    )
    assert torch.equal(carry["fixed"], fixed)
    assert torch.equal(y, torch.ones(3, 3))
    expected = unroll(lambda w, _: (w.sin(), None), w, length=3)[0].sum()
    found = torch.autograd.grad(carry["w"].sum(), w)[0]
    torch.testing.assert_close(found, torch.autograd.grad(expected, w)[0], rtol=1e-10, atol=1e-12)
