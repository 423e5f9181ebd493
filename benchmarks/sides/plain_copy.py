"""Copies: what the memory of the device can do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.adam_step import Problem
from benchmarks.sides.torch_problem import tensors


def version() -> str:
    """Return the version of what is measured."""
    return f"torch {torch.__version__}"


def adam_step(problem: Problem) -> Callable[[], list[Tensor]]:
    """Return a function that copies the gradients over the parameters."""
    params = tensors(problem.params, problem.device)
    grads = tensors(problem.grads, problem.device)

    def work() -> list[Tensor]:
        torch._foreach_copy_(params, grads)
        return params

    return work
