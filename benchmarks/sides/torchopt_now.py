"""This library: ``MetaAdam`` inside ``torchopt.inner_loop``, without fused kernels."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

import torchopt
from benchmarks.problems import INNER_STEPS, Problem


def version() -> str:
    """Return the version of what is measured."""
    return f"torchopt {torchopt.__version__}"


def prepare(problem: Problem) -> Callable[[], list[Tensor]]:
    """Return a function that computes one meta-gradient."""
    net, loss, adam = problem.network, problem.loss, problem.adam
    initial = list(net.parameters())
    optimizer = torchopt.MetaAdam(
        net, adam.lr, betas=adam.betas, eps=adam.eps, use_accelerated_op=False
    )

    def meta_step() -> list[Tensor]:
        net.zero_grad()
        for task in problem.tasks:
            with torchopt.inner_loop(net, optimizer) as inner:
                for _ in range(INNER_STEPS):
                    inner.step(loss(net(task.support_x), task.support_y))
                loss(net(task.query_x), task.query_y).backward()
        return [p.grad for p in initial]

    return meta_step
