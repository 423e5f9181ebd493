"""Line searches: what they return satisfies their conditions, and each formula is checked alone."""

from __future__ import annotations

import math

import pytest
import torch

from torchopt.solvers import Backtracking, StrongWolfe
from torchopt.solvers.line_search import Found, Trial, cubic_minimum


NOTHING = torch.zeros(0, dtype=torch.float64)
FUNCTIONS = {
    "bowl": lambda t: (t - 3) ** 2,
    "steep": lambda t: (t - 0.001) ** 4 - t,
    "wavy": lambda t: 0.1 * t**2 - torch.sin(3 * t),
    "cusp": lambda t: -t / (t**2 + 2),  # More and Thuente, 1994
    "far": lambda t: torch.exp(-0.05 * t) + 1e-4 * t,
    "wall": lambda t: -t - (2 - t).log(),  # nan beyond 2
}


def trial(t, value, slope):
    return Trial(t, value, slope, NOTHING, NOTHING)


class Counted:
    """A function of one number as a line, which counts its evaluations."""

    def __init__(self, fn):
        self.fn, self.lengths = fn, []

    def __call__(self, t):
        self.lengths.append(t)
        return self.at(t)

    def at(self, t):
        t = torch.tensor(t, dtype=torch.float64, requires_grad=True)
        value = self.fn(t)
        (slope,) = torch.autograd.grad(value, t)
        finite = math.isfinite(value.item()) and math.isfinite(slope.item())
        return trial(t.item(), value.item() if finite else math.inf, slope.item())


def search(rule, name, first, most=100):
    line = Counted(FUNCTIONS[name])
    start = line.at(0.0)
    assert start.slope < 0
    return line, start, rule(line, start, first, most, 1e-12)


@pytest.mark.parametrize("first", [0.02, 1.0, 40.0])
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("c2", [0.1, 0.9])
def test_strong_wolfe_conditions_hold(name, first, c2):
    line, start, found = search(StrongWolfe(c2=c2), name, first)
    assert found.satisfied
    assert found.evaluations == len(line.lengths)
    exact = line.at(found.trial.t)
    assert exact[:3] == found.trial[:3]
    assert exact.value <= start.value + 1e-4 * exact.t * start.slope + 1e-15 * abs(start.value)
    assert abs(exact.slope) <= -c2 * start.slope


@pytest.mark.parametrize("first", [0.02, 1.0, 40.0])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_backtracking_takes_the_first_length_that_is_low_enough(name, first):
    line, start, found = search(Backtracking(c1=0.3, decrease=0.4), name, first)
    assert found.satisfied
    assert line.lengths == pytest.approx([first * 0.4**k for k in range(found.evaluations)])
    low = [line.at(t).value <= start.value + 0.3 * t * start.slope for t in line.lengths]
    assert low == [False] * (len(low) - 1) + [True]


@pytest.mark.parametrize("rule", [StrongWolfe(c2=1e-3), Backtracking(c1=0.999)], ids=str)
@pytest.mark.parametrize("most", [0, 2])
def test_evaluations_have_a_bound(rule, most):
    line, start, found = search(rule, "wavy", 37.0, most)
    assert not found.satisfied
    assert found.evaluations == len(line.lengths) == most + 1
    assert found.trial.value <= start.value


@pytest.mark.parametrize("rule", [StrongWolfe(max_eval=3), Backtracking(max_eval=3)], ids=str)
def test_without_a_lower_point_the_start_is_returned(rule):
    line, start = Counted(lambda t: t), trial(0.0, 0.0, -1.0)  # the slope is a lie
    found = rule(line, start, 1.0, 100, 0.0)
    assert found == Found(start, 3, False)


@pytest.mark.parametrize(
    ("rise", "dtype", "satisfied"),
    [
        (2.0**-24, torch.float32, True),
        (2.0**-22, torch.float32, False),
        (2.0**-24, torch.float64, False),
    ],
)
@pytest.mark.parametrize("rule", [StrongWolfe(), Backtracking()], ids=str)
def test_a_rise_within_rounding_is_low_enough(rule, rise, dtype, satisfied):
    start = Trial(0.0, 1.0, -1e-9, torch.zeros(1, dtype=dtype), NOTHING)
    found = rule(lambda t: trial(t, 1.0 + rise, -1e-12), start, 1.0, 100, 0.0)
    assert found.satisfied is satisfied
    assert found.evaluations == (1 if satisfied else 25)


@pytest.mark.parametrize("order", [1, -1])
def test_the_minimum_of_a_cubic_is_exact(order):
    # (t - 2)^2 (t + 1) has its minimum at 2
    at = lambda t: trial(t, (t - 2) ** 2 * (t + 1), 2 * (t - 2) * (t + 1) + (t - 2) ** 2)  # noqa: E731
    ends = [at(0.5), at(3.5)][::order]
    assert cubic_minimum(*ends, 0.5, 3.5) == pytest.approx(2.0, rel=1e-14)
    assert cubic_minimum(*ends, 0.5, 1.5) == 1.5  # within bounds
    assert cubic_minimum(*ends, 2.25, 3.5) == 2.25


@pytest.mark.parametrize(
    "ends",
    [
        (trial(1.0, 0.0, -1.0), trial(1.0, 0.0, -1.0)),  # one point
        (trial(0.0, 0.0, 1.0), trial(1.0, 1.0, 1.0)),  # a line
        (trial(0.0, 0.0, -1.0), trial(1.0, -1.0, -2.0)),  # no minimum of the cubic
        (trial(0.0, 0.0, -1.0), trial(1.0, math.inf, math.nan)),  # beyond a wall
        (trial(0.0, 0.0, -1.0), trial(1.0, math.inf, 3.0)),
        (trial(0.0, 0.0, -1e300), trial(1.0, 1e300, 1e300)),  # squares overflow
    ],
    ids=str,
)
def test_without_a_minimum_the_middle_is_taken(ends):
    assert cubic_minimum(*ends, 0.0, 1.0) == 0.5
