"""A loop differentiated by this library, in each of its ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad

import torchopt
from benchmarks.unroll_problems import Problem
from torchopt.diff import (
    Checkpointed,
    FirstOrder,
    Forward,
    Mixed,
    Truncated,
    Unrolled,
    grad_and_value,
    unroll,
)


ADJOINTS: dict[str, Any] = {
    "Unrolled()": Unrolled(),
    "Checkpointed()": Checkpointed(),
    'Checkpointed("sqrt")': Checkpointed("sqrt"),
    'Checkpointed("log")': Checkpointed("log"),
    'Checkpointed("revolve")': Checkpointed("revolve"),
    'Checkpointed("sqrt", graphs=1)': Checkpointed("sqrt", graphs=1),
    'Checkpointed("revolve", graphs=4)': Checkpointed("revolve", graphs=4),
    "Mixed()": Mixed(),
    "Forward()": Forward(),
    "Truncated(16)": Truncated(16),
    "FirstOrder()": FirstOrder(),
}

#: How the ways are called that adapt the module itself.
IN_BLOCK = "inner_loop, "


def differentiated(
    problem: Problem, way: str, compiler: Callable[[Any], Any] = lambda step: step
) -> Callable[[int], list[Tensor]]:
    """Return a function of a number of steps that computes the derivatives.

    Args:
        problem: The loop.
        way: How it is differentiated.
        compiler: What is made of the step.
    """
    if way.startswith(IN_BLOCK):
        return _in_block(problem, ADJOINTS[way.removeprefix(IN_BLOCK)])
    names = [name for name, _ in problem.net.named_parameters()]
    start: list[Tensor] = list(problem.net.parameters())
    by = problem.by
    if way == "Forward()":  # is for few numbers: the start is a constant
        start, by = [p.detach() for p in start], [problem.lr]
    tx = _transformation(problem)

    def called(function: Callable[[Any], Tensor]) -> Callable[[list[Tensor]], Tensor]:
        # the loss calls the network; here with other parameters
        return lambda params: function(
            lambda *args: functional_call(problem.net, dict(zip(names, params)), args)
        )

    loss, outer = called(problem.loss), called(problem.outer)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        params, state = carry
        grads = grad_and_value(loss)(params)[0] if way == "Mixed()" else grad(loss)(params)
        if tx is None:
            return ([p - problem.lr * g for p, g in zip(params, grads)], None), None
        return tx.apply_gradients(grads, state, params, inplace=False), None

    compiled = compiler(step)

    def run(length: int) -> list[Tensor]:
        carry = start, None if tx is None else tx.init(start)
        (last, _), _ = unroll(compiled, carry, length=length, adjoint=ADJOINTS[way])
        # by the start Truncated() has no derivative
        return list(torch.autograd.grad(outer(last), by, materialize_grads=True))

    return run


def _transformation(problem: Problem) -> torchopt.GradientTransformation | None:
    """Return Adam; plain gradient descent is written out by every side."""
    return torchopt.adam(problem.lr) if problem.optimizer == "adam" else None


def _in_block(problem: Problem, adjoint: Any) -> Callable[[int], list[Tensor]]:
    net, tx = problem.net, _transformation(problem) or torchopt.sgd(problem.lr)
    by = problem.by

    def run(length: int) -> list[Tensor]:
        with torchopt.inner_loop(net, tx, adjoint=adjoint) as inner:
            for _ in range(length):
                inner.step(lambda: problem.loss(net))
            return list(torch.autograd.grad(problem.outer(net), by))

    return run
