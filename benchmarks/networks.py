"""The networks and data of the meta-step, as arrays, so that every side starts from the same ones.

Only NumPy: the sides that use JAX have no torch. Everything is drawn in float64 and rounded, so
that both precisions have the same weights and data.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np


#: A kind, and the numbers that it takes.
Layer = tuple[Any, ...]
CLASSES = 5
SUPPORT, QUERY = 25, 75


@dataclasses.dataclass(frozen=True)
class AdamNumbers:
    """The numbers of Adam."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


#: The numbers of Adam by name. What is timed are the defaults of every side. What is compared
#: first: ``higher`` adds ``eps`` to the root of the second moment before its bias correction, the
#: others after it; with a beta2 of 0 there is none. And with the default ``eps`` entries with a
#: gradient of its size have derivatives of about ``1 / eps``, which drown all others, rounding
#: errors included.
ADAM = {
    "timed": AdamNumbers(),
    "compared": AdamNumbers(betas=(0.9, 0.0), eps=1e-2),
    "smooth": AdamNumbers(betas=(0.9, 0.99), eps=1e-2),
}


def dense(*widths: int, activation: str = "relu") -> tuple[Layer, ...]:
    """Return linear layers of these widths with an activation between them."""
    layers: list[Layer] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [("linear", fan_in, fan_out), (activation,)]
    return tuple(layers[:-1])


def blocks(*channels: int) -> tuple[Layer, ...]:
    """Return convolutional blocks that end in one pixel, and a classifier.

    The convolutions have no bias: before the normalisation its true gradient is zero, so Adam would
    normalise rounding noise and no two sides could agree.
    """
    layers: list[Layer] = [("image",)]
    for fan_in, fan_out in itertools.pairwise(channels):
        layers += [("conv", fan_in, fan_out), ("norm", fan_out), ("relu",), ("pool",)]
    return (*layers, ("flatten",), ("linear", channels[-1], CLASSES))


NETWORKS = {
    # many small parameters, so what each parameter costs dominates
    "mlp": dense(784, *[64] * 8, CLASSES),
    # few large parameters, so passes over memory dominate
    "wide": dense(784, 1024, 1024, CLASSES),
    # the network of MAML: the arithmetic of the network dominates
    "conv": blocks(1, 64, 64, 64, 64),
    # for tests of this harness
    "tiny": dense(6, 8, CLASSES),
    # the same without the kinks that would spoil central differences
    "smooth": dense(6, 8, CLASSES, activation="tanh"),
}


def initial_weights(layers: tuple[Layer, ...], generator: np.random.Generator) -> list[np.ndarray]:
    """Return the parameters in torch's order and shapes, drawn as torch draws them."""
    weights: list[np.ndarray] = []
    for kind, *sizes in layers:
        if kind == "linear":
            bound = 1 / math.sqrt(sizes[0])
            weights.append(generator.uniform(-bound, bound, (sizes[1], sizes[0])))
            weights.append(generator.uniform(-bound, bound, sizes[1]))
        elif kind == "conv":
            bound = 1 / math.sqrt(9 * sizes[0])
            weights.append(generator.uniform(-bound, bound, (sizes[1], sizes[0], 3, 3)))
        elif kind == "norm":
            weights += [np.ones(sizes[0]), np.zeros(sizes[0])]
    return weights


def inputs_of(layers: tuple[Layer, ...]) -> int:
    """Return how many numbers a sample has."""
    kind, *sizes = layers[0]
    return 784 if kind == "image" else sizes[0]


def samples(
    tasks: int, inputs: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return what each task learns from and what it is judged by; the first axis is the task.

    Classes lie around random centres: learnable, with a loss that is neither zero nor stuck.
    """
    centres = generator.standard_normal((tasks, CLASSES, inputs))

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(count) % CLASSES
        noise = generator.standard_normal((tasks, count, inputs))
        return centres[:, labels] + noise, np.tile(labels, (tasks, 1))

    return (*draw(SUPPORT), *draw(QUERY))
