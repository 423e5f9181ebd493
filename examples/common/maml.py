"""Model-agnostic meta-learning (Finn, Abbeel and Levine, 2017) over the functional face.

A task is learned by a few steps of an inner optimizer from shared initial weights; the initial
weights (and, if wanted, the inner learning rates) are trained so that this works well. Tasks of a
batch are adapted side by side by ``torch.func.vmap``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import torchopt
from common.command import Estimate
from common.episodes import EpisodeSampler, Task


INNER_OPTIMIZERS: dict[str, Callable[..., torchopt.GradientTransformation]] = {
    "sgd": torchopt.sgd,
    "adam": torchopt.adam,
    "rmsprop": torchopt.rmsprop,
}
Params = dict[str, Tensor]


@dataclass
class Learner:
    """How a network learns one task.

    Attributes:
        network: Gives the shape of the computation; its own weights are not read.
        optimizer: A key of ``INNER_OPTIMIZERS``.
        first_order: Treat inner gradients as constants when differentiating through the steps.
    """

    network: nn.Module
    optimizer: str
    first_order: bool = False

    def adapt(self, params: Params, rates: Params, x: Tensor, y: Tensor, steps: int) -> Params:
        """Return the weights after ``steps`` inner steps on a support set.

        Args:
            params: Initial weights by name.
            rates: One inner learning rate for each weight, a scalar tensor.
            x: Images ``[count, 1, height, width]``.
            y: Labels ``[count]``.
            steps: Number of inner steps.
        """
        tx = INNER_OPTIMIZERS[self.optimizer](lr=rates)
        state = tx.init(params)
        for _ in range(steps):
            grads = grad(self.loss)(params, x, y)
            if self.first_order:
                grads = {name: g.detach() for name, g in grads.items()}
            updates, state = tx.update(grads, state, params, inplace=False)
            params = torchopt.apply_updates(params, updates, inplace=False)
        return params

    def loss(self, params: Params, x: Tensor, y: Tensor) -> Tensor:
        """Return the mean cross-entropy."""
        return F.cross_entropy(functional_call(self.network, params, (x,)), y)

    def outcome(
        self, params: Params, rates: Params, task: Task, steps: int
    ) -> tuple[Tensor, Tensor]:
        """Return query loss and accuracy after adaptation, ``[tasks]`` each."""

        def one(sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> tuple[Tensor, Tensor]:
            adapted = self.adapt(params, rates, sx, sy, steps)
            logits = functional_call(self.network, adapted, (qx,))
            hits = (logits.argmax(-1) == qy).to(logits.dtype).mean()
            return F.cross_entropy(logits, qy), hits

        return vmap(one)(task.support_x, task.support_y, task.query_x, task.query_y)


@dataclass
class Accuracy:
    """Accuracy in percent on each task, or the difference of two on the same tasks.

    Attributes:
        values: One number for each task, in double precision.
    """

    values: Tensor

    @property
    def mean(self) -> float:
        """The mean over tasks."""
        return self.values.mean().item()

    @property
    def half_width(self) -> float:
        """Half the width of the 95 % interval of the mean; of a single task unknown (nan)."""
        if len(self.values) < 2:
            return math.nan
        return 1.96 * self.values.std().item() / math.sqrt(len(self.values))

    @property
    def estimate(self) -> Estimate:
        """Mean and interval."""
        return Estimate(self.mean, self.half_width, len(self.values))

    def __sub__(self, other: Accuracy) -> Accuracy:
        return Accuracy(self.values - other.values)

    def __str__(self) -> str:
        return f"{self.estimate:.1f} %"

    def summary(self) -> dict[str, Any]:
        """Return what is kept of it in a file."""
        return {"mean": self.mean, "half_width": self.half_width, "tasks": len(self.values)}


def measured_accuracy(
    learner: Learner,
    params: Params,
    rates: Params,
    sampler: EpisodeSampler,
    steps: int,
    tasks: int,
    at_once: int = 20,
) -> Accuracy:
    """Adapt to ``tasks`` tasks and return the accuracy on their query sets."""
    device = next(iter(params.values())).device
    results = []
    with torch.no_grad():  # the inner gradients are taken all the same; nothing else is recorded
        for start in range(0, tasks, at_once):
            batch = sampler.sample_batch(min(at_once, tasks - start)).to(device)
            results.append(learner.outcome(params, rates, batch, steps)[1])
    return Accuracy(100 * torch.cat(results).cpu().double())


def initial_rates(params: Params, value: float) -> Params:
    """Return one scalar learning rate for each weight."""
    return {name: torch.tensor(value, device=p.device) for name, p in params.items()}
