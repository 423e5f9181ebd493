"""Gradients in micro-batches: exact at every order, random numbers of their own, memory of one."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import torchopt
from torchopt.diff import Checkpointed, Unrolled, accumulate, unroll


EXAMPLES = 11  # in 4 parts: 3, 3, 3, 2


class Problem:
    """A loss with all that may reach it, and what it is differentiated by."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        new = lambda *shape: torch.randn(shape).double().requires_grad_()  # noqa: E731
        self.params = {"a": new(4, 5), "b": new(5, 2)}
        self.x, self.y, self.weight = new(EXAMPLES, 4), new(EXAMPLES, 2).detach(), new(EXAMPLES)
        self.closed_over, self.given, self.rate = new(), new(), torch.tensor(0.1).double()
        self.rate.requires_grad_()
        self.by = [*self.params.values(), self.x, self.weight]
        self.by += [self.closed_over, self.given, self.rate]
        self.batch = self.x, self.y, self.weight

    def loss(self, params: Any, batch: Any, given: Tensor) -> Tensor:
        x, y, weight = batch
        error = ((x @ params["a"]).tanh() @ params["b"] - y).square().sum(1)
        return (weight * error).mean() + self.closed_over * given * params["a"].square().sum()

    def autograd(self, params: Any, batch: Any, given: Tensor) -> Any:
        loss = self.loss(params, batch, given)
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        return dict(zip(params, grads)), loss


def squares(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack([x.square().sum() for x in tensors]).sum()


def derivatives(grad_fn: Callable[..., Any], problem: Problem, steps: int) -> list[Tensor]:
    """Return values, first and second derivatives of a function of some steps."""
    params = dict(problem.params)
    value = torch.zeros(())
    for _ in range(steps):
        grads, value = grad_fn(params, problem.batch, problem.given)
        params = {name: params[name] - problem.rate * grads[name] for name in params}
    outer = squares((*params.values(), value))
    first = torch.autograd.grad(outer, problem.by, create_graph=True)
    second = torch.autograd.grad(squares(first), problem.by)
    return [x.detach() for x in (outer, *first, *second)]


@pytest.mark.parametrize("functional", [True, False])
@pytest.mark.parametrize("steps", [1, 2])
def test_it_is_the_gradient_of_the_whole_at_every_order(functional: bool, steps: int) -> None:
    problem = Problem()
    whole = torch.func.grad_and_value(problem.loss) if functional else problem.autograd
    expected = derivatives(whole, problem, steps)
    found = derivatives(accumulate(whole, micro_batches=4), problem, steps)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_more_micro_batches_than_examples_are_single_examples() -> None:
    problem, calls = Problem(), []

    def grad_fn(params: Any, batch: Any, given: Tensor) -> Any:
        calls.append(len(batch[0]))
        return torch.func.grad(problem.loss)(params, batch, given)

    with torch.no_grad():
        found = accumulate(grad_fn, micro_batches=50)(problem.params, problem.batch, problem.given)
    assert set(calls) == {1}
    expected = torch.func.grad(problem.loss)(problem.params, problem.batch, problem.given)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_micro_batches_are_not_taken_more_often_than_they_must() -> None:
    """Once to see what a gradient is like, once watched, then once each in both directions."""
    x, calls = torch.randn(8, 2).double(), []
    w = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def grad_fn(w: Tensor, x: Tensor) -> Tensor:
        calls.append(len(x))
        return torch.func.grad(lambda w: (x @ w).sin().sum())(w)

    found = accumulate(grad_fn, micro_batches=4)(w, x)
    assert len(calls) == 1 + 1 + 4
    found.sum().backward()
    assert len(calls) == 1 + 1 + 4 + 4


def test_a_mean_over_tokens_needs_their_number() -> None:
    """Twelve sentences of different lengths; the loss is a mean over what the mask counts."""
    torch.manual_seed(1)
    w, x = torch.randn(3).double().requires_grad_(), torch.randn(12, 5, 3).double()
    mask = (torch.rand(12, 5) < torch.linspace(0.2, 1, 12)[:, None]).double()

    def loss(w: Tensor, batch: Any) -> Tensor:
        x, mask = batch
        return ((x @ w).sin() * mask).sum() / mask.sum()

    grad_fn = torch.func.grad(loss)
    tokens = accumulate(grad_fn, micro_batches=5, size=lambda batch: batch[1].sum())
    examples = accumulate(grad_fn, micro_batches=5)
    expected = grad_fn(w, (x, mask))
    torch.testing.assert_close(tokens(w, (x, mask)), expected, rtol=1e-10, atol=1e-10)
    assert (examples(w, (x, mask)) - expected).abs().max() > 1e-3


def test_each_micro_batch_draws_its_own_random_numbers_and_draws_them_again() -> None:
    x, w = torch.randn(6, 50).double(), torch.randn(50).double().requires_grad_()

    def grad_fn(w: Tensor, x: Tensor) -> Tensor:
        loss = (torch.dropout(x, 0.5, True) @ w).square().mean()
        return torch.autograd.grad(loss, w, create_graph=True)[0]

    fast = accumulate(grad_fn, micro_batches=3)
    fast(w, x)  # the first call asks for shapes besides
    results = []
    for together in (
        lambda: torch.stack([grad_fn(w, part) for part in x.split(2)]).mean(0),
        lambda: fast(w, x),
    ):
        torch.manual_seed(0)
        g = together()
        results.append([g.detach(), torch.rand(3), *torch.autograd.grad(g.square().sum(), w)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("adjoint", [Checkpointed("log"), Unrolled()])
def test_a_training_run_in_micro_batches(adjoint: Any) -> None:
    """With clipping, AdamW, a buffer and frozen weights outside of the carry, and data weights."""
    torch.manual_seed(0)
    embed, scale = torch.randn(20, 6).double(), torch.randn(6).double()  # frozen, and a buffer
    weights = torch.ones(16).double().requires_grad_()
    start = torch.randn(6, 3).double().requires_grad_()
    tokens, labels = torch.randint(20, (16, 4)), torch.randint(3, (16,))
    order = torch.stack([torch.randperm(16)[:10] for _ in range(5)])
    tx = torchopt.chain(torchopt.clip_grad_norm(0.1), torchopt.adamw(0.05))

    def loss(w: Tensor, index: Tensor) -> Tensor:
        hidden = (embed[tokens[index]].mean(1) * scale).tanh()
        losses = torch.nn.functional.cross_entropy(hidden @ w, labels[index], reduction="none")
        return (weights[index] * losses).mean()

    def trained(grad_fn: Any, adjoint: Any) -> list[Tensor]:
        def step(carry: Any, index: Tensor) -> Any:
            w, state = carry
            grads = grad_fn(w, index)
            return tx.apply_gradients(grads, state, w, inplace=False), None

        (w, _), _ = unroll(step, (start, tx.init(start)), order, adjoint=adjoint)
        grads = torch.autograd.grad(w.sin().sum(), [weights, start])
        return [w.detach(), *grads]

    def grad_fn(w: Tensor, index: Tensor) -> Tensor:
        return torch.autograd.grad(loss(w, index), w, create_graph=True)[0]

    expected = trained(torch.func.grad(loss), Unrolled())
    assert expected[1].abs().max() > 1e-4
    for function in (torch.func.grad(loss), grad_fn):
        found = trained(accumulate(function, micro_batches=3), adjoint)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


class Saved:
    """Counts the bytes of tensors that graphs hold."""

    def __init__(self) -> None:
        self.now = self.most = 0

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda held: held[0]):
            yield

    def _pack(self, tensor: Tensor) -> Any:
        class Held(list[Tensor]):
            pass

        size = tensor.numel() * tensor.element_size()
        self.now += size
        self.most = max(self.most, self.now)
        held = Held([tensor.detach()])  # an output would hold itself
        weakref.finalize(held, self._free, size)
        return held

    def _free(self, size: int) -> None:
        self.now -= size


def test_the_graph_of_one_micro_batch_is_there_at_a_time() -> None:
    torch.manual_seed(0)
    w, x = torch.randn(8, 8, requires_grad=True), torch.randn(512, 8)

    def grad_fn(w: Tensor, x: Tensor) -> Tensor:
        loss = ((x @ w).tanh() @ w).tanh().square().mean()
        return torch.autograd.grad(loss, w, create_graph=True)[0]

    most = {}
    for parts in (1, 16):
        saved, accumulated = Saved(), accumulate(grad_fn, micro_batches=parts)
        accumulated(w, x)  # learns shapes, outside of what is counted
        with saved.counting():
            torch.autograd.grad(accumulated(w, x).square().sum(), w)
        most[parts] = saved.most
    assert most[16] < 2 / 16 * most[1] + x.numel() * 4, most


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((3, 4), TypeError, "expects a function grad_fn"),
        ((torch.sin, 2.0), TypeError, "must be a whole number, got"),
        ((torch.sin, 0), ValueError, "at least 1, got 0"),
    ],
)
def test_bad_arguments(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        accumulate(arguments[0], micro_batches=arguments[1])


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ({"x": torch.ones(4), "y": torch.ones(3)}, ValueError, "same number of examples: 'x': "),
        ({"x": torch.ones(4), "y": 3}, TypeError, "leaf 'y' of the batch, so it must be a tensor"),
        (torch.ones(0), ValueError, "same number of examples"),
    ],
)
def test_bad_batches(batch: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        accumulate(lambda p, b: p, micro_batches=2)(torch.ones(1), batch)


def test_what_is_no_tensor_cannot_be_added_up() -> None:
    with pytest.raises(TypeError, match=r"leaf '1' of that is the number 2\.0|leaf '1' of that"):
        accumulate(lambda p, b: (p, 2.0), micro_batches=2)(torch.ones(1), torch.ones(4))
