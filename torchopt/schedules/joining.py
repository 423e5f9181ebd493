"""Schedules made of others: one after the other, or multiplied."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from torchopt.base import misuse
from torchopt.schedules.base import Comparable, Count, Value, check_steps, where
from torchopt.schedules.basic import constant, exponential_decay, linear
from torchopt.schedules.cosine import cosine
from torchopt.typing import Schedule


@dataclasses.dataclass(frozen=True, eq=False)
class join(Comparable):  # noqa: N801
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
                value = where(count >= boundary, schedule((count - boundary).clamp(min=0)), value)
            elif count >= boundary:
                value = schedule(count - boundary)
        return value


@dataclasses.dataclass(frozen=True, eq=False)
class product(Comparable):  # noqa: N801
    """Multiply schedules: what ``ChainedScheduler`` of ``torch.optim`` makes of factors.

    Args:
        schedules: At least one.

    Raises:
        ValueError: If there is none.

    Example:
        >>> from torchopt.schedules import constant, linear, product
        >>> schedule = product([constant(0.5), linear(0.0, 1.0, transition_steps=2)])
        >>> [schedule(k) for k in range(4)]
        [0.0, 0.25, 0.5, 0.5]
    """

    schedules: Sequence[Schedule]

    def __post_init__(self) -> None:
        misuse.check_joined(self.schedules, "product")
        if not self.schedules:
            raise ValueError("product expects at least one schedule, got none.")
        object.__setattr__(self, "schedules", tuple(self.schedules))

    def __call__(self, count: Count) -> Value:
        """Return the value at ``count``."""
        value: Value = self.schedules[0](count)
        for schedule in self.schedules[1:]:
            value = value * schedule(count)
        return value


def _rising(init_value: Value, peak_value: Value, steps: int, following: Schedule) -> Schedule:
    """Return a straight rise, then another schedule; without steps there is no rise."""
    check_steps("warmup_steps", steps, 0)
    if steps == 0:
        misuse.check_values(init_value=init_value, peak_value=peak_value)
        return following
    return join([linear(init_value, peak_value, steps), following], [steps])


def warmup_constant(init_value: Value, peak_value: Value, warmup_steps: int) -> Schedule:
    """Rise in a straight line, then stay.

    Args:
        init_value: Value at count 0.
        peak_value: Value from ``warmup_steps`` on.
        warmup_steps: Updates of the rise, >= 0. For 0 all values are ``peak_value``, while Optax
            stays at ``init_value``.

    Raises:
        ValueError: If ``warmup_steps`` is no such number.

    Example:
        >>> from torchopt.schedules import warmup_constant
        >>> [warmup_constant(0.0, 1.0, warmup_steps=4)(k) for k in (0, 1, 4, 9)]
        [0.0, 0.25, 1.0, 1.0]
    """
    return _rising(init_value, peak_value, warmup_steps, constant(peak_value))


def warmup_cosine(
    init_value: Value,
    peak_value: Value,
    warmup_steps: int,
    decay_steps: int,
    end_value: Value = 0.0,
    exponent: Value = 1.0,
) -> Schedule:
    """Rise in a straight line, then decay along half a cosine.

    Args:
        init_value: Value at count 0.
        peak_value: Value at ``warmup_steps``.
        warmup_steps: Updates of the rise, >= 0.
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
    check_steps("warmup_steps", warmup_steps, 0)
    check_steps("decay_steps", decay_steps, warmup_steps + 1)
    decay = cosine(peak_value, end_value, decay_steps - warmup_steps, exponent=exponent)
    return _rising(init_value, peak_value, warmup_steps, decay)


def warmup_exponential_decay(
    init_value: Value,
    peak_value: Value,
    warmup_steps: int,
    transition_steps: int,
    decay_rate: Value,
    transition_begin: int = 0,
    staircase: bool = False,
    end_value: float | None = None,
) -> Schedule:
    """Rise in a straight line, then multiply by a rate every so many updates.

    Args:
        init_value: Value at count 0.
        peak_value: Value at ``warmup_steps``.
        warmup_steps: Updates of the rise, >= 0.
        transition_steps: As in :class:`exponential_decay`, from the end of the rise on; so are the
            following.
        decay_rate: Factor of so many updates, > 0.
        transition_begin: Updates after the rise until the decay begins.
        staircase: Whether the value changes in jumps.
        end_value: Never go beyond this value.

    Raises:
        ValueError: If a number is out of bounds.

    Example:
        >>> from torchopt.schedules import warmup_exponential_decay
        >>> schedule = warmup_exponential_decay(0.0, 1.0, 2, transition_steps=1, decay_rate=0.5)
        >>> [schedule(k) for k in range(5)]
        [0.0, 0.5, 1.0, 0.5, 0.25]
    """
    decay = exponential_decay(
        peak_value, decay_rate, transition_begin, transition_steps, staircase, end_value
    )
    return _rising(init_value, peak_value, warmup_steps, decay)


def sgdr(cosine_kwargs: Iterable[Mapping[str, Any]]) -> Schedule:
    """Follow several :func:`warmup_cosine` one after the other: warm restarts.

    Periods that differ by a factor are :class:`cosine_annealing_warm_restarts`.

    Args:
        cosine_kwargs: The arguments of each as a dict; its ``decay_steps`` is its length.

    Raises:
        ValueError: If there is none, or a number is out of bounds.
        TypeError: If an argument is missing or unknown.

    Example:
        >>> from torchopt.schedules import sgdr
        >>> period = dict(init_value=0.0, warmup_steps=1, decay_steps=3)
        >>> schedule = sgdr([dict(period, peak_value=1.0), dict(period, peak_value=0.4)])
        >>> [round(schedule(k), 4) for k in range(7)]
        [0.0, 1.0, 0.5, 0.0, 0.4, 0.2, 0.0]
    """
    periods = [dict(arguments) for arguments in cosine_kwargs]
    if not periods:
        raise ValueError("sgdr expects the arguments of at least one period, got none.")
    cosines = [warmup_cosine(**arguments) for arguments in periods]
    ends = list(itertools.accumulate(arguments["decay_steps"] for arguments in periods))
    return cosines[0] if len(cosines) == 1 else join(cosines, ends[:-1])
