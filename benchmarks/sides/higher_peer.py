"""The library ``higher`` 0.2.1: ``innerloop_ctx`` around ``torch.optim.Adam``."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version as installed_version

import higher
import torch
from torch import Tensor

from benchmarks import learned_step as learned_workload
from benchmarks.meta_step import Problem
from benchmarks.sides.torch_problem import in_torch, learned_rates


def version() -> str:
    """Return the version of what is measured."""
    return f"higher {installed_version('higher')}, torch {torch.__version__}"


def meta_step(problem: Problem) -> Callable[[], list[Tensor]]:
    """Return a function that computes one meta-gradient."""
    built = in_torch(problem)
    net, loss, adam = built.network, built.loss, built.adam
    initial = list(net.parameters())
    optimizer = torch.optim.Adam(initial, adam.lr, betas=adam.betas, eps=adam.eps)

    def work() -> list[Tensor]:
        net.zero_grad()
        for task in built.tasks:
            with higher.innerloop_ctx(
                net, optimizer, copy_initial_weights=False, track_higher_grads=True
            ) as (fast_net, inner):
                for _ in range(built.steps):
                    inner.step(loss(fast_net(task.support_x), task.support_y))
                loss(fast_net(task.query_x), task.query_y).backward()
        return [p.grad for p in initial]

    return work


def learned_step(problem: learned_workload.Problem) -> Callable[[], list[Tensor]]:
    """Return a function that computes one meta-gradient, by parameters and learned rates.

    ``higher`` takes a list of rates, one for each parameter group.
    """
    built = in_torch(problem.meta)
    net, loss, adam = built.network, built.loss, built.adam
    initial = list(net.parameters())
    rates = learned_rates(adam.lr, problem.form, initial)
    if problem.form == "entry":
        raise ValueError("higher knows no rates of entries")
    groups = [{"params": [p]} for p in initial]
    if problem.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=adam.lr)
    else:
        optimizer = torch.optim.Adam(groups, adam.lr, betas=adam.betas, eps=adam.eps)
    leaves = [*initial, *rates]
    override = {"lr": rates if problem.form == "parameter" else rates * len(groups)}

    def work() -> list[Tensor]:
        for x in leaves:
            x.grad = None
        for task in built.tasks:
            with higher.innerloop_ctx(
                net, optimizer, copy_initial_weights=False, override=override
            ) as (fast_net, inner):
                for _ in range(built.steps):
                    inner.step(loss(fast_net(task.support_x), task.support_y))
                loss(fast_net(task.query_x), task.query_y).backward()
        return [x.grad for x in leaves]

    return work


#: It has no functional API, so its tasks come one after the other here too.
vmap_step = meta_step
