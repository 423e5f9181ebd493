"""The schedulers of ``torch.optim.lr_scheduler`` that are functions of the step, as such functions.

Arguments and defaults are torch's, but that what a scheduler reads from the optimizer's group (its
``initial_lr``) comes first. Count ``k`` has the value in the group when update ``k + 1`` is taken.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from torchopt.base import misuse
from torchopt.base.numerics import exact
from torchopt.schedules.base import Comparable, Count, Value, check_steps, power_of
from torchopt.schedules.basic import (
    constant,
    exponential_decay,
    linear,
    polynomial,
)
from torchopt.schedules.interpolation import check_fraction, check_kind, through
from torchopt.schedules.joining import join, product
from torchopt.typing import Schedule


def constant_lr(init_value: Value, factor: Value = 1.0 / 3, total_iters: int = 5) -> Schedule:
    """Start with a fraction of a value: ``ConstantLR``.

    Args:
        init_value: Value from ``total_iters`` on.
        factor: What it is multiplied by before.
        total_iters: Updates until then, >= 1.

    Raises:
        ValueError: If ``total_iters`` is no such number.

    Example:
        >>> from torchopt.schedules import constant_lr
        >>> [constant_lr(1.0, factor=0.5, total_iters=2)(k) for k in range(4)]
        [0.5, 0.5, 1.0, 1.0]
    """
    check_steps("total_iters", total_iters)
    start = join([constant(factor), constant(1.0)], [total_iters])
    return product([constant(init_value), start])


def linear_lr(
    init_value: Value,
    start_factor: Value = 1.0 / 3,
    end_factor: Value = 1.0,
    total_iters: int = 5,
) -> Schedule:
    """Change a factor in a straight line: ``LinearLR``.

    Args:
        init_value: What the factor multiplies.
        start_factor: Factor at count 0.
        end_factor: Factor from ``total_iters`` on.
        total_iters: Updates until then, >= 1.

    Raises:
        ValueError: If ``total_iters`` is no such number.

    Example:
        >>> from torchopt.schedules import linear_lr
        >>> [linear_lr(2.0, start_factor=0.5, total_iters=2)(k) for k in range(4)]
        [1.0, 1.5, 2.0, 2.0]
    """
    check_steps("total_iters", total_iters)
    return product([constant(init_value), linear(start_factor, end_factor, total_iters)])


def polynomial_lr(init_value: Value, total_iters: int = 5, power: Value = 1.0) -> Schedule:
    """Go to zero along a power of the time left: ``PolynomialLR``.

    Args:
        init_value: Value at count 0.
        total_iters: Updates until zero, >= 1.
        power: The power.

    Raises:
        ValueError: If ``total_iters`` is no such number.

    Example:
        >>> from torchopt.schedules import polynomial_lr
        >>> [polynomial_lr(1.0, total_iters=2, power=2)(k) for k in range(4)]
        [1.0, 0.25, 0.0, 0.0]
    """
    check_steps("total_iters", total_iters)
    return polynomial(init_value, 0.0, power, total_iters)


def exponential_lr(init_value: Value, gamma: Value) -> Schedule:
    """Multiply by a factor at every update: ``ExponentialLR``.

    Args:
        init_value: Value at count 0.
        gamma: The factor, > 0.

    Raises:
        ValueError: If ``gamma`` is a number out of bounds.

    Example:
        >>> from torchopt.schedules import exponential_lr
        >>> [exponential_lr(1.0, gamma=0.5)(k) for k in range(3)]
        [1.0, 0.5, 0.25]
    """
    return exponential_decay(init_value, gamma)


def step_lr(init_value: Value, step_size: int, gamma: Value = 0.1) -> Schedule:
    """Multiply by a factor every so many updates: ``StepLR``.

    Args:
        init_value: Value at count 0.
        step_size: So many updates, >= 1.
        gamma: The factor, > 0.

    Raises:
        ValueError: If a number is out of bounds.

    Example:
        >>> from torchopt.schedules import step_lr
        >>> [step_lr(1.0, step_size=2, gamma=0.5)(k) for k in range(5)]
        [1.0, 1.0, 0.5, 0.5, 0.25]
    """
    check_steps("step_size", step_size)
    return exponential_decay(init_value, gamma, transition_steps=step_size, staircase=True)


@dataclasses.dataclass(frozen=True, eq=False)
class multi_step_lr(Comparable):  # noqa: N801
    """Multiply by a factor at each of several counts: ``MultiStepLR``.

    :class:`piecewise_constant` has a factor of its own for each.

    Args:
        init_value: Value until the first.
        milestones: The counts; one that stands there twice counts twice.
        gamma: The factor.

    Raises:
        ValueError: If a milestone is not a non-negative integer.

    Example:
        >>> from torchopt.schedules import multi_step_lr
        >>> [multi_step_lr(1.0, [2, 3], gamma=0.5)(k) for k in range(5)]
        [1.0, 1.0, 0.5, 0.25, 0.25]
    """

    init_value: Value
    milestones: Sequence[int]
    gamma: Value = 0.1

    def __post_init__(self) -> None:
        misuse.check_values(init_value=self.init_value, gamma=self.gamma)
        if not isinstance(self.milestones, (list, tuple)):
            given = misuse.short(self.milestones)
            raise TypeError(f"milestones must be a list of counts, got {given}.")
        for milestone in self.milestones:
            check_steps("A milestone", milestone, 0)
        object.__setattr__(self, "milestones", tuple(sorted(self.milestones)))

    def __call__(self, count: Count) -> Value:
        """Return the value at ``count``."""
        if isinstance(count, Tensor):
            passed: Any = exact(sum(((count >= m).long() for m in self.milestones), 0 * count))
        else:
            passed = bisect.bisect_right(self.milestones, count)
        return self.init_value * power_of(self.gamma, passed)


MODES = ("triangular", "triangular2", "exp_range")


@dataclasses.dataclass(frozen=True, eq=False)
class cyclic_lr(Comparable):  # noqa: N801
    r"""Go up and down in straight lines, again and again: ``CyclicLR``.

    .. math::
        s(k) = a + (b - a)\, x\, r, \qquad
        r = 1, \quad 2^{1 - c} \;\text{ or }\; \gamma^k

    where :math:`x` is how far up it is and :math:`c` is 1 in the first cycle (Smith, 2017,
    https://arxiv.org/abs/1506.01186). The momentum that ``CyclicLR`` cycles besides goes the other
    way: ``cyclic_lr(max_momentum, base_momentum, ...)``.

    Args:
        base_lr: :math:`a`, at the ends of a cycle.
        max_lr: :math:`b`, at its peak.
        step_size_up: Updates of the way up, >= 1.
        step_size_down: Updates of the way down; ``None`` for as many.
        mode: How :math:`r` changes: ``"triangular"``, ``"triangular2"`` or ``"exp_range"``.
        gamma: :math:`\gamma`, for ``"exp_range"``.
        scale_fn: A function that gives :math:`r`, in place of ``mode``.
        scale_mode: Whether it is given the number of the ``"cycle"`` or that of ``"iterations"``.

    Raises:
        ValueError: If a number of updates is out of bounds, or a mode unknown.

    Example:
        >>> from torchopt.schedules import cyclic_lr
        >>> schedule = cyclic_lr(0.0, 1.0, step_size_up=2, mode="triangular2")
        >>> [schedule(k) for k in range(9)]
        [0.0, 0.5, 1.0, 0.5, 0.0, 0.25, 0.5, 0.25, 0.0]
    """

    base_lr: Value
    max_lr: Value
    step_size_up: int = 2000
    step_size_down: int | None = None
    mode: str = "triangular"
    gamma: Value = 1.0
    scale_fn: Callable[[Any], Value] | None = None
    scale_mode: str = "cycle"

    def __post_init__(self) -> None:
        misuse.check_values(base_lr=self.base_lr, max_lr=self.max_lr, gamma=self.gamma)
        check_steps("step_size_up", self.step_size_up)
        if self.step_size_down is not None:
            check_steps("step_size_down", self.step_size_down)
        check_kind("mode", self.mode, MODES)
        check_kind("scale_mode", self.scale_mode, ("cycle", "iterations"))

    def __call__(self, count: Count) -> Value:
        """Return the value at ``count``."""
        k: Any = exact(count) if isinstance(count, Tensor) else count
        up = self.step_size_up
        length = up + (self.step_size_down or up)
        height = through(k % length, [0, up, length], [0.0, 1.0, 0.0], "linear")
        return self.base_lr + (self.max_lr - self.base_lr) * height * self._scale(k, length)

    def _scale(self, k: Any, length: int) -> Any:
        cycle = k // length + 1
        if self.scale_fn is not None:
            return self.scale_fn(cycle if self.scale_mode == "cycle" else k)
        if self.mode == "exp_range":
            return power_of(self.gamma, k)
        return 1.0 if self.mode == "triangular" else power_of(0.5, cycle - 1)


@dataclasses.dataclass(frozen=True, eq=False)
class one_cycle_lr(Comparable):  # noqa: N801
    r"""Rise to a peak and fall far below the beginning: ``OneCycleLR``.

    .. math::
        s(0) = a / d, \qquad s(p n - 1) = a, \qquad s(n - 1) = a / (d f)

    and, with three phases, :math:`s(2 p n - 2) = a / d` (Smith and Topin, 2018,
    https://arxiv.org/abs/1708.07120). After the last update it stays, where ``OneCycleLR`` raises.
    The momentum that it cycles besides is :class:`one_cycle_momentum`.

    Args:
        max_lr: :math:`a`.
        total_steps: :math:`n \ge 2`, in updates.
        pct_start: :math:`p`, from 0 to 1: how much of it is the rise.
        anneal_strategy: ``"cos"`` or ``"linear"``.
        div_factor: :math:`d`.
        final_div_factor: :math:`f`.
        three_phase: Fall as fast as it rose, and only then further.

    Raises:
        ValueError: If a number is out of bounds, or the strategy unknown.

    Example:
        >>> from torchopt.schedules import one_cycle_lr
        >>> schedule = one_cycle_lr(1.0, 7, pct_start=3 / 7, div_factor=2, final_div_factor=5)
        >>> [round(schedule(k), 4) for k in (0, 1, 2, 4, 6, 9)]
        [0.5, 0.75, 1.0, 0.55, 0.1, 0.1]
    """

    max_lr: Value
    total_steps: int
    pct_start: float = 0.3
    anneal_strategy: str = "cos"
    div_factor: Value = 25.0
    final_div_factor: Value = 1e4
    three_phase: bool = False

    def __post_init__(self) -> None:
        misuse.check_values(max_lr=self.max_lr, div_factor=self.div_factor)
        misuse.check_values(final_div_factor=self.final_div_factor)
        _check_cycle(self)

    def __call__(self, count: Count) -> Value:
        """Return the value at ``count``."""
        begin = self.max_lr / self.div_factor
        return _cycle(self, count, [begin, self.max_lr, begin, begin / self.final_div_factor])


@dataclasses.dataclass(frozen=True, eq=False)
class one_cycle_momentum(Comparable):  # noqa: N801
    """Fall from a momentum and come back, while :class:`one_cycle_lr` rises and falls.

    Args:
        total_steps: As there; so are the following, but for the two momenta.
        base_momentum: Momentum at the peak of the learning rate.
        max_momentum: Momentum at the beginning and at the end.
        pct_start: From 0 to 1: how much of it is the fall.
        anneal_strategy: ``"cos"`` or ``"linear"``.
        three_phase: Whether the learning rate has three phases; the momentum stays in the last.

    Raises:
        ValueError: If a number is out of bounds, or the strategy unknown.

    Example:
        >>> import torchopt
        >>> from torchopt.schedules import one_cycle_momentum
        >>> schedule = one_cycle_momentum(7, pct_start=3 / 7)
        >>> [round(schedule(k), 4) for k in (0, 1, 2, 4, 6)]
        [0.95, 0.9, 0.85, 0.9, 0.95]
        >>> tx = torchopt.adam(torchopt.schedules.one_cycle_lr(1e-3, 7), betas=(schedule, 0.999))
    """

    total_steps: int
    base_momentum: Value = 0.85
    max_momentum: Value = 0.95
    pct_start: float = 0.3
    anneal_strategy: str = "cos"
    three_phase: bool = False

    def __post_init__(self) -> None:
        misuse.check_values(base_momentum=self.base_momentum, max_momentum=self.max_momentum)
        _check_cycle(self)

    def __call__(self, count: Count) -> Value:
        """Return the value at ``count``."""
        top = self.max_momentum
        return _cycle(self, count, [top, self.base_momentum, top, top])


def _check_cycle(schedule: Any) -> None:
    check_steps("total_steps", schedule.total_steps, 2)
    check_fraction("pct_start", schedule.pct_start)
    check_kind("anneal_strategy", schedule.anneal_strategy, ("cos", "linear"))


def _cycle(schedule: Any, count: Count, values: list[Value]) -> Value:
    """Return the value of a cycle: at its beginning, its peak, back where it began, at its end."""
    n, rise = schedule.total_steps, schedule.pct_start * schedule.total_steps
    knots = [0, rise - 1, 2 * rise - 2, n - 1]
    if not schedule.three_phase:
        knots, values = [0, rise - 1, n - 1], [values[0], values[1], values[3]]
    kind = "cosine" if schedule.anneal_strategy == "cos" else "linear"
    return through(count, knots, values, kind)
