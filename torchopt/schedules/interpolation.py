"""Schedules through values at given counts: piecewise and one-cycle schedules."""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from torchopt.base import misuse
from torchopt.base.numerics import exact
from torchopt.schedules.base import Comparable, Count, Value, check_steps, half_cosine, where


KINDS = ("linear", "cosine")


def through(count: Count, knots: Sequence[float], values: Sequence[Value], kind: str) -> Value:
    """Return the value at ``count`` on the way through ``values`` at ``knots``.

    Before the first knot it is the first value, after the last the last. Two knots at one place
    are a jump, to the second one's value.
    """
    k = exact(count) if isinstance(count, Tensor) else count
    found = values[0]
    for number in range(len(knots) - 1):
        begin, end = knots[number : number + 2]
        start, stop = values[number : number + 2]
        left = _left(k, begin, end)
        left = half_cosine(1 - left) if kind == "cosine" else left
        found = where(k > begin if number else k >= begin, stop + (start - stop) * left, found)
    return found


def _left(count: Any, begin: float, end: float) -> Any:
    if end <= begin:
        return 0.0
    left = (end - count) / (end - begin)
    return left.clamp(0.0, 1.0) if isinstance(left, Tensor) else min(max(left, 0.0), 1.0)


def check_kind(name: str, kind: Any, among: Sequence[str] = KINDS) -> None:
    """Refuse what is none of several words."""
    if kind not in among:
        raise ValueError(f"{name} must be {' or '.join(map(repr, among))}, got {kind!r}.")


def check_fraction(name: str, value: Any) -> None:
    """Refuse what is no number from 0 to 1."""
    misuse.check_values(**{name: value})
    if isinstance(value, Tensor) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a number >= 0 and <= 1, got {misuse.short(value)}.")


@dataclasses.dataclass(frozen=True, eq=False)
class piecewise_interpolate(Comparable):  # noqa: N801
    """Go from value to value, each the one before times a factor.

    Args:
        interpolate_type: ``"linear"`` or ``"cosine"``, the way between two of them.
        init_value: Value at count 0.
        boundaries_and_scales: ``{count: factor}``; at that count the value is the one of the
            boundary before times the factor.

    Raises:
        ValueError: If a boundary is not a non-negative integer, or the type is another.

    Example:
        >>> from torchopt.schedules import piecewise_interpolate
        >>> schedule = piecewise_interpolate("linear", 1.0, {4: 0.1, 8: 0.01})
        >>> [round(schedule(k), 4) for k in range(0, 11, 2)]
        [1.0, 0.55, 0.1, 0.0505, 0.001, 0.001]
    """

    interpolate_type: str
    init_value: Value
    boundaries_and_scales: Mapping[int, Value] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check_kind("interpolate_type", self.interpolate_type)
        if not isinstance(self.boundaries_and_scales, Mapping):
            raise TypeError(
                "boundaries_and_scales must be a dict {count: factor}, got "
                f"{misuse.short(self.boundaries_and_scales)}."
            )
        misuse.check_values(init_value=self.init_value)
        for boundary, factor in self.boundaries_and_scales.items():
            check_steps("A boundary", boundary, 0)
            misuse.check_values(factor=factor)

    def __call__(self, count: Count) -> Value:
        """Return the value at ``count``."""
        pairs = sorted(self.boundaries_and_scales.items())
        factors = [self.init_value, *(factor for _, factor in pairs)]
        values = list(itertools.accumulate(factors, operator.mul))
        knots = [0, *(boundary for boundary, _ in pairs)]
        return through(count, knots, values, self.interpolate_type)


@dataclasses.dataclass(frozen=True, eq=False)
class cosine_onecycle(Comparable):  # noqa: N801
    r"""Rise to a peak and fall far below the beginning, along cosines.

    .. math::
        s(0) = a / d, \qquad s(\lfloor p n \rfloor) = a, \qquad s(n) = a / (d f)

    (Smith and Topin, 2018, https://arxiv.org/abs/1708.07120). Like Optax, with the peak at
    ``int(pct_start * transition_steps)``; :class:`one_cycle_lr` has the counts of ``torch.optim``.

    Args:
        transition_steps: :math:`n \ge 1`, in updates.
        peak_value: :math:`a`.
        pct_start: :math:`p`, from 0 to 1: how much of it is the rise.
        div_factor: :math:`d`.
        final_div_factor: :math:`f`.

    Raises:
        ValueError: If a number is out of bounds.

    Example:
        >>> from torchopt.schedules import cosine_onecycle
        >>> schedule = cosine_onecycle(8, 1.0, pct_start=0.5, div_factor=2, final_div_factor=5)
        >>> [round(schedule(k), 4) for k in (0, 2, 4, 6, 8, 9)]
        [0.5, 0.75, 1.0, 0.55, 0.1, 0.1]
    """

    transition_steps: int
    peak_value: Value
    pct_start: float = 0.3
    div_factor: Value = 25.0
    final_div_factor: Value = 1e4

    def __post_init__(self) -> None:
        check_steps("transition_steps", self.transition_steps)
        values = {"peak_value": self.peak_value, "div_factor": self.div_factor}
        misuse.check_values(**values, final_div_factor=self.final_div_factor)
        check_fraction("pct_start", self.pct_start)

    def __call__(self, count: Count) -> Value:
        """Return the value at ``count``."""
        begin = self.peak_value / self.div_factor
        values = [begin, self.peak_value, begin / self.final_div_factor]
        knots = [0, int(self.pct_start * self.transition_steps), self.transition_steps]
        return through(count, knots, values, "cosine")


@dataclasses.dataclass(frozen=True, eq=False)
class linear_onecycle(Comparable):  # noqa: N801
    r"""Rise to a peak, fall back and further, in three straight lines.

    .. math::
        s(0) = a / d, \quad s(\lfloor p n \rfloor) = a, \quad s(\lfloor q n \rfloor) = a / d,
        \quad s(n) = a / (d f)

    Args:
        transition_steps: :math:`n \ge 1`, in updates.
        peak_value: :math:`a`.
        pct_start: :math:`p`, from 0 to 1: how much of it is the rise.
        pct_final: :math:`q`, from 0 to 1: when the value is back where it began.
        div_factor: :math:`d`.
        final_div_factor: :math:`f`.

    Raises:
        ValueError: If a number is out of bounds.

    Example:
        >>> from torchopt.schedules import linear_onecycle
        >>> schedule = linear_onecycle(10, 1.0, 0.4, 0.8, div_factor=2, final_div_factor=5)
        >>> [round(schedule(k), 4) for k in (0, 2, 4, 6, 8, 10)]
        [0.5, 0.75, 1.0, 0.75, 0.5, 0.1]
    """

    transition_steps: int
    peak_value: Value
    pct_start: float = 0.3
    pct_final: float = 0.85
    div_factor: Value = 25.0
    final_div_factor: Value = 1e4

    def __post_init__(self) -> None:
        check_steps("transition_steps", self.transition_steps)
        values = {"peak_value": self.peak_value, "div_factor": self.div_factor}
        misuse.check_values(**values, final_div_factor=self.final_div_factor)
        check_fraction("pct_start", self.pct_start)
        check_fraction("pct_final", self.pct_final)
        if self.pct_final < self.pct_start:
            raise ValueError(
                f"pct_final must be >= pct_start, got {self.pct_final!r} < {self.pct_start!r}."
            )

    def __call__(self, count: Count) -> Value:
        """Return the value at ``count``."""
        n, begin = self.transition_steps, self.peak_value / self.div_factor
        values = [begin, self.peak_value, begin, begin / self.final_div_factor]
        knots = [0, int(self.pct_start * n), int(self.pct_final * n), n]
        return through(count, knots, values, "linear")
