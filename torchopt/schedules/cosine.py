"""Schedules along a cosine."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from torchopt.base import misuse
from torchopt.base.numerics import exact
from torchopt.schedules.base import (
    Comparable,
    Count,
    Value,
    check_steps,
    fraction,
    half_cosine,
    power_of,
    where,
)


#: No optimizer counts further; a tensor is compared with every restart, so there is a last one.
_LATEST = 2**48


@dataclasses.dataclass(frozen=True, eq=False)
class cosine_decay(Comparable):  # noqa: N801
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
        check_steps("decay_steps", self.decay_steps)

    def __call__(self, count: Count) -> Value:
        """Return the value at ``count``."""
        left = power_of(half_cosine(fraction(count, self.decay_steps)), self.exponent)
        return self.init_value * ((1 - self.alpha) * left + self.alpha)


@dataclasses.dataclass(frozen=True, eq=False)
class cosine(Comparable):  # noqa: N801
    r"""Go from one value to another along half a cosine.

    .. math::
        s(k) = b + (a - b) \left(\tfrac{1 + \cos(\pi x)}{2}\right)^{q},
        \qquad x = \min(\max((k - k_0) / n, 0), 1)

    Args:
        init_value: :math:`a`, until ``transition_begin``.
        end_value: :math:`b`, from ``transition_begin + transition_steps`` on.
        transition_steps: :math:`n \ge 1`, in updates.
        transition_begin: :math:`k_0 \ge 0`, in updates.
        exponent: :math:`q`.

    Raises:
        ValueError: If a number of updates is not an integer in its bounds.

    Example:
        >>> from torchopt.schedules import cosine
        >>> [round(cosine(1.0, 0.2, 4)(k), 4) for k in (0, 2, 4, 9)]
        [1.0, 0.6, 0.2, 0.2]
    """

    init_value: Value
    end_value: Value
    transition_steps: int
    transition_begin: int = 0
    exponent: Value = 1.0

    def __post_init__(self) -> None:
        values = {"init_value": self.init_value, "end_value": self.end_value}
        misuse.check_values(**values, exponent=self.exponent)
        check_steps("transition_steps", self.transition_steps)
        check_steps("transition_begin", self.transition_begin, 0)

    def __call__(self, count: Count) -> Value:
        """Return the value at ``count``."""
        x = fraction(count, self.transition_steps, self.transition_begin)
        left = power_of(half_cosine(x), self.exponent)
        return self.end_value + (self.init_value - self.end_value) * left


@dataclasses.dataclass(frozen=True, eq=False)
class cosine_annealing_lr(Comparable):  # noqa: N801
    r"""Swing along a cosine, down and up again: ``CosineAnnealingLR`` of ``torch.optim``.

    .. math::
        s(k) = b + (a - b)\, \tfrac{1 + \cos(\pi k / T)}{2}

    After :math:`T` updates it rises again, unlike :class:`cosine_decay`.

    Args:
        init_value: :math:`a`, the learning rate that ``torch.optim`` reads from its group.
        T_max: :math:`T \ge 1`, updates of the way down.
        eta_min: :math:`b`.

    Raises:
        ValueError: If ``T_max`` is not an integer >= 1.

    Example:
        >>> from torchopt.schedules import cosine_annealing_lr
        >>> [round(cosine_annealing_lr(1.0, T_max=4)(k), 4) for k in (0, 2, 4, 6, 8)]
        [1.0, 0.5, 0.0, 0.5, 1.0]
    """

    init_value: Value
    T_max: int
    eta_min: Value = 0.0

    def __post_init__(self) -> None:
        misuse.check_values(init_value=self.init_value, eta_min=self.eta_min)
        check_steps("T_max", self.T_max)

    def __call__(self, count: Count) -> Value:
        """Return the value at ``count``."""
        # of a whole number of swings nothing is left to round
        over = (exact(count) if isinstance(count, Tensor) else count) % (2 * self.T_max)
        left = half_cosine(over / self.T_max)
        return self.eta_min + (self.init_value - self.eta_min) * left


@dataclasses.dataclass(frozen=True, eq=False)
class cosine_annealing_warm_restarts(Comparable):  # noqa: N801
    r"""Decay along half a cosine, again and again: ``CosineAnnealingWarmRestarts`` (SGDR).

    .. math::
        s(k) = b + (a - b)\, \tfrac{1 + \cos(\pi j / T_i)}{2}, \qquad T_i = T_0\, m^i

    where :math:`j` counts from the last restart and :math:`i` the restarts so far (Loshchilov and
    Hutter, 2017, https://arxiv.org/abs/1608.03983).

    Args:
        init_value: :math:`a`, the learning rate that ``torch.optim`` reads from its group.
        T_0: :math:`T_0 \ge 1`, updates until the first restart.
        T_mult: :math:`m \ge 1`, by which a period is longer than the one before.
        eta_min: :math:`b`.

    Raises:
        ValueError: If ``T_0`` or ``T_mult`` is not an integer >= 1.

    Example:
        >>> from torchopt.schedules import cosine_annealing_warm_restarts
        >>> schedule = cosine_annealing_warm_restarts(1.0, T_0=2, T_mult=2)
        >>> [round(schedule(k), 4) for k in range(8)]
        [1.0, 0.5, 1.0, 0.8536, 0.5, 0.1464, 1.0, 0.9619]
    """

    init_value: Value
    T_0: int
    T_mult: int = 1
    eta_min: Value = 0.0

    def __post_init__(self) -> None:
        misuse.check_values(init_value=self.init_value, eta_min=self.eta_min)
        check_steps("T_0", self.T_0)
        check_steps("T_mult", self.T_mult)

    def __call__(self, count: Count) -> Value:
        """Return the value at ``count``."""
        left = half_cosine(self._part(exact(count) if isinstance(count, Tensor) else count))
        return self.eta_min + (self.init_value - self.eta_min) * left

    def _part(self, count: Any) -> Any:
        """Return how much of the present period is over."""
        if self.T_mult == 1:
            return count % self.T_0 / self.T_0
        begin, period = 0, self.T_0
        part = count / period
        while begin + period <= _LATEST and (isinstance(count, Tensor) or count >= begin + period):
            begin, period = begin + period, period * self.T_mult
            part = where(count >= begin, (count - begin) / period, part)
        return part
