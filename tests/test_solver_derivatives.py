"""Every solver: differentiated by default, by its steps, and inside of ``custom_root``."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from equations import F64
from solver_problems import central_difference
from tolerances import META_GRADIENT, relative_error
from torch import Tensor
from torch.func import grad, jacrev

import torchopt
from torchopt import solvers
from torchopt.diff import Implicit, Unrolled, custom_root
from torchopt.linear_solve import solve_cg
from torchopt.solvers import find_root, fixed_point, least_squares, minimize


N = 3
TIGHT: dict[str, Any] = {"tolerance_grad": 1e-11, "tolerance_change": 0.0}
START = torch.zeros(N, **F64)
WEIGHTS = torch.tensor([0.5, -1.0, 2.0], **F64)


def objective(p: Tensor, a: Tensor) -> Tensor:
    """Strictly convex and not quadratic, with its minimum a function of ``a``."""
    return (p - a).cosh().sum() + 0.25 * (p.sum() * a[0] - 1).square()


def residuals(p: Tensor, a: Tensor) -> Tensor:
    return torch.cat([(p - a).sinh(), 0.2 * (p.square() - a.cos()), 0.2 * (p * a[1] - 1)])


def root(p: Tensor, a: Tensor) -> Tensor:
    """Zero where each entry, by itself, balances its own of ``a``; rising."""
    return p + p**3 / 3 - a


def contraction(p: Tensor, a: Tensor) -> Tensor:
    return 0.5 * (p + 0.3 * p.flip(0)).sin() + a


def descent(tx: Any) -> Any:
    return solvers.GradientDescent(tx, **{**TIGHT, "max_iter": 100})


@dataclass(frozen=True)
class Row:
    """A solver, and what it solves."""

    solver: Any
    run: Callable[..., Any]
    fn: Callable[..., Any]
    recorded: float | None = META_GRADIENT  # how near the derivative of its steps comes


ROWS = {
    "sgd": Row(descent(torchopt.sgd(0.6)), minimize, objective),
    "nesterov": Row(descent(torchopt.sgd(0.5, momentum=0.3, nesterov=True)), minimize, objective),
    "adagrad": Row(descent(torchopt.adagrad(1.0)), minimize, objective),
    "rmsprop": Row(descent(torchopt.rmsprop(0.05, momentum=0.1)), minimize, objective),
    "lbfgs": Row(solvers.LBFGS(**TIGHT), minimize, objective, 1e-4),
    "newton": Row(solvers.Newton(**TIGHT), minimize, objective),
    "newton-cg": Row(solvers.Newton(linear_solve=solve_cg(), **TIGHT), minimize, objective),
    "gauss-newton": Row(solvers.GaussNewton(**TIGHT), least_squares, residuals),
    "levenberg-marquardt": Row(solvers.LevenbergMarquardt(**TIGHT), least_squares, residuals, 1e-4),
    "squares-by-newton": Row(solvers.Newton(**TIGHT), least_squares, residuals),
    "newton-root": Row(solvers.Newton(**TIGHT), find_root, root),
    "broyden": Row(solvers.Broyden(jacobian="jacobian", **TIGHT), find_root, root, 1e-3),
    "bisection": Row(
        solvers.Bisection(lower=-3.0, upper=3.0, tolerance_grad=1e-12), find_root, root, None
    ),
    "iteration": Row(solvers.FixedPointIteration(**TIGHT), fixed_point, contraction),
    "anderson": Row(solvers.Anderson(**TIGHT), fixed_point, contraction, 1e-3),
}
every = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)


def parameters() -> Tensor:
    return torch.tensor([0.4, -0.3, 0.7], **F64)


def loss(row: Row, a: Tensor, **options: Any) -> Tensor:
    params: Any = row.run(row.fn, row.solver, START, a, **options).params
    return (WEIGHTS * params).sin().sum()


def test_no_solver_is_left_out() -> None:
    kinds = {
        kind
        for kind in vars(solvers).values()
        if inspect.isclass(kind)
        and issubclass(kind, solvers.Solver)
        and not inspect.isabstract(kind)
    }
    assert kinds <= {type(row.solver) for row in ROWS.values()}


@every
def test_by_default_it_is_the_implicit_derivative(row: Row) -> None:
    a = parameters()
    wanted = central_difference(lambda a: loss(row, a, adjoint=None), a)
    assert inspect.signature(row.run).parameters["adjoint"].default == Implicit()
    assert relative_error(grad(lambda a: loss(row, a))(a), wanted) < META_GRADIENT
    a.requires_grad_()
    assert relative_error(torch.autograd.grad(loss(row, a), a)[0], wanted) < META_GRADIENT
    solution = row.run(row.fn, row.solver, START, a).checked()
    assert solution.params.requires_grad
    assert not row.run(row.fn, row.solver, START, a, adjoint=None).params.requires_grad


@every
def test_recorded_steps_have_the_same_derivative(row: Row) -> None:
    a = parameters().requires_grad_()
    if row.recorded is None:  # signs have none
        assert not row.run(row.fn, row.solver, START, a, adjoint=Unrolled()).params.requires_grad
        return
    wanted = central_difference(lambda a: loss(row, a, adjoint=None), a.detach())
    (found,) = torch.autograd.grad(loss(row, a, adjoint=Unrolled()), a)
    assert relative_error(found, wanted) < row.recorded


@every
def test_inside_custom_root(row: Row) -> None:
    condition, _ = row.solver.condition(row.fn)
    if row.run is minimize or row.run is least_squares:
        scalar = row.fn if row.run is minimize else lambda p, a: row.fn(p, a).square().sum() / 2
        condition = grad(scalar)
    elif row.run is fixed_point:
        condition = lambda p, a: p - row.fn(p, a)  # noqa: E731

    @custom_root(condition, argnums=1)
    def solve(start: Tensor, a: Tensor) -> Tensor:
        return row.run(row.fn, row.solver, start, a, adjoint=None).checked().params

    a = parameters()
    wanted = central_difference(lambda a: loss(row, a, adjoint=None), a)
    outer = WEIGHTS * (WEIGHTS * solve(START, a)).cos()
    assert relative_error(outer @ jacrev(solve, 1)(START, a), wanted) < META_GRADIENT
    b = a.clone().requires_grad_()
    (found,) = torch.autograd.grad((WEIGHTS * solve(START, b)).sin().sum(), b)
    assert relative_error(found, wanted) < META_GRADIENT


def test_the_start_of_a_minimisation_may_require_grad() -> None:
    """As parameters do; whoever asks for a derivative is told that the start has none."""
    start = torch.zeros(N, **F64, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = minimize(lambda p: objective(p, parameters()), solvers.LBFGS(), start)
    assert not solution.params.requires_grad  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.warns(UserWarning, match="Only the start"):
        minimize(lambda p: objective(p, parameters()), solvers.LBFGS(), start, adjoint=Implicit())


def test_what_a_function_closes_over_is_differentiated_by_default() -> None:
    a = parameters().requires_grad_()
    solution: Any = minimize(lambda p: objective(p, a), solvers.Newton(), START)
    (found,) = torch.autograd.grad(solution.params.sum() + solution.value, a)
    wanted = central_difference(
        lambda a: (lambda s: s.params.sum() + s.value)(
            minimize(lambda p: objective(p, a), solvers.Newton(**TIGHT), START, adjoint=None)
        ),
        a.detach(),
    )
    assert relative_error(found, wanted) < META_GRADIENT
