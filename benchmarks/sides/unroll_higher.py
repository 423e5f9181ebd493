"""The same loops by ``higher`` 0.2.1, which records them."""

from __future__ import annotations

from collections.abc import Callable

import higher
import torch
from torch import Tensor

from benchmarks.unroll_problems import Problem


def differentiated(problem: Problem, way: str) -> Callable[[int], list[Tensor]]:
    """Return a function of a number of steps that computes the derivatives."""
    if problem.optimizer != "sgd":
        raise ValueError("higher's Adam is another one: the results could not be compared.")
    by = problem.by
    optimizer = torch.optim.SGD(problem.net.parameters(), lr=problem.lr.item())

    def run(length: int) -> list[Tensor]:
        with higher.innerloop_ctx(
            problem.net, optimizer, copy_initial_weights=False, override={"lr": [problem.lr]}
        ) as (net, inner):
            for _ in range(length):
                inner.step(problem.loss(net))
            return list(torch.autograd.grad(problem.outer(net), by))

    return run
