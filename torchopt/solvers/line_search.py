r"""Line searches: how far to go along a direction.

A search sees the function along a line, :math:`\varphi(t) = f(x + t d)` with slope
:math:`\varphi'(t) = \nabla f(x + t d) \cdot d`, as :class:`Trial` objects. It computes with plain
numbers: floats, or 0-d tensors where the search itself is differentiated.

Reference:
    Nocedal and Wright, Numerical Optimization, 2nd edition, Springer 2006, sections 3.1 and 3.5.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from typing_extensions import TypeAlias

from torchopt.base.numerics import root
from torchopt.core import hyper
from torchopt.solvers.base import State, check_count, is_finite, largest, plain
from torchopt.solvers.flat import Number, Objective
from torchopt.solvers.outcome import Outcome


class Trial(NamedTuple):
    """A point of the line; ``value`` is infinite where value or slope are not finite."""

    t: Number
    value: Number
    slope: Number
    x: Tensor
    grad: Tensor


#: Evaluates the function at a length.
Line: TypeAlias = Callable[[Number], Trial]


class Found(NamedTuple):
    """What a search returns."""

    trial: Trial
    evaluations: int
    satisfied: bool  #: Whether ``trial`` is what was searched for, or only the best there was.


def is_low(trial: Trial, start: Trial, c1: float) -> bool:
    """Whether the value has fallen enough, as far as its dtype can tell.

    Near a minimum values differ by less than they are rounded, and a search that insists calls the
    function in vain; the slope, which the other condition is about, is still exact there.
    """
    rounding = torch.finfo(start.x.dtype).eps * abs(start.value)
    return bool(trial.value <= start.value + c1 * trial.t * start.slope + rounding)


S = TypeVar("S", bound=State)


@dataclass(frozen=True)
class LineSearch(abc.ABC):
    """A way to choose a length."""

    @abc.abstractmethod
    def __call__(
        self, line: Line, start: Trial, t: Number, most: float, resolution: float
    ) -> Found:
        """Return a point of a line.

        Args:
            line: Evaluates the function.
            start: The point at length 0; its slope is negative.
            t: The first length to try.
            most: How many evaluations may follow the first one.
            resolution: Lengths that differ by less are the same.
        """


@dataclass(frozen=True)
class FixedLength(LineSearch):
    """Take the first length, whatever the value there."""

    def __call__(
        self, line: Line, start: Trial, t: Number, most: float, resolution: float
    ) -> Found:
        """Return the point at ``t``, or the start where the function is not finite there."""
        trial = line(t)
        return Found(trial, 1, True) if is_finite(trial.value) else Found(start, 1, False)


@dataclass(frozen=True)
class Backtracking(LineSearch):
    r"""Shorten the step until the value has fallen enough: the condition of Armijo.

    .. math:: \varphi(t) \le \varphi(0) + c_1\, t\, \varphi'(0), \qquad t \leftarrow \rho\, t

    Args:
        c1: :math:`c_1` in (0, 1), which part of the fall promised by the slope is enough.
        decrease: :math:`\rho` in (0, 1).
        max_eval: Most evaluations in one search.

    Raises:
        ValueError: If a number is out of bounds.

    Example:
        >>> import torch, torchopt
        >>> from torchopt.solvers import LBFGS, Backtracking, minimize
        >>> solver = LBFGS(line_search_fn=Backtracking(decrease=0.3))
        >>> minimize(lambda p: (p - 1).cosh().sum(), solver, torch.zeros(2)).params
        tensor([1.0000, 1.0000])

    Reference:
        Nocedal and Wright, Numerical Optimization, 2nd edition, algorithm 3.1.
    """

    c1: float = 1e-4
    decrease: float = 0.5
    max_eval: int = 25

    def __post_init__(self) -> None:
        hyper.check_number("c1", self.c1, hyper.HyperSpec(gt=0, lt=1))
        hyper.check_number("decrease", self.decrease, hyper.HyperSpec(gt=0, lt=1))
        check_count("max_eval", self.max_eval, 1)

    def __call__(
        self, line: Line, start: Trial, t: Number, most: float, resolution: float
    ) -> Found:
        """Return the first point that is low enough, or the start if none was."""
        allowed = int(min(self.max_eval, most + 1))
        for evaluations in range(1, allowed + 1):
            trial = line(t)
            if is_low(trial, start, self.c1):
                return Found(trial, evaluations, True)
            t = t * self.decrease
        return Found(start, allowed, False)


@dataclass(frozen=True)
class StrongWolfe(LineSearch):
    r"""Find a point that is low enough and flat enough: the strong Wolfe conditions.

    .. math::
        \varphi(t) \le \varphi(0) + c_1\, t\, \varphi'(0), \qquad
        |\varphi'(t)| \le c_2\, |\varphi'(0)|

    The step grows until an interval holds such a point; the interval is then narrowed. New
    lengths are minima of the cubic through two points with their slopes. A point at which the
    function is not finite counts as too high; one that is higher by no more than rounding does not.

    Args:
        c1: :math:`c_1` in (0, 1), which part of the fall promised by the slope is enough.
        c2: :math:`c_2` in (c1, 1), which part of the slope may be left.
        max_eval: Most evaluations in one search; ``None`` leaves it to the solver.

    Raises:
        ValueError: If a number is out of bounds.

    Example:
        >>> import torch, torchopt
        >>> from torchopt.solvers import LBFGS, StrongWolfe, minimize
        >>> solver = LBFGS(line_search_fn=StrongWolfe(c2=0.5))
        >>> minimize(lambda p: (p - 1).cosh().sum(), solver, torch.zeros(2)).params
        tensor([1.0000, 1.0000])

    Reference:
        Nocedal and Wright, Numerical Optimization, 2nd edition, algorithms 3.5 and 3.6; bounds on
        new lengths as in ``torch.optim.LBFGS``; values within rounding as in Hager and Zhang, A new
        conjugate gradient method with guaranteed descent and an efficient line search, SIAM Journal
        on Optimization 16, 2005.
    """

    c1: float = 1e-4
    c2: float = 0.9
    max_eval: int | None = 25

    def __post_init__(self) -> None:
        hyper.check_number("c1", self.c1, hyper.HyperSpec(gt=0, lt=1))
        hyper.check_number("c2", self.c2, hyper.HyperSpec(gt=self.c1, lt=1))
        if self.max_eval is not None:
            check_count("max_eval", self.max_eval, 1)

    def __call__(
        self, line: Line, start: Trial, t: Number, most: float, resolution: float
    ) -> Found:
        """Return a point that satisfies both conditions, or the lowest that was found."""
        if self.max_eval is not None:
            most = min(most, self.max_eval - 1)
        return _Search(self, line, start, most, resolution).widen(t)


class _Search:
    """One search for the strong Wolfe conditions."""

    def __init__(
        self, rule: StrongWolfe, line: Line, start: Trial, most: float, resolution: float
    ) -> None:
        self.rule, self.line, self.start = rule, line, start
        self.most, self.resolution = most, resolution
        self.further = 0  # evaluations after the first one

    def high(self, trial: Trial) -> bool:
        return not is_low(trial, self.start, self.rule.c1)

    def flat(self, trial: Trial) -> bool:
        return bool(abs(trial.slope) <= -self.rule.c2 * self.start.slope)

    def evaluate(self, t: Number) -> Trial:
        self.further += 1
        return self.line(t)

    def widen(self, t: Number) -> Found:
        """Lengthen the step until it, or an interval that ends there, is good; algorithm 3.5."""
        last, new = self.start, self.line(t)
        while self.further < self.most:
            rising = self.further > 1 and bool(new.value >= last.value)  # from the third point on
            if self.high(new) or rising:
                return self.narrow(last, new)
            if self.flat(new):
                return Found(new, self.further + 1, True)
            if new.slope >= 0:
                return self.narrow(last, new)
            t = cubic_minimum(last, new, new.t + 0.01 * (new.t - last.t), new.t * 10)
            last, new = new, self.evaluate(t)
        return self.narrow(self.start, new)

    def narrow(self, first: Trial, second: Trial) -> Found:
        """Narrow an interval that holds a good point; algorithm 3.6."""
        low, high = _ordered(first, second)
        near_end = False  # whether the last new length was near an end of the interval
        while self.further < self.most and abs(high.t - low.t) >= self.resolution:
            left, right = min(low.t, high.t), max(low.t, high.t)
            t = cubic_minimum(low, high, left, right)
            margin = 0.1 * (right - left)
            is_near = bool(min(right - t, t - left) < margin)
            if is_near and (near_end or t >= right or t <= left):
                t = right - margin if abs(t - right) < abs(t - left) else left + margin
                is_near = False
            near_end = is_near
            new = self.evaluate(t)
            if self.high(new) or new.value >= low.value:
                low, high = _ordered(low, new)
                continue
            if self.flat(new):
                return Found(new, self.further + 1, True)
            if new.slope * (high.t - low.t) >= 0:
                high = low
            low = new
        return Found(low, self.further + 1, False)


def _ordered(first: Trial, second: Trial) -> tuple[Trial, Trial]:
    """Return two points, the lower one first."""
    return (first, second) if first.value <= second.value else (second, first)


def cubic_minimum(a: Trial, b: Trial, least: Number, most: Number) -> Number:
    r"""Return the minimum, within bounds, of the cubic through two points with their slopes.

    .. math::
        d_1 = \varphi'_a + \varphi'_b - 3\, \frac{\varphi_a - \varphi_b}{t_a - t_b}, \qquad
        d_2 = \sqrt{d_1^2 - \varphi'_a \varphi'_b}, \qquad
        t = t_b - (t_b - t_a)\, \frac{\varphi'_b + d_2 - d_1}{\varphi'_b - \varphi'_a + 2 d_2}

    for :math:`t_a < t_b`; where there is none, the middle of the bounds.

    Reference:
        Nocedal and Wright, Numerical Optimization, 2nd edition, equation 3.59.
    """
    if a.t > b.t:
        a, b = b, a
    middle = (least + most) / 2
    if a.t == b.t:
        return middle
    d1 = a.slope + b.slope - 3 * (a.value - b.value) / (a.t - b.t)
    square = d1 * d1 - a.slope * b.slope
    if not square >= 0:
        return middle
    d2: Any = root(square) if isinstance(square, Tensor) else square**0.5
    divisor = b.slope - a.slope + 2 * d2
    if divisor == 0:
        return middle
    t = b.t - (b.t - a.t) * ((b.slope + d2 - d1) / divisor)
    return min(max(t, least), most) if is_finite(t) else middle


# Along a direction, for solvers -------------------------------------------------------------------


def searched(
    search: LineSearch,
    objective: Objective,
    state: S,
    d: Tensor,
    slope: Number,
    first: Number,
    most: float,
    tolerance_change: float,
) -> tuple[S, Number]:
    """Search along a direction, and return the state at the point that was found, with its length.

    Args:
        search: How to choose a length.
        objective: The function.
        state: Where the line begins.
        d: The direction.
        slope: Of the function along it, where the line begins.
        first: The length to try first.
        most: How many evaluations may follow the first one.
        tolerance_change: Points that differ by less in every entry are the same.
    """

    def line(t: Number) -> Trial:
        x = state.x + t * d if objective.create_graph else torch.add(state.x, d, alpha=plain(t))
        value, grad = objective(x)
        slope = objective.number(grad.dot(d))
        return Trial(t, value if is_finite(value, slope) else math.inf, slope, x, grad)

    start = Trial(0.0, state.value, slope, state.x, state.grad)
    size = largest(d)
    found = search(line, start, first, most, tolerance_change / size)
    trial = found.trial
    outcome = None
    if not found.satisfied and trial is start:
        outcome = Outcome.MAX_EVAL if found.evaluations > most else Outcome.LINE_SEARCH_FAILED
        outcome = Outcome.NOT_FINITE if isinstance(search, FixedLength) else outcome
    new = dataclasses.replace(
        state,
        x=trial.x,
        value=trial.value,
        grad=trial.grad,
        grad_norm=largest(trial.grad),
        evaluations=state.evaluations + found.evaluations,
        change=size * abs(plain(trial.t)),
        fall=abs(plain(trial.value) - plain(state.value)),
        outcome=outcome,
    )
    return new, trial.t
