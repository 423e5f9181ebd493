"""The floor: the same meta-step with the cheapest update there is.

Not Adam: the raw gradient is scaled and added, in one call for all parameters. What is left is
what the network, its gradients and their backward pass cost, whoever computes the update.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.meta_step import Problem
from benchmarks.sides.torch_problem import Task, batched_meta_step, in_torch


def version() -> str:
    """Return the version of what is measured."""
    return f"torch {torch.__version__}"


def meta_step(problem: Problem) -> Callable[[], list[Tensor]]:
    """Return a function that computes one meta-gradient."""
    built = in_torch(problem)
    net, loss = built.network, built.loss
    initial = dict(net.named_parameters())
    names = list(initial)

    def adapt_and_judge(task: Task) -> Tensor:
        weights = list(initial.values())
        for _ in range(built.steps):
            fast = dict(zip(names, weights))
            value = loss(torch.func.functional_call(net, fast, task.support_x), task.support_y)
            grads = torch.autograd.grad(value, weights, create_graph=True)
            weights = torch._foreach_add(weights, grads, alpha=-built.adam.lr)
        fast = dict(zip(names, weights))
        return loss(torch.func.functional_call(net, fast, task.query_x), task.query_y)

    def work() -> list[Tensor]:
        net.zero_grad()
        for task in built.tasks:
            adapt_and_judge(task).backward()
        return [p.grad for p in initial.values()]

    return work


def vmap_step(problem: Problem) -> Callable[[], list[Tensor]]:
    """Return a function that computes the meta-gradient of all tasks in one batch."""

    def step(
        grads: dict[str, Tensor], state: None, params: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], None]:
        # one by one: foreach operators have no batching rule
        new = {n: torch.add(p, grads[n], alpha=-problem.adam.lr) for n, p in params.items()}
        return new, state

    return batched_meta_step(problem, lambda _: None, step)
