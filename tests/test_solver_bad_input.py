"""Calls of solvers that were meant otherwise: what was given, what was expected, what to type."""

from __future__ import annotations

import pytest
import torch

import torchopt
from torchopt.solvers import LBFGS, Backtracking, GradientDescent, StrongWolfe, minimize


X = torch.zeros(2)


def square(p):
    return p.square().sum()


BAD_CALLS = {
    "no function": (lambda: minimize(3.0, LBFGS(), X), TypeError, "fn must be a function"),
    "no solver": (lambda: minimize(square, "lbfgs", X), TypeError, "torchopt.solvers.LBFGS()"),
    "a transformation": (
        lambda: minimize(square, torchopt.sgd(0.1), X),
        TypeError,
        "GradientDescent(tx)",
    ),
    "nothing returned": (lambda: minimize(lambda p: None, LBFGS(), X), TypeError, "return the"),
    "a float": (lambda: minimize(lambda p: 1.0, LBFGS(), X), TypeError, "scalar tensor"),
    "a vector": (lambda: minimize(lambda p: p, LBFGS(), X), ValueError, "mean(), sum()"),
    "complex": (lambda: minimize(lambda p: 1j * p.sum(), LBFGS(), X), ValueError, "real"),
    "detached": (
        lambda: minimize(lambda p: p.detach().sum(), LBFGS(), X),
        ValueError,
        "without a graph",
    ),
    "unrelated": (
        lambda: minimize(lambda p: torch.ones(2, requires_grad=True).sum(), LBFGS(), X),
        ValueError,
        "does not depend on its first argument",
    ),
    "integers": (
        lambda: minimize(square, LBFGS(), {"a": X, "n": torch.arange(2)}),
        TypeError,
        "at 'n'",
    ),
    "a number": (lambda: minimize(square, LBFGS(), [X, 2.0]), TypeError, "at '1'"),
    "no parameters": (lambda: minimize(square, LBFGS(), []), ValueError, "at least one entry"),
    "empty": (lambda: minimize(square, LBFGS(), torch.zeros(0)), ValueError, "at least one"),
    "two devices": (
        lambda: minimize(square, LBFGS(), [X, torch.zeros(2, device="meta")]),
        ValueError,
        "one device",
    ),
    "negative lr": (lambda: LBFGS(-1.0), ValueError, "lr must be >= 0"),
    "a schedule": (lambda: LBFGS(lambda k: 0.1), TypeError, "lr must be a number"),
    "several lr": (lambda: LBFGS(torch.ones(2)), ValueError, "lr must be one number"),
    "no history": (lambda: LBFGS(history_size=0), ValueError, "history_size must be >= 1"),
    "half a pair": (lambda: LBFGS(history_size=2.5), TypeError, "history_size must be an integer"),
    "unknown search": (lambda: LBFGS(line_search_fn="wolfe"), ValueError, "'strong_wolfe'"),
    "no search": (lambda: LBFGS(line_search_fn=3), TypeError, "line_search_fn must be a name"),
    "negative tolerance": (lambda: LBFGS(tolerance_grad=-1.0), ValueError, "tolerance_grad"),
    "nan tolerance": (lambda: LBFGS(tolerance_change=float("nan")), ValueError, "tolerance_change"),
    "no integer": (lambda: LBFGS(max_iter=1.5), TypeError, "max_iter must be an integer"),
    "negative limit": (lambda: LBFGS(max_eval=-1), ValueError, "max_eval must be >= 0"),
    "no transformation": (lambda: GradientDescent(0.1), TypeError, "GradientDescent"),
    "c1": (lambda: StrongWolfe(c1=0.0), ValueError, "c1 must be > 0"),
    "c2 below c1": (lambda: StrongWolfe(c1=0.5, c2=0.4), ValueError, "c2 must be > 0.5"),
    "decrease": (lambda: Backtracking(decrease=1.0), ValueError, "decrease must be"),
    "search length": (lambda: Backtracking(max_eval=0), ValueError, "max_eval must be >= 1"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_say_what_to_type(name):
    call, error, text = BAD_CALLS[name]
    with pytest.raises(error) as caught:
        call()
    assert text in str(caught.value)
