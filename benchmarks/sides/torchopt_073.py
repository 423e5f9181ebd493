"""TorchOpt 0.7.3 from the package index: ``MetaAdam`` with extracted and recovered states."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import torchopt
from benchmarks.meta_step import Problem
from benchmarks.sides.torch_problem import in_torch


def version() -> str:
    """Return the version of what is measured."""
    return f"torchopt {torchopt.__version__}, torch {torch.__version__}"


def meta_step(problem: Problem) -> Callable[[], list[Tensor]]:
    """Return a function that computes one meta-gradient."""
    built = in_torch(problem)
    net, loss, adam = built.network, built.loss, built.adam
    initial = list(net.parameters())
    optimizer = torchopt.MetaAdam(net, adam.lr, betas=adam.betas, eps=adam.eps)

    def work() -> list[Tensor]:
        net.zero_grad()
        net_state = torchopt.extract_state_dict(net, by="reference", detach_buffers=True)
        optimizer_state = torchopt.extract_state_dict(optimizer, by="reference")
        for task in built.tasks:
            for _ in range(built.steps):
                optimizer.step(loss(net(task.support_x), task.support_y))
            loss(net(task.query_x), task.query_y).backward()
            torchopt.recover_state_dict(net, net_state)
            torchopt.recover_state_dict(optimizer, optimizer_state)
        return [p.grad for p in initial]

    return work
