"""torchopt.LBFGS and calls that go wrong: after them parameters and state are as before."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from solver_problems import rosenbrock

import torchopt
from torchopt.solvers import Outcome, StrongWolfe


def parameter(*values):
    return torch.nn.Parameter(torch.tensor(values, dtype=torch.float64))


def stepped(p, fn=rosenbrock, steps=1, **options):
    """Return an optimizer after some steps, and its closure."""
    optimizer = torchopt.LBFGS([p], **{"line_search_fn": "strong_wolfe", "max_iter": 4, **options})

    def closure():
        optimizer.zero_grad()
        loss = fn(p)
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return optimizer, closure


def contents(optimizer):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return copy.deepcopy((optimizer.state_dict(), params))


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# Constructor and groups --------------------------------------------------------------------------

P = parameter(1.0, 2.0)
BAD_ARGUMENTS = {
    "groups": (([{"params": [P]}, {"params": [parameter(1.0)]}],), {}, "parameter groups"),
    "nothing": (([],), {}, "empty"),
    "lr": (([P], -1.0), {}, "lr must be >= 0"),
    "lr of a group": (([{"params": [P], "lr": -1.0}],), {}, "lr must be >= 0"),
    "several lr": (([P], torch.ones(2)), {}, "lr must be one number"),
    "search": (([P],), {"line_search_fn": "wolfe"}, "'strong_wolfe', 'backtracking' or None"),
    "history": (([P],), {"history_size": 0}, "history_size must be >= 1"),
    "tolerance": (([P],), {"tolerance_change": -1e-9}, "tolerance_change must be >= 0"),
    "max_iter": (([P],), {"max_iter": -1}, "max_iter must be >= 0"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments(name):
    args, kwargs, text = BAD_ARGUMENTS[name]
    with pytest.raises(ValueError) as caught:
        torchopt.LBFGS(*args, **kwargs)
    assert text in str(caught.value)


def test_arguments_of_another_kind():
    with pytest.raises(TypeError, match=r"goes into torchopt\.solvers\.LBFGS"):
        torchopt.LBFGS([P], line_search_fn=StrongWolfe())
    with pytest.raises(TypeError, match="max_iter must be an integer"):
        torchopt.LBFGS([P], max_iter=2.5)
    with pytest.raises(TypeError, match="parameters"):
        torchopt.LBFGS(torch.nn.Linear(1, 1))


def test_a_second_group_is_refused():
    optimizer, _ = stepped(parameter(-1.2, 1.0))
    before = contents(optimizer)
    with pytest.raises(ValueError, match=r"doesn't support per-parameter options"):
        optimizer.add_param_group({"params": [parameter(1.0)]})
    assert same(contents(optimizer), before)


# Closures ----------------------------------------------------------------------------------------


def without_backward(p):
    return lambda: (setattr(p, "grad", None), rosenbrock(p))[1]


def returning(value):
    def make(p):
        def closure():
            p.grad = None
            rosenbrock(p).backward()
            return value

        return closure

    return make


BAD_CLOSURES = {
    "none": (lambda p: None, TypeError, "needs a closure"),
    "a loss": (rosenbrock, TypeError, "optimizer.step(closure)"),
    "returns nothing": (returning(None), TypeError, "Does it return the loss?"),
    "returns text": (returning("1.0"), TypeError, "must return the loss"),
    "returns several": (returning(torch.ones(2)), ValueError, "mean(), sum()"),
    "returns complex": (returning(torch.tensor(1j)), ValueError, "one real number"),
    "no backward": (without_backward, ValueError, "loss.backward()"),
}


@pytest.mark.parametrize("name", BAD_CLOSURES)
def test_bad_closures(name):
    make, error, text = BAD_CLOSURES[name]
    p = parameter(-1.2, 1.0)
    optimizer, _ = stepped(p)
    before = contents(optimizer)
    with pytest.raises(error) as caught:
        optimizer.step(make(p))
    assert text in str(caught.value)
    assert same(contents(optimizer), before)


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
@pytest.mark.parametrize("calls", [1, 2, 4])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_after_an_exception_in_the_closure_nothing_has_changed(error, calls, search):
    p = parameter(-1.2, 1.0)
    optimizer, closure = stepped(p, line_search_fn=search, lr=1.0 if search else 1e-3, max_iter=8)
    before, count = contents(optimizer), 0

    def interrupted():
        nonlocal count
        count += 1
        if count == calls:
            raise error("in the closure")
        return closure()

    with pytest.raises(error, match="in the closure"):
        optimizer.step(interrupted)
    assert count == calls
    assert same(contents(optimizer), before)
    optimizer.step(closure)  # and it goes on
    assert not torch.equal(p, before[1][0])


# What is not finite ------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_moves_nothing_and_warns():
    p = parameter(-1.2, 1.0)
    optimizer, _ = stepped(p)
    before = contents(optimizer)
    for bad in (float("nan"), float("inf")):

        def closure(bad=bad):
            optimizer.zero_grad()
            (rosenbrock(p) * bad).backward()
            return rosenbrock(p) * bad

        with pytest.warns(RuntimeWarning, match="infinite or nan") as caught:
            optimizer.step(closure)
        assert caught[0].filename == __file__
        assert optimizer.outcome is Outcome.NOT_FINITE
    (saved, params), (entry,) = before, before[0]["state"].values()
    assert torch.equal(p, params[0])
    now = optimizer.state_dict()["state"][0]
    assert now["func_evals"] == entry["func_evals"] + 2
    assert same({**now, "func_evals": 0}, {**saved["state"][0], "func_evals": 0})


def test_a_fixed_step_to_where_the_loss_is_not_finite_is_taken_back():
    # from 2 the first step is to 0.5, and the second to below 0, where the logarithm is nan
    p = parameter(2.0)
    with pytest.warns(RuntimeWarning, match="line_search_fn='strong_wolfe'"):
        optimizer, closure = stepped(
            p, lambda p: 10 * p.sum() - p.log().sum(), line_search_fn=None, lr=1.5
        )
    assert optimizer.outcome is Outcome.NOT_FINITE
    assert p.item() == pytest.approx(0.5)
    optimizer.param_groups[0].update(lr=0.01, max_iter=200, max_eval=300)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(closure)
    assert p.item() == pytest.approx(0.1, rel=0.2)  # where the minimum is


def test_a_line_search_steps_back_from_where_the_loss_is_not_finite():
    p = parameter(2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer, _ = stepped(p, lambda p: 10 * p.sum() - p.log().sum(), lr=50.0, max_iter=30)
    assert optimizer.outcome.success
    assert p.item() == pytest.approx(0.1, rel=1e-6)


# Parameters that change --------------------------------------------------------------------------


def test_a_changed_list_of_parameters_is_refused():
    p, other = parameter(-1.2, 1.0), parameter(0.5, 0.5)
    optimizer, closure = stepped(p)
    for changed in ([p, other], [other], []):
        optimizer.param_groups[0]["params"][:] = changed
        with pytest.raises(ValueError, match=r"not those of the steps before|at least one entry"):
            optimizer.step(closure)
    optimizer.param_groups[0]["params"][:] = [p]
    optimizer.step(closure)
    optimizer.param_groups[0]["params"][:] = [p, other]
    optimizer.state.clear()
    optimizer.step(closure)


def test_another_parameter_of_the_same_shape_is_refused():
    first, second, other = parameter(-1.2), parameter(1.0), parameter(1.0)
    optimizer = torchopt.LBFGS([first, second])

    def closure():
        optimizer.zero_grad()
        loss = rosenbrock(torch.cat(optimizer.param_groups[0]["params"]))
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.param_groups[0]["params"][1] = other
    with pytest.raises(ValueError, match="not those of the steps before"):
        optimizer.step(closure)
    assert other.item() == 1.0


def test_states_of_others_are_not_loaded():
    optimizer, _ = stepped(parameter(-1.2, 1.0))
    before = contents(optimizer)
    adam = torchopt.Adam([parameter(1.0, 2.0)])
    longer, _ = stepped(parameter(-1.2, 1.0, 1.0))
    two = torchopt.LBFGS([parameter(1.0), parameter(1.0)])
    broken = copy.deepcopy(before[0])
    del broken["state"][0]["ro"]
    uneven = copy.deepcopy(before[0])
    uneven["state"][0]["old_dirs"].pop()
    for saved, text in (
        (adam.state_dict(), "not one of LBFGS"),
        (longer.state_dict(), "parameters with [3] entries"),
        (two.state_dict(), "groups of [2] parameters"),
        (broken, "lacks ro"),
        (uneven, "different lengths"),
        ({"state": {}}, "expects a dict with 'state' and 'param_groups'"),
    ):
        with pytest.raises(ValueError) as caught:
            optimizer.load_state_dict(saved)
        assert text in str(caught.value)
        assert same(contents(optimizer), before)
    with pytest.raises(TypeError, match="expects a dict"):
        optimizer.load_state_dict([1])
