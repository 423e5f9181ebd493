"""``torch.optim`` with ``fused=True``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import each_optimizer as each_workload
from benchmarks.adam_step import Problem
from benchmarks.sides.torch_problem import tensors


def version() -> str:
    """Return the version of what is measured."""
    return f"torch {torch.__version__}"


def adam_step(problem: Problem) -> Callable[[], list[Tensor]]:
    """Return a function that takes one step in place."""
    params = tensors(problem.params, problem.device, requires_grad=True)
    for param, grad in zip(params, tensors(problem.grads, problem.device)):
        param.grad = grad
    adam = problem.adam
    optimizer = torch.optim.Adam(params, adam.lr, betas=adam.betas, eps=adam.eps, fused=True)

    def work() -> list[Tensor]:
        optimizer.step()
        return params

    return work


def each_optimizer(
    problem: each_workload.Problem, **implementation: bool
) -> Callable[[], list[Tensor]]:
    """Return a function that takes one step in place, fused if nothing else is said."""
    params = tensors(problem.params, requires_grad=True)
    for param, grad in zip(params, tensors(problem.grads)):
        param.grad = grad
    kind = getattr(torch.optim, problem.name)
    optimizer = kind(params, **problem.arguments, **(implementation or {"fused": True}))

    def work() -> list[Tensor]:
        optimizer.step()
        return params

    return work
