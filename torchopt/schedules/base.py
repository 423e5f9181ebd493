"""What the schedules share: comparing, and arithmetic of counts that are numbers or tensors."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Union

import torch
from torch import Tensor

from torchopt.base import misuse
from torchopt.base.numerics import exact, power
from torchopt.base.values import same


Value = Union[float, Tensor]
Count = Union[int, Tensor]


class Comparable:
    """Schedules compare by their fields; a dataclass would fail at tensors."""

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        fields = [field.name for field in dataclasses.fields(self)]  # pyright: ignore[reportArgumentType]
        return all(same(getattr(self, name), getattr(other, name)) for name in fields)

    def __hash__(self) -> int:
        return hash(type(self))


def where(condition: Any, yes: Any, no: Any) -> Any:
    """Choose by a Python bool, or elementwise by a tensor.

    Two numbers keep their precision: as tensors they would be float32.
    """
    if not isinstance(condition, Tensor):
        return yes if condition else no
    if not isinstance(yes, Tensor) and not isinstance(no, Tensor):
        return torch.where(condition, 0 * exact(condition) + yes, no)
    return torch.where(condition, yes, no)


def fraction(count: Count, steps: int, begin: int = 0) -> Any:
    """Return how much of a transition is over, from 0 to 1."""
    if isinstance(count, Tensor):
        return ((exact(count) - begin) / steps).clamp(0.0, 1.0)
    return min(max((count - begin) / steps, 0.0), 1.0)


def half_cosine(x: Any) -> Any:
    """Return what is left of a transition along half a cosine: from 1 at 0 to 0 at 1."""
    cosine = torch.cos(math.pi * x) if isinstance(x, Tensor) else math.cos(math.pi * x)
    return 0.5 * (1 + cosine)


def power_of(base: Any, exponent: Any) -> Any:
    """Return ``base ** exponent``; numbers overflow to infinity, as tensors do."""
    try:
        return power(base, exponent)
    except OverflowError:
        return math.inf


def check_steps(name: str, value: int, minimum: int = 1) -> None:
    """Refuse what is no number of updates.

    Raises:
        ValueError: If ``value`` is not an integer >= ``minimum``.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name} must be an integer >= {minimum}, got {misuse.short(value)}.")
