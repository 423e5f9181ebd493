"""Schedules: functions ``count -> value`` that may stand in place of any hyperparameter.

``count`` is 0 at the first update. Schedules are dataclasses: they print, compare and pickle; their
values may be tensors and receive gradients; ``count`` may be a 0-d tensor.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Union

import torch
from torch import Tensor

from torchopt.base import misuse
from torchopt.base.numerics import exact, power
from torchopt.base.values import same
from torchopt.typing import Schedule


Value = Union[float, Tensor]
Count = Union[int, Tensor]


class _Comparable:
    """Schedules compare by their fields; a dataclass would fail at tensors."""

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        fields = [field.name for field in dataclasses.fields(self)]  # pyright: ignore[reportArgumentType]
        return all(same(getattr(self, name), getattr(other, name)) for name in fields)

    def __hash__(self) -> int:
        return hash(type(self))


def _where(condition: Any, yes: Any, no: Any) -> Any:
    """Choose by a Python bool, or elementwise by a tensor."""
    if isinstance(condition, Tensor):
        return torch.where(condition, torch.as_tensor(yes), torch.as_tensor(no))
    return yes if condition else no


def _fraction(count: Count, steps: int, begin: int = 0) -> Any:
    """Return how much of a transition is over, from 0 to 1."""
    if isinstance(count, Tensor):
        return ((exact(count) - begin) / steps).clamp(0.0, 1.0)
    return min(max((count - begin) / steps, 0.0), 1.0)


def _power(base: Any, exponent: Any) -> Any:
    """Return ``base ** exponent``; numbers overflow to infinity, as tensors do."""
    try:
        return power(base, exponent)
    except OverflowError:
        return math.inf


def _check_steps(name: str, value: int, minimum: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name} must be an integer >= {minimum}, got {misuse.short(value)}.")


@dataclasses.dataclass(frozen=True, eq=False)
class constant(_Comparable):  # noqa: N801 - schedules are called like functions
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
class polynomial(_Comparable):  # noqa: N801
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
        _check_steps("transition_steps", self.transition_steps)
        _check_steps("transition_begin", self.transition_begin, 0)

    def __call__(self, count: Count) -> Value:
        """Return the value at ``count``."""
        left = 1 - _fraction(count, self.transition_steps, self.transition_begin)
        return self.end_value + (self.init_value - self.end_value) * _power(left, self.power)


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
class exponential_decay(_Comparable):  # noqa: N801
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
        _check_steps("transition_steps", self.transition_steps)
        _check_steps("transition_begin", self.transition_begin, 0)
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
        value = self.init_value * _power(self.decay_rate, periods)
        if self.end_value is None:
            return value
        beyond = value < self.end_value if self.decay_rate < 1 else value > self.end_value
        return _where(beyond, self.end_value, value)


@dataclasses.dataclass(frozen=True, eq=False)
class cosine_decay(_Comparable):  # noqa: N801
    r"""Decay along half a cosine (Loshchilov and Hutter, 2017, https://arxiv.org/abs/1608.03983).

    .. math::
        s(k) = a \left((1 - \alpha)\left(\tfrac{1 + \cos(\pi x)}{2}\right)^{q} + \alpha\right),
        \qquad x = \min(k / n, 1)

    Args:
        init_value: :math:`a`.
        decay_steps: :math:`n \ge 1`, in updates.
        alpha: Fraction of ``init_value`` that is left at the end.
        exponent: :math:`q`.

    Raises:
        ValueError: If ``decay_steps`` is not an integer >= 1.

    Example:
        >>> from torchopt.schedules import cosine_decay
        >>> [round(cosine_decay(1.0, 4)(k), 4) for k in (0, 2, 4, 9)]
        [1.0, 0.5, 0.0, 0.0]
    """

    init_value: Value
    decay_steps: int
    alpha: Value = 0.0
    exponent: Value = 1.0

    def __post_init__(self) -> None:
        values = {"init_value": self.init_value, "alpha": self.alpha}
        misuse.check_values(**values, exponent=self.exponent)
        _check_steps("decay_steps", self.decay_steps)

    def __call__(self, count: Count) -> Value:
        """Return the value at ``count``."""
        x = _fraction(count, self.decay_steps)
        cosine = torch.cos(math.pi * x) if isinstance(x, Tensor) else math.cos(math.pi * x)
        return self.init_value * (
            (1 - self.alpha) * _power(0.5 * (1 + cosine), self.exponent) + self.alpha
        )


@dataclasses.dataclass(frozen=True, eq=False)
class piecewise_constant(_Comparable):  # noqa: N801
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
            _check_steps("A boundary", boundary, 0)

    def __call__(self, count: Count) -> Value:
        """Return the value at ``count``."""
        value = self.init_value
        for boundary, factor in sorted(self.boundaries_and_scales.items()):
            value = value * _where(count >= boundary, factor, 1.0)
        return value


@dataclasses.dataclass(frozen=True, eq=False)
class join(_Comparable):  # noqa: N801
    """Follow one schedule after the other; each counts from its own beginning.

    Args:
        schedules: At least one.
        boundaries: Counts at which the next schedule takes over; one fewer than ``schedules``,
            increasing.

    Raises:
        ValueError: If the numbers do not match or the boundaries do not increase.

    Example:
        >>> from torchopt.schedules import constant, join
        >>> [join([constant(1.0), constant(2.0)], [2])(k) for k in range(4)]
        [1.0, 1.0, 2.0, 2.0]
    """

    schedules: Sequence[Schedule]
    boundaries: Sequence[int]

    def __post_init__(self) -> None:
        misuse.check_joined(self.schedules)
        if len(self.schedules) != len(self.boundaries) + 1:
            raise ValueError(
                f"join expects one boundary fewer than schedules, got {len(self.schedules)} "
                "schedules "
                f"and {len(self.boundaries)} boundaries."
            )
        if any(a >= b for a, b in zip(self.boundaries, self.boundaries[1:])):
            raise ValueError(f"The boundaries must increase, got {list(self.boundaries)}.")
        object.__setattr__(self, "schedules", tuple(self.schedules))
        object.__setattr__(self, "boundaries", tuple(self.boundaries))

    def __call__(self, count: Count) -> Value:
        """Return the value at ``count``."""
        value = self.schedules[0](count)
        for boundary, schedule in zip(self.boundaries, self.schedules[1:]):
            if isinstance(count, Tensor):
                value = _where(count >= boundary, schedule((count - boundary).clamp(min=0)), value)
            elif count >= boundary:
                value = schedule(count - boundary)
        return value


def warmup_cosine(
    init_value: Value,
    peak_value: Value,
    warmup_steps: int,
    decay_steps: int,
    end_value: float = 0.0,
    exponent: float = 1.0,
) -> Schedule:
    """Rise in a straight line, then decay along half a cosine.

    Args:
        init_value: Value at count 0.
        peak_value: Value at ``warmup_steps``.
        warmup_steps: Updates of the rise, >= 1.
        decay_steps: Updates of rise and decay together, > ``warmup_steps``.
        end_value: Value from ``decay_steps`` on.
        exponent: Power of the cosine.

    Raises:
        ValueError: If a number is out of bounds.

    Example:
        >>> from torchopt.schedules import warmup_cosine
        >>> schedule = warmup_cosine(0.0, 1.0, warmup_steps=2, decay_steps=6)
        >>> [round(schedule(k), 4) for k in (0, 1, 2, 4, 6, 9)]
        [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]
    """
    _check_steps("warmup_steps", warmup_steps)
    _check_steps("decay_steps", decay_steps, warmup_steps + 1)
    alpha = (
        0.0 if not isinstance(peak_value, Tensor) and peak_value == 0 else end_value / peak_value
    )
    rise = linear(init_value, peak_value, warmup_steps)
    decay = cosine_decay(peak_value, decay_steps - warmup_steps, alpha, exponent)
    return join([rise, decay], [warmup_steps])


# Names in TorchOpt 0.7.3 and Optax.
constant_schedule = constant
linear_schedule = linear
polynomial_schedule = polynomial
cosine_decay_schedule = cosine_decay
piecewise_constant_schedule = piecewise_constant
join_schedules = join
warmup_cosine_decay_schedule = warmup_cosine
