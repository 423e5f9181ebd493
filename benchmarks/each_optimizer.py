"""Every optimizer: its step in place beside ``torch.optim``'s, its update beside its own rule."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.rows import Case, Row


CHECKS = {"float64": {"dtype": "float64"}}
#: Class of ``torch.optim`` -> its arguments beyond those that it has anyway. Ours takes the same.
OF_TORCH: Mapping[str, Mapping[str, Any]] = {
    "SGD": {"momentum": 0.9},
    "ASGD": {},
    "Rprop": {},
    "RMSprop": {},
    "Adagrad": {},
    "Adadelta": {},
    "Adam": {},
    "AdamW": {},
    "Adamax": {},
    "NAdam": {},
    "RAdam": {},
    "Adafactor": {},
}
#: Rules of an entry that torch has not.
OTHERS: Mapping[str, Mapping[str, Any]] = {
    "Lion": {},
    "AdaBelief": {},
    "Yogi": {},
    "Adan": {},
    "ADOPT": {},
    "AdEMAMix": {},
    "Signum": {},
    "OptimisticGradientDescent": {},
    "SGDScheduleFree": {},
    "AdamWScheduleFree": {},
}
#: What has a rule of a whole tensor: there is no kernel of it to compare with.
WHOLE = ("Adafactor",)
#: The classes of torch that have a fused step, beside ``foreach``.
FUSED = ("SGD", "Adagrad", "Adam", "AdamW")
#: As many steps are taken before an update is differentiated, so that no buffer is zero.
STEPS_BEFORE = 6


@dataclasses.dataclass(frozen=True)
class Problem:
    """Parameters and gradients, and the optimizer that takes them.

    Attributes:
        name: The optimizer's class.
        arguments: What it is made with.
        params: The parameters.
        grads: Their gradients, the same at every step in place.
        coefficients: Of a linear function of all outputs of an update, drawn from in turn.
        in_place: Whether a step is taken in place, or an update is differentiated.
    """

    name: str
    arguments: Mapping[str, Any]
    params: list[np.ndarray]
    grads: list[np.ndarray]
    coefficients: list[np.ndarray]
    in_place: bool


def problem(
    name: str,
    in_place: bool = True,
    tensors: int = 100,
    shape: tuple[int, ...] = (32, 32),
    dtype: str = "float32",
) -> Problem:
    """Return so many tensors of one shape, with normal numbers."""
    generator = np.random.default_rng(0)

    def draw() -> list[np.ndarray]:
        return [generator.standard_normal(shape, "float32").astype(dtype) for _ in range(tensors)]

    arguments = {**OF_TORCH, **OTHERS}[name]
    return Problem(name, arguments, draw(), draw(), draw(), in_place)


def _small(name: str) -> Row:
    case = Case(
        f"{name}.step, 100 x (32, 32)",
        "each_optimizer",
        {"name": name},
        CHECKS,
        check_calls=3,
        repeats=20,
    )
    return Row("each-small", case, "torch foreach", "torchopt", 1.5)


def _large(name: str) -> Row:
    case = Case(
        f"{name}.step, 10 x 1 million",
        "each_optimizer",
        {"name": name, "tensors": 10, "shape": (1000, 1000)},
        check_calls=3,
        repeats=3,
    )
    side = "torch fused" if name in FUSED else "torch foreach"
    return Row("each-large", case, side, "torchopt", 1.0)


def _update(name: str) -> Row:
    case = Case(
        f"{name}, forward + backward, 100 x (32, 32)",
        "each_optimizer",
        {"name": name, "in_place": False},
        CHECKS,
        repeats=5,
    )
    return Row("each-update", case, "torchopt unfused", "torchopt", 2.0)


ROWS = [
    *(_small(name) for name in OF_TORCH),
    *(_large(name) for name in OF_TORCH),
    *(_update(name) for name in (*OF_TORCH, *OTHERS) if name not in WHOLE),
]
