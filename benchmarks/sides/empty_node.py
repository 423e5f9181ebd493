"""One node of the graph that computes nothing, between the inputs and outputs of an update.

What is left is what ``torch.autograd`` itself costs: a node with an edge for each input and output,
and ``torch.autograd.grad`` over all of them. The tensors are allocated, for every update must.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.sides.torch_problem import tensors
from benchmarks.update_alone import Problem


def version() -> str:
    """Return the version of what is measured."""
    return f"torch {torch.__version__}"


class _Empty(torch.autograd.Function):
    """Gradients, parameters and two slots of each to new parameters and slots."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.count = len(inputs) // 4
        return tuple(map(torch.empty_like, inputs[ctx.count :]))

    @staticmethod
    def backward(ctx: Any, *bars: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        by_grads_and_slots = tuple(map(torch.empty_like, bars))
        n = ctx.count
        return (*by_grads_and_slots[:n], *bars[:n], *by_grads_and_slots[n:])


def update_alone(problem: Problem) -> Callable[[], list[Tensor]]:
    """Return a function that goes through the node and back."""
    columns = (problem.grads, problem.params, problem.first_moments, problem.second_moments)
    inputs = [x for c in columns for x in tensors(c, requires_grad=True)]
    coefficients = [c for column in problem.coefficients for c in tensors(column)]

    def work() -> list[Tensor]:
        return list(torch.autograd.grad(_Empty.apply(*inputs), inputs, coefficients))

    return work
