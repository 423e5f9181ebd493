"""Newton's method as a minimiser: the minima of SciPy, in few steps, and no saddle points."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from equations import F64
from solver_problems import logistic_data, logistic_regression, rosenbrock
from tolerances import relative_error
from torch import Tensor

from torchopt.linear_solve import solve_cg, solve_gmres, solve_lu, solve_minres
from torchopt.solvers import LBFGS, Newton, Outcome, minimize


SOLVERS = {
    "dense": Newton(tolerance_grad=1e-9),
    "cg": Newton(linear_solve=solve_cg(), tolerance_grad=1e-9),
    "short cg": Newton(linear_solve=solve_cg(maxiter=3), tolerance_grad=1e-9),
    "minres": Newton(linear_solve=solve_minres(), tolerance_grad=1e-9),
    "gmres": Newton(linear_solve=solve_gmres(), tolerance_grad=1e-9),
    "lu": Newton(linear_solve=solve_lu(), tolerance_grad=1e-9),
}
every = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)


def wells(p: Tensor) -> Tensor:
    """A maximum at zero, minima at ones of any signs, saddle points between."""
    return (p.square() - 1).square().sum()


@every
def test_the_valley_of_rosenbrock(solver: Newton) -> None:
    start = torch.tensor([-1.2, 1.0], **F64)
    solution = minimize(rosenbrock, solver, start).checked()
    assert relative_error(solution.params, torch.ones(2, **F64)) < 1e-8
    assert solution.iterations <= 25
    assert start.tolist() == [-1.2, 1.0]


@every
def test_steps_lead_downhill_from_where_the_hessian_is_indefinite(solver: Newton) -> None:
    minimizer = solver.as_minimizer()
    state = minimizer.init(wells, torch.tensor([0.2, -0.1, 1.2], **F64))
    values = [float(state.value)]
    for _ in range(4):
        state = minimizer.step(wells, state)
        values.append(float(state.value))
    assert all(b < a for a, b in itertools.pairwise(values))


@pytest.mark.parametrize("name", ["dense", "cg", "short cg"])
def test_a_maximum_or_a_saddle_point_nearby_is_left(name: str) -> None:
    """Where a plain Newton step leads: what notices negative curvature goes the other way."""
    for start in ([0.2, -0.1, 0.3], [0.2, -0.1, 1.2]):
        solution = minimize(wells, SOLVERS[name], torch.tensor(start, **F64)).checked()
        wanted = torch.tensor(start, **F64).sign()
        assert relative_error(solution.params, wanted) < 1e-8
    # zero is stationary, and a start from which nothing leads away
    assert minimize(wells, SOLVERS[name], torch.zeros(3, **F64)).iterations == 0


def test_a_convex_problem_takes_a_few_steps() -> None:
    """Fewer than quasi-Newton steps; the same minimum as SciPy's Newton-CG."""
    optimize = pytest.importorskip("scipy.optimize")
    fn, start = logistic_regression(*logistic_data("breast_cancer", torch.float64))

    def numpy(function: Any) -> Any:
        return lambda x: function(torch.from_numpy(x)).numpy()

    theirs = optimize.minimize(
        numpy(fn),
        start.numpy(),
        jac=numpy(torch.func.grad(fn)),
        hess=numpy(torch.func.hessian(fn)),
        method="trust-exact",
        options={"gtol": 1e-10},
    )
    assert theirs.success
    for name in ("dense", "cg"):
        mine = minimize(fn, SOLVERS[name], start).checked()
        # the loss is flat along directions that change all classes alike
        assert abs(float(mine.value) - theirs.fun) < 1e-10
        assert mine.iterations <= 12
    assert mine.iterations < minimize(fn, LBFGS(tolerance_grad=1e-9), start).iterations


def test_many_unknowns_are_solved_by_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """By conjugate gradients; nothing of the size of the Hessian is made."""
    n = 2000
    from torchopt.solvers.linearized import Linearized

    monkeypatch.setattr(Linearized, "matrix", lambda self: pytest.fail("written down"))
    target = torch.linspace(-1, 1, n, **F64)
    fn = lambda p: ((p - target).cosh() - 1).sum() + 0.5 * (p[1:] - p[:-1]).square().sum()  # noqa: E731
    solution = minimize(fn, Newton(), torch.zeros(n, **F64)).checked()
    assert torch.func.grad(fn)(solution.params).abs().max() < 1e-6  # pyright: ignore[reportArgumentType]
    assert solution.iterations < 15
    crossed = minimize(wells, Newton(), torch.full((n,), 0.1, **F64)).checked()
    assert relative_error(crossed.params, torch.ones(n, **F64)) < 1e-6


def test_trees_dtypes_and_complex_numbers() -> None:
    z = torch.tensor([1.0 + 2.0j, -1.0j], dtype=torch.complex128)
    start = {"z": torch.zeros(2, dtype=torch.complex128), "h": torch.ones(2), "n": None}

    def fn(p: Any) -> Tensor:
        return ((p["z"] - z).abs().square() + 1).sqrt().sum() + (p["h"] - 3).cosh().sum()

    solution = minimize(fn, Newton(), start).checked()
    params: Any = solution.params
    assert relative_error(params["z"], z) < 1e-6
    assert params["h"].dtype == torch.float32
    assert relative_error(params["h"], torch.full((2,), 3.0)) < 1e-5
    assert params["n"] is None


def test_ends_have_names() -> None:
    start = torch.tensor([-1.2, 1.0], **F64)
    calls: list[int] = []

    def counted(p: Tensor) -> Tensor:
        calls.append(1)
        return rosenbrock(p)

    ends = {
        Outcome.MAX_ITER: Newton(max_iter=3),
        Outcome.MAX_EVAL: Newton(max_eval=6),
        Outcome.CONVERGED: Newton(),
    }
    for outcome, solver in ends.items():
        calls.clear()
        solution = minimize(counted, solver, start, adjoint=None)
        assert solution.outcome is outcome
        assert solution.evaluations == len(calls)
    assert minimize(lambda p: p.log().sum(), Newton(), start).outcome is Outcome.NOT_FINITE
    whole = minimize(lambda p: (p.exp() - p).sum(), Newton(halvings=0), start * 0 - 50.0)
    assert whole.outcome is Outcome.NOT_FINITE
    linear = minimize(lambda p: p.sum(), Newton(max_iter=4), start)  # no curvature, and no minimum
    assert linear.outcome is Outcome.MAX_ITER
    assert float(linear.value) < -3
