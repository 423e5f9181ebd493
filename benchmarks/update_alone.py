"""One differentiable update of Adam, forward and backward, without any network.

What is differentiated is a fixed linear function of the new parameters and moments, with respect to
the gradients, the parameters and the moments.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from benchmarks.networks import ADAM, AdamNumbers
from benchmarks.rows import Case, Row


CHECKS = {"float64": {"dtype": "float64"}, "float32": {"dtype": "float32"}}


@dataclasses.dataclass(frozen=True)
class Problem:
    """The inputs of the update, and the coefficients of the linear function of its outputs."""

    grads: list[np.ndarray]
    params: list[np.ndarray]
    first_moments: list[np.ndarray]
    second_moments: list[np.ndarray]
    #: For the new parameters, first and second moments.
    coefficients: tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]
    #: How many steps have been taken before.
    step: int
    adam: AdamNumbers


def problem(tensors: int = 50, entries: int = 1000, dtype: str = "float32") -> Problem:
    """Return tensors of normal numbers; the second moments are squares of such."""
    generator = np.random.default_rng(0)

    def draw() -> list[np.ndarray]:
        return [generator.standard_normal(entries).astype(dtype) for _ in range(tensors)]

    grads, params, first, roots = draw(), draw(), draw(), draw()
    second = [root * root for root in roots]
    return Problem(
        grads, params, first, second, (draw(), draw(), draw()), step=3, adam=ADAM["timed"]
    )


ALONE = Case("update alone, 50 x 1000, forward + backward", "update_alone", {}, CHECKS, repeats=10)
ROWS = [
    Row("update", ALONE, "torchopt unfused", "torchopt", 6.0),
    Row("update", ALONE, "torchopt unfused", "empty node", None),
]
