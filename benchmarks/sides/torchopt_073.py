"""TorchOpt 0.7.3 from the package index: ``MetaAdam`` with extracted and recovered states."""

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
    optimizer = torchopt.MetaAdam(net, adam.lr, betas=adam.betas, eps=adam.eps)

    def meta_step() -> list[Tensor]:
        net.zero_grad()
        net_state = torchopt.extract_state_dict(net, by="reference", detach_buffers=True)
        optimizer_state = torchopt.extract_state_dict(optimizer, by="reference")
        for task in problem.tasks:
            for _ in range(INNER_STEPS):
                optimizer.step(loss(net(task.support_x), task.support_y))
            loss(net(task.query_x), task.query_y).backward()
            torchopt.recover_state_dict(net, net_state)
            torchopt.recover_state_dict(optimizer, optimizer_state)
        return [p.grad for p in initial]

    return meta_step
