"""``Adam.step`` in place, not differentiated, on gradients that stay the same."""

from __future__ import annotations

import dataclasses

import numpy as np

from benchmarks.networks import ADAM, AdamNumbers
from benchmarks.rows import Case, Row


CHECKS = {"float64": {"dtype": "float64"}, "float32": {"dtype": "float32"}}


@dataclasses.dataclass(frozen=True)
class Problem:
    """Parameters and their gradients."""

    params: list[np.ndarray]
    grads: list[np.ndarray]
    adam: AdamNumbers
    device: str


def problem(
    tensors: int, shape: tuple[int, ...], dtype: str = "float32", device: str = "cpu"
) -> Problem:
    """Return so many tensors of one shape."""
    generator = np.random.default_rng(0)

    def draw() -> list[np.ndarray]:
        return [generator.standard_normal(shape, "float32").astype(dtype) for _ in range(tensors)]

    return Problem(draw(), draw(), ADAM["timed"], device)


SMALL = Case(
    "Adam.step, 100 x (32, 32)",
    "adam_step",
    {"tensors": 100, "shape": (32, 32)},
    CHECKS,
    check_calls=3,
    repeats=50,
)
LARGE = Case(
    "Adam.step, 10 x 1 million",
    "adam_step",
    {"tensors": 10, "shape": (1000, 1000)},
    CHECKS,
    check_calls=3,
    repeats=5,
)
ROWS = [
    Row("adam-small", SMALL, "torch fused", "torchopt", 2.5),
    Row("adam-small", SMALL, "optax", "torchopt", 3.0),
    Row("adam-large", LARGE, "torch fused", "torchopt", 1.0),
]
