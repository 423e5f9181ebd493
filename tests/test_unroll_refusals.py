"""Loops that were meant otherwise: what was given, what was expected, what to type."""

from __future__ import annotations

from typing import Any

import pytest
import torch
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


W = torch.tensor([0.1, 0.2], requires_grad=True)
HALF = torch.tensor(0.5)
A3: Any = 3  # what a type checker would refuse
A_HALF: Any = 0.5
A_WORD: Any = "log"
A_CLASS: Any = Unrolled


def no_y(w: Any, _: Any) -> Any:
    return w, None


ANY_ADJOINT = {
    "no function": (lambda: unroll(A3, W, length=2), TypeError, "must be a function.*got int: 3"),
    "no pair": (lambda: unroll(lambda w, _: w, W, length=2), TypeError, r"return \(carry, None\)"),
    "structure": (
        lambda: unroll(lambda w, _: ({"v": w["w"]}, None), {"w": W}, length=2),
        ValueError, "structure that it was given: 'w' is missing",
    ),
    "one more": (
        lambda: unroll(lambda w, _: ([*w, W], None), [W], length=2),
        ValueError, "'1' was not expected",
    ),
    "shape": (
        lambda: unroll(lambda w, _: ({"w": w["w"][:1]}, None), {"w": W}, length=2),
        ValueError, r"leaf 'w' of the carry: it was float32\[2\].* and is float32\[1\]",
    ),
    "dtype": (
        lambda: unroll(lambda w, _: (w.double(), None), W, length=2), ValueError, "float64",
    ),
    "number to tensor": (
        lambda: unroll(lambda c, _: ((c[0], c[1] * HALF), None), (W, 0.1), length=2),
        TypeError, r"leaf '1' of the carry.*torch\.tensor\(0\.1\)",
    ),
    "no length": (lambda: unroll(no_y, W), ValueError, "length=n"),
    "lengths differ": (
        lambda: unroll(no_y, W, {"a": torch.ones(3), "b": torch.ones(4)}),
        ValueError, "leaf 'a' of xs: 3, leaf 'b' of xs: 4",
    ),
    "length and xs": (
        lambda: unroll(no_y, W, torch.ones(3), length=4), ValueError, "length: 4, xs: 3",
    ),
    "length is no number": (lambda: unroll(no_y, W, length=A_HALF), TypeError, "float: 0.5"),
    "no steps": (lambda: unroll(no_y, W, length=0), ValueError, "at least one step, got 0"),
    "xs of numbers": (
        lambda: unroll(no_y, W, [1.0, 2.0]), TypeError, "leaf '0' of xs must be a tensor",
    ),
    "xs of a number": (lambda: unroll(no_y, W, HALF), TypeError, "got a 0-d tensor"),
    "y is text": (lambda: unroll(lambda w, _: (w, "a"), W, length=2), TypeError, "str: 'a'"),
    "y changes": (
        lambda: unroll(lambda n, _: (n + 1, [HALF] * n), 1, length=2),
        ValueError, "y of the same structure",
    ),
    "a class": (lambda: unroll(no_y, W, length=2, adjoint=A_CLASS), TypeError, "class Unrolled"),
    "text": (
        lambda: unroll(no_y, W, length=2, adjoint=A_WORD), TypeError, r"Checkpointed\(\), got str",
    ),
}  # fmt: skip

ARGUMENTS = {
    "every 0": (lambda: Checkpointed(0), ValueError, "every must be >= 1, got 0"),
    "every half": (lambda: Checkpointed(A_HALF), TypeError, "float: 0.5"),
    "every word": (lambda: Checkpointed("cube"), ValueError, "'sqrt', 'log', 'revolve'.*'cube'"),
    "slots 0": (lambda: Checkpointed("revolve", slots=0), ValueError, "slots must be >= 1"),
    "slots of sqrt": (lambda: Checkpointed("sqrt", slots=3), ValueError, 'every="revolve"'),
    "slots half": (lambda: Checkpointed("revolve", slots=A_HALF), TypeError, "slots"),
    "graphs": (lambda: Checkpointed(graphs=0), ValueError, "graphs must be >= 1, got 0"),
    "store": (lambda: Checkpointed(store="disc"), ValueError, "'memory', 'cpu'.*'disc'"),
    "plan": (lambda: Checkpointed().plan(0), ValueError, "length must be >= 1, got 0"),
    "last": (lambda: Truncated(0), ValueError, "last must be >= 1, got 0"),
    "last true": (lambda: Truncated(True), TypeError, "bool"),
    "most": (lambda: Forward(most=0), ValueError, "most must be >= 1"),
    "memory": (lambda: Auto("much"), ValueError, '"2GiB".*much'),
    "memory 0": (lambda: Auto(0), ValueError, "positive"),
    "memory of": (lambda: Auto(A_CLASS), TypeError, "class"),
}


@pytest.mark.parametrize("name", [*ANY_ADJOINT, *ARGUMENTS])
def test_calls_that_cannot_be_meant(name: str) -> None:
    call, error, text = {**ANY_ADJOINT, **ARGUMENTS}[name]
    with pytest.raises(error, match=text):
        call()


# Steps that cannot be taken again ----------------------------------------------------------------


def grows(adjoint: Any = Checkpointed()) -> Any:  # noqa: B008
    def run(step: Any, carry: Any = W, **arguments: Any) -> Any:
        return unroll(step, carry, adjoint=adjoint, length=3, **arguments)

    return run


def test_a_carry_that_is_changed_in_place_is_named() -> None:
    with pytest.raises(ValueError, match=r"changes leaf 'w' of its carry in place.*clone"):
        grows()(lambda c, _: ({"w": c["w"].mul_(2)}, None), {"w": W})


def test_buffers_that_are_changed_in_place_are_named() -> None:
    net = nn.BatchNorm1d(2)
    with pytest.raises(ValueError, match=r"'net\.num_batches_tracked'.*functional_call"):
        grows()(lambda w, _: (w + net(w.expand(3, 2)).mean(0), None))


def test_tensors_from_outside_that_depend_on_each_other_are_named() -> None:
    class Own(torch.autograd.Function):
        """Nobody sees what it is given, so that nothing can be put in its place."""

        @staticmethod
        def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
            return x + y

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            return grads[0], grads[0].sum()

    log_lr = torch.tensor(0.1, requires_grad=True)
    rate = log_lr.exp()
    with pytest.raises(ValueError, match=r"over 'rate' and over 'log_lr'.*Function is given one"):
        grows()(lambda w, _: (Own.apply(w * rate, log_lr), None))


def test_nan_is_repeatable() -> None:
    w, _ = grows()(lambda w, _: (w * float("nan"), None))
    assert torch.isnan(w).all()
    assert torch.isnan(torch.autograd.grad(w.sum(), W)[0]).all()


def test_in_place_updates_of_an_optimizer_are_refused() -> None:
    tx = torchopt.sgd(0.1)

    def step(carry: Any, _: None) -> Any:
        w, state = carry
        updates, state = tx.update(w, state)
        return (w + updates, state), None

    with pytest.raises(RuntimeError, match="inplace=False"):
        grows()(step, (W, tx.init(W.detach())))


# What an adjoint cannot do -----------------------------------------------------------------------


def test_forward_names_an_operation_without_a_forward_derivative() -> None:
    class Own(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return 2 * grads[0]

    def grid(w: Tensor, _: None) -> Any:
        image, where = w.expand(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
        return w + nn.functional.grid_sample(image, where, align_corners=True).mean(), None

    with pytest.raises(RuntimeError, match=r"grid_sampler_2d.*Checkpointed"):
        grows(Forward())(grid)
    with pytest.raises(RuntimeError, match=r"Own has no derivative in forward mode"):
        grows(Forward())(lambda w, _: (Own.apply(w), None))


def test_forward_is_for_few_numbers_and_plain_autograd() -> None:
    with pytest.raises(ValueError, match=r"by 2 numbers.*Checkpointed\(\).*most=2"):
        grows(Forward(most=1))(no_y)
    with pytest.raises(RuntimeError, match=r"torch\.func\.grad; this one calls torch\.autograd"):
        grows(Forward())(lambda w, _: (torch.autograd.grad((w**3).sum(), w)[0], None))
    with pytest.raises(RuntimeError, match="jacfwd"):
        torch.func.grad(lambda w: grows(Forward())(no_y, w)[0].sum())(W.detach())


def test_offloaded_says_where_hooks_are_not_allowed() -> None:
    run = grows(Offloaded())
    with pytest.raises(RuntimeError, match="Let the step call"):
        run(lambda w, _: (torch.func.grad(lambda w: (w**3).sum())(w), None))
    with pytest.raises(RuntimeError, match=r"inside torch\.func"):
        torch.func.grad(lambda w: run(no_y, w)[0].sum())(W.detach())


def test_auto_says_that_nothing_fits() -> None:
    with pytest.raises(ValueError, match="room for two"):
        unroll(lambda w, _: (w.sin(), None), W, length=100, adjoint=Auto(20))


def test_replaying_refuses_what_would_be_wrong() -> None:
    loss = lambda w: grows()(lambda w, _: (w.sin(), None), w)[0].sum()  # noqa: E731
    with pytest.raises(RuntimeError, match="two levels of forward mode"):
        torch.func.jvp(
            lambda w: torch.func.jvp(torch.func.grad(loss), (w,), (w,))[1],
            (W.detach(),),
            (W.detach(),),
        )
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="dual numbers"):
        loss(W)


def test_a_refused_loop_leaves_the_random_state() -> None:
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="in place"):
        grows()(lambda w, _: (w.mul_(torch.rand(2)), None))
    assert torch.equal(torch.get_rng_state(), before)


def test_first_order_has_no_derivative_by_what_reaches_the_inner_loss_only() -> None:
    decay = torch.tensor(0.5, requires_grad=True)
    step = lambda w, _: (w - torch.func.grad(lambda w: decay * w.sum())(w), None)  # noqa: E731
    w, _ = grows(FirstOrder())(step)
    assert torch.autograd.grad(w.sum(), decay, allow_unused=True) == (None,)
