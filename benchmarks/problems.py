"""The networks and data of the meta-step; pure torch, so that every side can import it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn


TASKS = 4
INNER_STEPS = 5
SUPPORT, QUERY = 25, 75
CLASSES = 5


@dataclasses.dataclass(frozen=True)
class AdamNumbers:
    """The numbers of inner Adam."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


#: What is timed: the defaults of every side.
TIMED = AdamNumbers()
#: What is compared first. ``higher`` adds ``eps`` to the root of the second moment before its bias
#: correction, ``torch.optim`` and ``torchopt`` after it; with a beta2 of 0 there is none. And with
#: the default ``eps`` entries with a gradient of its size have derivatives of about ``1 / eps``,
#: which drown all others, rounding errors included.
COMPARED = AdamNumbers(betas=(0.9, 0.0), eps=1e-2)


@dataclasses.dataclass(frozen=True)
class Task:
    """Samples of one task: what the inner loop sees, and what it is judged by."""

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor


@dataclasses.dataclass(frozen=True)
class Problem:
    """One network and its tasks, the same on every side.

    The meta-step that a side computes: for each task, :data:`INNER_STEPS` steps of Adam on
    ``loss(net(support_x), support_y)`` from the same initial parameters, then the backward pass of
    ``loss(net(query_x), query_y)`` to the initial parameters, added up over the tasks.
    """

    network: nn.Module
    tasks: list[Task]
    adam: AdamNumbers = TIMED
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy


def mlp() -> nn.Module:
    """784-64x8-5: many small parameters, so what each parameter costs dominates."""
    widths = [784] + [64] * 8
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(64, CLASSES))


def wide() -> nn.Module:
    """784-1024-1024-5: few large parameters, so passes over memory dominate."""
    return nn.Sequential(
        nn.Linear(784, 1024),
        nn.ReLU(),
        nn.Linear(1024, 1024),
        nn.ReLU(),
        nn.Linear(1024, CLASSES),
    )


def conv() -> nn.Module:
    """Four blocks of 64 channels, the network of MAML: the arithmetic of the network dominates.

    The convolutions have no bias: before BatchNorm its true gradient is zero, so Adam would
    normalise rounding noise and no two sides could agree.
    """
    layers: list[nn.Module] = []
    for channels in (1, 64, 64, 64):
        layers += [
            nn.Conv2d(channels, 64, 3, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    return nn.Sequential(nn.Unflatten(1, (1, 28, 28)), *layers, nn.Flatten(), nn.Linear(64, 5))


NETWORKS = {"mlp": mlp, "wide": wide, "conv": conv}


def build(
    name: str,
    dtype: torch.dtype = torch.float32,
    adam: AdamNumbers = TIMED,
    seed: int = 0,
) -> Problem:
    """Return the named problem.

    Drawn in float64 and rounded, so that both precisions have the same weights and data.
    """
    torch.manual_seed(seed)
    network = NETWORKS[name]().to(dtype)
    generator = torch.Generator().manual_seed(seed + 1)
    return Problem(network, [_task(generator, dtype) for _ in range(TASKS)], adam)


def _task(generator: torch.Generator, dtype: torch.dtype) -> Task:
    """Draw classes around random centres: learnable, with a loss that is neither 0 nor stuck."""
    centres = torch.randn(CLASSES, 784, generator=generator, dtype=torch.float64)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(count) % CLASSES
        noise = torch.randn(count, 784, generator=generator, dtype=torch.float64)
        return (centres[labels] + noise).to(dtype), labels

    return Task(*draw(SUPPORT), *draw(QUERY))
