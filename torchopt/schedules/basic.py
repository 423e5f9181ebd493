"""Constant, polynomial and exponential schedules, and one that jumps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from torchopt.base import misuse
from torchopt.base.numerics import exact
from torchopt.schedules.base import (
    Comparable,
    Count,
    Value,
    check_steps,
    fraction,
    power_of,
    where,
)
from torchopt.typing import Schedule


@dataclasses.dataclass(frozen=True, eq=False)
class constant(Comparable):  # noqa: N801 - schedules are called like functions
    r"""Return the same value at every count: :math:`s(k) = a`.

    Example:
        >>> from torchopt.schedules import constant
        >>> constant(0.1)(7)
        0.1
    """

    value: Value

    def __post_init__(self) -> None:
        misuse.check_values(value=self.value)

    def __call__(self, count: Count) -> Value:
        """Return the value."""
        return self.value


@dataclasses.dataclass(frozen=True, eq=False)
class polynomial(Comparable):  # noqa: N801
    r"""Go from one value to another along a power of the time left.

    .. math::
        s(k) = b + (a - b)\,(1 - x)^p, \qquad x = \min(\max((k - k_0) / n, 0), 1)

    Args:
        init_value: :math:`a`, until ``transition_begin``.
        end_value: :math:`b`, from ``transition_begin + transition_steps`` on.
        power: :math:`p`.
        transition_steps: :math:`n \ge 1`, in updates.
        transition_begin: :math:`k_0 \ge 0`, in updates.

    Raises:
        ValueError: If a number of updates is not an integer in its bounds.

    Example:
        >>> from torchopt.schedules import polynomial
        >>> schedule = polynomial(1.0, 0.0, power=2, transition_steps=4)
        >>> [schedule(k) for k in (0, 1, 2, 4, 9)]
        [1.0, 0.5625, 0.25, 0.0, 0.0]
    """

    init_value: Value
    end_value: Value
    power: Value
    transition_steps: int
    transition_begin: int = 0

    def __post_init__(self) -> None:
        values = {"init_value": self.init_value, "end_value": self.end_value}
        misuse.check_values(**values, power=self.power)
        check_steps("transition_steps", self.transition_steps)
        check_steps("transition_begin", self.transition_begin, 0)

    def __call__(self, count: Count) -> Value:
        """Return the value at ``count``."""
        left = 1 - fraction(count, self.transition_steps, self.transition_begin)
        return self.end_value + (self.init_value - self.end_value) * power_of(left, self.power)


def linear(
    init_value: Value, end_value: Value, transition_steps: int, transition_begin: int = 0
) -> Schedule:
    """Go from one value to another in a straight line: :class:`polynomial` of power 1.

    Example:
        >>> from torchopt.schedules import linear
        >>> [linear(1.0, 0.0, transition_steps=4)(k) for k in (0, 1, 4, 9)]
        [1.0, 0.75, 0.0, 0.0]
    """
    return polynomial(init_value, end_value, 1, transition_steps, transition_begin)


@dataclasses.dataclass(frozen=True, eq=False)
class exponential_decay(Comparable):  # noqa: N801
    r"""Multiply by a rate every so many updates.

    .. math::
        s(k) = a\, r^{x}, \qquad x = \max(k - k_0, 0) / n

    Args:
        init_value: :math:`a`.
        decay_rate: :math:`r > 0`.
        transition_begin: :math:`k_0 \ge 0`, in updates.
        transition_steps: :math:`n \ge 1`, in updates.
        staircase: Round :math:`x` down, so that the value changes in jumps.
        end_value: Never go beyond this value (below it for a rate < 1, else above).

    Raises:
        ValueError: If a number is out of bounds.

    Example:
        >>> from torchopt.schedules import exponential_decay
        >>> schedule = exponential_decay(1.0, decay_rate=0.5, transition_steps=2, staircase=True)
        >>> [schedule(k) for k in range(5)]
        [1.0, 1.0, 0.5, 0.5, 0.25]
    """

    init_value: Value
    decay_rate: Value
    transition_begin: int = 0
    transition_steps: int = 1
    staircase: bool = False
    end_value: float | None = None

    def __post_init__(self) -> None:
        check_steps("transition_steps", self.transition_steps)
        check_steps("transition_begin", self.transition_begin, 0)
        misuse.check_values(init_value=self.init_value, decay_rate=self.decay_rate)
        if not isinstance(self.decay_rate, Tensor) and not self.decay_rate > 0:
            raise ValueError(f"decay_rate must be > 0, got {self.decay_rate!r}.")
        if self.end_value is not None and isinstance(self.decay_rate, Tensor):
            raise ValueError(
                "end_value needs a decay_rate that is a number: it is a floor or a ceiling."
            )

    def __call__(self, count: Count) -> Value:
        """Return the value at ``count``."""
        over = (exact(count) if isinstance(count, Tensor) else count) - self.transition_begin
        over = over.clamp(min=0) if isinstance(over, Tensor) else max(over, 0)
        periods = over // self.transition_steps if self.staircase else over / self.transition_steps
        value = self.init_value * power_of(self.decay_rate, periods)
        if self.end_value is None:
            return value
        beyond = value < self.end_value if self.decay_rate < 1 else value > self.end_value
        return where(beyond, self.end_value, value)


@dataclasses.dataclass(frozen=True, eq=False)
class piecewise_constant(Comparable):  # noqa: N801
    """Multiply by a factor at each boundary.

    Args:
        init_value: Value until the first boundary.
        boundaries_and_scales: ``{count: factor}``; the factor applies from that count on.

    Raises:
        ValueError: If a boundary is not a non-negative integer.

    Example:
        >>> from torchopt.schedules import piecewise_constant
        >>> schedule = piecewise_constant(1.0, {2: 0.5, 4: 0.1})
        >>> [schedule(k) for k in range(5)]
        [1.0, 1.0, 0.5, 0.5, 0.05]
    """

    init_value: Value
    boundaries_and_scales: Mapping[int, Value] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.boundaries_and_scales, Mapping):
            raise TypeError(
                "boundaries_and_scales must be a dict {count: factor}, got "
                f"{misuse.short(self.boundaries_and_scales)}."
            )
        misuse.check_values(init_value=self.init_value)
        for boundary in self.boundaries_and_scales:
            check_steps("A boundary", boundary, 0)

    def __call__(self, count: Count) -> Value:
        """Return the value at ``count``."""
        value = self.init_value
        for boundary, factor in sorted(self.boundaries_and_scales.items()):
            value = value * where(count >= boundary, factor, 1.0)
        return value
