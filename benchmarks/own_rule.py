"""A rule of a user's own, ten lines that the library has never seen, fused and not.

It is Adam that halves the step of an entry whose gradient has turned against it. The functional
update is differentiated in the gradients, the parameters and the moments.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from benchmarks import update_alone
from benchmarks.rows import Case, Row


CHECKS = {"float64": {"dtype": "float64"}, "float32": {"dtype": "float32"}}


@dataclasses.dataclass(frozen=True)
class Problem:
    """The inputs of the update, and which API takes them."""

    numbers: update_alone.Problem
    in_place: bool


def problem(
    in_place: bool, tensors: int = 100, shape: tuple[int, ...] = (32, 32), dtype: str = "float32"
) -> Problem:
    """Return normal numbers; the second moments are squares of such."""
    flat = update_alone.problem(tensors, int(np.prod(shape)), dtype)

    def shaped(column: list[np.ndarray]) -> list[np.ndarray]:
        return [x.reshape(shape) for x in column]

    numbers = dataclasses.replace(
        flat,
        grads=shaped(flat.grads),
        params=shaped(flat.params),
        first_moments=shaped(flat.first_moments),
        second_moments=shaped(flat.second_moments),
        coefficients=tuple(map(shaped, flat.coefficients)),
    )
    return Problem(numbers, in_place)


STEP = Case(
    "own rule, in place, 100 x (32, 32)",
    "own_rule",
    {"in_place": True},
    CHECKS,
    check_calls=3,
    repeats=10,
)
UPDATE = Case(
    "own rule, forward + backward, 100 x (32, 32)",
    "own_rule",
    {"in_place": False},
    CHECKS,
    repeats=5,
)
ROWS = [
    Row("own-rule", STEP, "torchopt unfused", "torchopt", 4.0),
    Row("own-rule", UPDATE, "torchopt unfused", "torchopt", 2.0),
]
