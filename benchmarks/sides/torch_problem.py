"""Problems as torch sides need them: a network, tensors and a loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.meta_step import Problem
from benchmarks.networks import AdamNumbers, Layer


@dataclasses.dataclass(frozen=True)
class Task:
    """Samples of one task: what the inner loop sees, and what it is judged by."""

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor


@dataclasses.dataclass(frozen=True)
class TorchProblem:
    """The problem of a meta-step in torch; ``samples`` has the tasks as the first axis."""

    network: nn.Module
    tasks: list[Task]
    samples: Task
    adam: AdamNumbers
    steps: int
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy


def in_torch(problem: Problem) -> TorchProblem:
    """Return the problem with its network and data on the device."""
    network = nn.Sequential(*(_module(layer) for layer in problem.layers))
    network.to(problem.device, torch.from_numpy(problem.weights[0]).dtype)
    with torch.no_grad():
        for param, weight in zip(network.parameters(), problem.weights, strict=True):
            param.copy_(torch.from_numpy(weight))
    arrays = [problem.support_x, problem.support_y, problem.query_x, problem.query_y]
    samples = tensors(arrays, problem.device)
    tasks = [Task(*columns) for columns in zip(*samples)]
    return TorchProblem(network, tasks, Task(*samples), problem.adam, problem.steps)


def learned_rates(number: float, form: str, params: Sequence[Tensor]) -> list[Tensor]:
    """Return leaves for the rates of a form: one, one for each parameter, or one for each entry."""
    if form == "scalar":
        params = params[:1]
    return [
        torch.full(
            p.shape if form == "entry" else (),
            number,
            dtype=p.dtype,
            device=p.device,
            requires_grad=True,
        )
        for p in params
    ]


def batched_meta_step(
    problem: Problem,
    begin: Callable[[dict[str, Tensor]], Any],
    step: Callable[[dict[str, Tensor], Any, dict[str, Tensor]], tuple[dict[str, Tensor], Any]],
) -> Callable[[], list[Tensor]]:
    """Return a function that computes the meta-gradient of all tasks in one batch by ``vmap``.

    Args:
        problem: The tasks.
        begin: Returns the state of the inner optimizer for the initial parameters.
        step: Returns parameters and state after a step, from gradients, state and parameters.
    """
    built = in_torch(problem)
    net, loss, samples = built.network, built.loss, built.samples
    initial = {name: p.detach() for name, p in net.named_parameters()}

    def loss_of(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss(torch.func.functional_call(net, params, (x,)), y)

    def outer_loss(params: dict[str, Tensor], *task: Tensor) -> Tensor:
        state = begin(params)
        for _ in range(built.steps):
            grads = torch.func.grad(loss_of)(params, *task[:2])
            params, state = step(grads, state, params)
        return loss_of(params, *task[2:])

    of_each_task = torch.func.vmap(torch.func.grad(outer_loss), in_dims=(None, 0, 0, 0, 0))

    def work() -> list[Tensor]:
        grads = of_each_task(
            initial, samples.support_x, samples.support_y, samples.query_x, samples.query_y
        )
        return [g.sum(0) for g in grads.values()]

    return work


def tensors(
    arrays: Sequence[np.ndarray], device: str = "cpu", requires_grad: bool = False
) -> list[Tensor]:
    """Return new tensors with the numbers of the arrays."""
    return [torch.tensor(a, device=device, requires_grad=requires_grad) for a in arrays]


def _module(layer: Layer) -> nn.Module:
    kind, *sizes = layer
    if kind == "linear":
        return nn.Linear(*sizes)
    if kind == "conv":
        return nn.Conv2d(*sizes, 3, padding=1, bias=False)
    if kind == "norm":
        return nn.BatchNorm2d(*sizes)
    if kind == "image":
        return nn.Unflatten(1, (1, 28, 28))
    return {"relu": nn.ReLU(), "tanh": nn.Tanh(), "pool": nn.MaxPool2d(2), "flatten": nn.Flatten()}[
        kind
    ]
