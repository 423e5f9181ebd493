"""Nonlinear least squares: found as by SciPy, differentiated in every order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import nonzero
from equations import F64, central_jacobian, decay, decay_data
from tolerances import relative_error
from torch import Tensor
from torch.func import grad, hessian, jacrev

from torchopt.diff import custom_root
from torchopt.linear_solve import solve_cg
from torchopt.solvers import (
    LBFGS,
    Broyden,
    GaussNewton,
    LevenbergMarquardt,
    Outcome,
    Unrolled,
    least_squares,
)


scipy = pytest.importorskip("scipy.optimize")
TIGHT: dict[str, Any] = {"tolerance_grad": 1e-11, "tolerance_change": 0.0}
SOLVERS = {
    "gauss-newton": GaussNewton(**TIGHT),
    "gauss-newton-cg": GaussNewton(linear_solve=solve_cg(), **TIGHT),
    "levenberg-marquardt": LevenbergMarquardt(**TIGHT),
    "levenberg-marquardt-cg": LevenbergMarquardt(linear_solve=solve_cg(), **TIGHT),
}
every = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)


@every
def test_solutions_are_those_of_scipy(solver: Any) -> None:
    y, start = decay_data()
    theirs = scipy.least_squares(
        lambda p: decay(torch.from_numpy(p), y).numpy(), start.numpy(), xtol=1e-15, gtol=1e-13
    )
    solution = least_squares(decay, solver, start, y).checked()
    assert relative_error(solution.params, torch.from_numpy(theirs.x)) < 1e-6
    assert abs(float(solution.value) - theirs.cost) < 1e-12
    r = decay(solution.params, y)
    assert abs(float(solution.value) - r.square().sum().item() / 2) < 1e-15


@pytest.mark.parametrize("seed", range(6))
def test_random_problems(seed: int) -> None:
    """Columns of very different length, from afar: as low as SciPy's method of the same name."""
    torch.manual_seed(seed)
    scale = torch.logspace(-2, 2, 5, **F64)
    a, b, c = torch.randn(12, 5, **F64), torch.randn(12, 5, **F64), torch.randn(12, **F64)

    def fn(p: Tensor) -> Tensor:
        return a @ (scale * p) + 0.3 * (b @ (scale * p)).sin() - c

    start = 5 * torch.randn(5, **F64) / scale
    theirs = scipy.least_squares(
        lambda p: fn(torch.from_numpy(p)).numpy(), start.numpy(), method="lm", xtol=1e-12
    )
    for solver in (LevenbergMarquardt(), GaussNewton()):
        solution = least_squares(fn, solver, start)
        assert solution.outcome.success
        assert abs(float(solution.value) - theirs.cost) <= 1e-6 * theirs.cost


def test_rosenbrock_from_afar() -> None:
    def fn(p: Tensor) -> Tensor:
        return torch.cat([10 * (p[1:] - p[:-1] ** 2), 1 - p[:-1]])

    for solver in (SOLVERS["levenberg-marquardt"], SOLVERS["levenberg-marquardt-cg"]):
        solution = least_squares(fn, solver, torch.tensor([-1.2, 1.0, 3.0], **F64)).checked()
        assert relative_error(solution.params, torch.ones(3, **F64)) < 1e-8


@every
def test_calls_are_counted(solver: Any) -> None:
    calls: list[int] = []
    y, start = decay_data()

    def counted(p: Tensor) -> Tensor:
        calls.append(1)
        return decay(p, y)

    solution = least_squares(counted, solver, start, adjoint=None)
    assert solution.evaluations == len(calls)


def test_dependent_columns() -> None:
    """Only the sum is determined: Gauss-Newton and its relative find one of the solutions."""

    def fn(p: Tensor) -> Tensor:
        return torch.stack([(p[0] + p[1]) ** 2 - 4, p[0] + p[1] - 2])

    solution = least_squares(fn, LevenbergMarquardt(), torch.tensor([1.0, 2.0], **F64)).checked()
    assert abs(solution.params.sum().item() - 2) < 1e-5


@every
def test_implicit_derivatives(solver: Any) -> None:
    """With the second derivatives of residuals that are not zero."""
    y, start = decay_data(0.2)
    weights = nonzero(4)

    def loss(y: Tensor) -> Tensor:
        return (least_squares(decay, solver, start, y).params * weights).sin().sum()

    point = y.clone()
    found = grad(loss)(point)
    p = least_squares(decay, solver, start, y).params

    def half(p: Tensor, y: Tensor) -> Tensor:
        return decay(p, y).square().sum() / 2

    sensitivity = -torch.linalg.solve(hessian(half)(p, y), jacrev(grad(half), 1)(p, y))
    assert relative_error(found, ((p * weights).cos() * weights) @ sensitivity) < 1e-7
    leaf = point.clone().requires_grad_()
    assert relative_error(torch.autograd.grad(loss(leaf), leaf)[0], found) < 1e-9


def test_second_derivatives() -> None:
    y, start = decay_data(0.2)
    scale = torch.tensor([1.0, 0.5], **F64)

    def loss(scale: Tensor) -> Tensor:
        def fn(p: Tensor, scale: Tensor) -> dict[str, Tensor]:
            return {"fit": scale[0] * decay(p, y), "prior": scale[1] * p.sin()}

        return least_squares(fn, SOLVERS["levenberg-marquardt"], start, scale).params.sum()

    assert relative_error(hessian(loss)(scale), central_jacobian(grad(loss), scale)) < 1e-5


@pytest.mark.parametrize("name", ["gauss-newton", "gauss-newton-cg", "levenberg-marquardt"])
def test_recorded_iterations(name: str) -> None:
    y, start = decay_data(0.05)
    y.requires_grad_()
    solver = SOLVERS[name]
    unrolled = least_squares(decay, solver, start, y, adjoint=Unrolled())
    implicit = least_squares(decay, solver, start, y)
    found, wanted = (
        torch.autograd.grad(s.params.sum() + s.value, y)[0] for s in (unrolled, implicit)
    )
    assert relative_error(found, wanted) < 1e-4
    assert not least_squares(decay, solver, start, y, adjoint=None).params.requires_grad


def test_other_solvers_and_custom_root() -> None:
    y, start = decay_data()
    mine = least_squares(decay, SOLVERS["gauss-newton"], start, y)
    other = least_squares(decay, LBFGS(tolerance_grad=1e-9, tolerance_change=0.0), start, y)
    assert relative_error(other.params, mine.params) < 1e-5

    def gradient(p: Tensor, y: Tensor) -> Tensor:
        return grad(lambda p: decay(p, y).square().sum() / 2)(p)

    @custom_root(gradient, argnums=1)
    def solve(start: Tensor, y: Tensor) -> Tensor:
        return least_squares(decay, SOLVERS["gauss-newton"], start, y, adjoint=None).params

    y.requires_grad_()
    (found,) = torch.autograd.grad(solve(start, y).sum(), y)
    implicit = least_squares(decay, SOLVERS["gauss-newton"], start, y)
    assert relative_error(found, torch.autograd.grad(implicit.params.sum(), y)[0]) < 1e-8


def test_what_goes_wrong() -> None:
    y, start = decay_data()
    assert least_squares(decay, GaussNewton(max_iter=1), start, y).outcome is Outcome.MAX_ITER
    assert least_squares(decay, GaussNewton(), start * torch.nan, y).outcome is Outcome.NOT_FINITE
    for call, error, match in (
        (lambda: least_squares(3, GaussNewton(), start), TypeError, "least_squares.fn, solver"),  # pyright: ignore[reportArgumentType]
        (lambda: least_squares(decay, Broyden(), start, y), TypeError, "does not minimise"),
        (lambda: least_squares(lambda p: 3, GaussNewton(), start), TypeError, "residuals that fn"),  # pyright: ignore[reportArgumentType]
        (lambda: LevenbergMarquardt(damping=0.0), ValueError, "damping must be"),
        (lambda: LevenbergMarquardt(attempts=0), ValueError, "attempts must be"),
        (lambda: GaussNewton(linear_solve=3), TypeError, "linear_solve must be"),  # pyright: ignore[reportArgumentType]
    ):
        with pytest.raises(error, match=match):
            call()
