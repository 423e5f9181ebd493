"""The meta-step of MAML with inner Adam.

For each of four tasks: five steps of Adam on the loss of the support samples, from the same initial
parameters; then the backward pass of the loss of the query samples to the initial parameters,
added up over the tasks.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from benchmarks.networks import (
    ADAM,
    NETWORKS,
    AdamNumbers,
    Layer,
    initial_weights,
    inputs_of,
    samples,
)
from benchmarks.rows import Case, Row


#: Name of a comparison -> options. The first two are of the same work on every side; with the
#: numbers that are timed ``higher`` does another division (see networks.py).
CHECKS = {
    "float64": {"dtype": "float64", "adam": "compared"},
    "float32": {"dtype": "float32", "adam": "compared"},
    "float64, as timed": {"dtype": "float64", "adam": "timed"},
}


@dataclasses.dataclass(frozen=True)
class Problem:
    """One network and its tasks, as arrays; the first axis of the samples is the task."""

    layers: tuple[Layer, ...]
    weights: list[np.ndarray]
    support_x: np.ndarray
    support_y: np.ndarray
    query_x: np.ndarray
    query_y: np.ndarray
    adam: AdamNumbers
    steps: int
    device: str


def problem(
    network: str,
    tasks: int = 4,
    steps: int = 5,
    dtype: str = "float32",
    adam: str = "timed",
    device: str = "cpu",
) -> Problem:
    """Return the problem of the named network."""
    layers = NETWORKS[network]
    weights = initial_weights(layers, np.random.default_rng(0))
    support_x, support_y, query_x, query_y = samples(
        tasks, inputs_of(layers), np.random.default_rng(1)
    )
    return Problem(
        layers,
        [w.astype(dtype) for w in weights],
        support_x.astype(dtype),
        support_y,
        query_x.astype(dtype),
        query_y,
        ADAM[adam],
        steps,
        device,
    )


MLP = Case("meta-step mlp", "meta_step", {"network": "mlp"}, CHECKS)
WIDE = Case("meta-step wide", "meta_step", {"network": "wide"}, CHECKS)
CONV = Case("meta-step conv", "meta_step", {"network": "conv"}, CHECKS)
ROWS = [
    Row("meta-mlp", MLP, "torchopt", "floor", 1.25, at_most=True),
    Row("meta-mlp", MLP, "higher", "torchopt", 2.6),
    Row("meta-mlp", MLP, "higher", "floor", None),
    Row("meta-mlp", MLP, "torchopt-0.7.3", "torchopt", 2.4),
    Row("meta-mlp", MLP, "torchopt-0.7.3", "floor", None),
    Row("meta-wide", WIDE, "torchopt", "floor", 1.25, at_most=True),
    Row("meta-wide", WIDE, "higher", "torchopt", 1.5),
    Row("meta-wide", WIDE, "higher", "floor", None),
    Row("meta-wide", WIDE, "torchopt-0.7.3", "torchopt", 1.5),
    Row("meta-wide", WIDE, "torchopt-0.7.3", "floor", None),
    Row("meta-wide", WIDE, "optax", "torchopt", 1.3),
    Row("meta-wide", WIDE, "optax", "floor", None),
    Row("meta-conv", CONV, "torchopt", "floor", 1.03, at_most=True),
]
