"""Warm starts of linear solves: fewer iterations, and the same solutions and derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import nonzero
from linear_systems import F64, KRYLOV, Row, definite, product, shifted
from tolerances import relative_error
from torch import Tensor
from torch.func import grad, hessian, jacfwd, vmap

from torchopt.diff import Implicit, custom_root
from torchopt.linear_solve import (
    LinearSolveError,
    WarmStart,
    solve_auto,
    solve_cg,
    solve_gmres,
    solve_lu,
    solve_neumann,
    solve_nystrom,
)
from torchopt.solvers import Newton, minimize


N = 30
every = pytest.mark.parametrize("row", KRYLOV, ids=lambda row: row.name)


@every
def test_a_system_that_changes_slowly_takes_fewer_iterations(row: Row) -> None:
    of = shifted if row.make is solve_gmres else row.of  # restarts may stagnate on others
    a, b, turn = of(80, 10.0), torch.randn(80, **F64), torch.randn(80, 80, **F64)
    turn = 1e-6 * (turn + turn.T) / 80
    solver = row.make(rtol=1e-8, on_failure="raise")
    warm, cold = WarmStart(solver), []
    for k in range(6):
        matrix, right = a + k * turn, (1.0 + k) * b
        wanted = solver.solve(product(matrix), right)
        cold.append(wanted.iterations)
        assert relative_error(warm(product(matrix), right), wanted.x) < 1e-5
    later = warm.iterations - cold[0]
    assert later < 0.75 * sum(cold[1:])


def test_a_start_is_never_worse_than_zero() -> None:
    """The multiple of what is kept that leaves the least residual: of no use, it is zero."""
    a, b = definite(N), torch.randn(N, **F64)
    warm = WarmStart(solve_cg(on_failure="raise"))
    x = warm(product(a), b)
    assert warm.solve(product(a), -1e6 * b).iterations == 0
    assert warm.solve(product(a), b, init=torch.randn(N, **F64)).iterations > 5
    other = torch.randn(N, **F64)
    other = other - (other @ a @ x) / (a @ x).square().sum() * (a @ x)  # nothing in common
    wanted = solve_cg().solve(product(a), other)
    assert abs(warm.solve(product(a), other).iterations - wanted.iterations) <= 1
    assert not warm(product(a), 0 * b).any()
    assert relative_error(warm(product(a), b), x) < 1e-8


def test_neumann_series_begin_where_they_are_told() -> None:
    a, b = definite(N, 5.0), torch.randn(N, **F64)
    solver = solve_neumann(on_failure="raise")
    cold = solver.solve(product(a), b)
    near = solver.solve(product(a), b, init=cold.x + 1e-8)
    assert near.iterations < 0.5 * cold.iterations
    assert relative_error(near.x, torch.linalg.solve(a, b)) < 1e-8


# In derivatives ----------------------------------------------------------------------------------

X, Y = torch.randn(120, 40, **F64), torch.randn(120, **F64)
V, Z = torch.randn(20, 40, **F64), torch.randn(20, **F64)


def objective(w: Tensor, strength: Tensor) -> Tensor:
    return ((X[:, : len(w)] @ w - Y).square() + 1).sqrt().mean() + (
        strength.exp() * w.square()
    ).sum()


def validation(strength: Tensor, solve: Any) -> Tensor:
    solver = Newton(tolerance_grad=1e-12, tolerance_change=0.0)
    start = torch.zeros_like(strength)
    w: Any = minimize(objective, solver, start, strength, adjoint=Implicit(solve=solve)).params
    return (V[:, : len(w)] @ w - Z).square().mean()


def test_a_bilevel_loop_takes_fewer_iterations_to_the_same_gradients() -> None:
    """Steps on a strength for each weight; counted, not timed."""
    cold: list[int] = []

    def counted(matvec: Any, b: Any) -> Any:
        solution = solve_cg(rtol=1e-8).solve(matvec, b)
        cold.append(solution.iterations)
        return solution.x

    warm, strength = WarmStart(solve_cg(rtol=1e-8)), torch.full((40,), -3.0, **F64)
    for _ in range(5):
        wanted = grad(validation)(strength, counted)
        found = grad(validation)(strength, warm)
        assert relative_error(found, wanted) < 1e-6
        strength = strength - 0.1 * wanted
    assert warm.iterations < 0.75 * sum(cold)


def test_second_derivatives_forward_mode_and_batches_are_those_of_a_cold_start() -> None:
    strength = -3 + 0.3 * nonzero(5)
    exact, warm = solve_lu(), WarmStart(solve_cg(rtol=1e-12))
    for k in range(2):
        point = strength + 1e-3 * k
        pairs = [
            (grad(validation), 1e-9),
            (hessian(validation), 1e-7),
            (jacfwd(validation), 1e-9),
        ]
        for function, bound in pairs:
            assert relative_error(function(point, warm), function(point, exact)) < bound
        leaf = point.clone().requires_grad_()
        (g,) = torch.autograd.grad(validation(leaf, warm), leaf, create_graph=True)
        (h,) = torch.autograd.grad(g.square().sum(), leaf)
        wanted = 2 * hessian(validation)(point, exact) @ grad(validation)(point, exact)
        assert relative_error(h, wanted) < 1e-7


def test_each_system_of_a_batch_begins_at_its_own() -> None:
    theta = torch.stack([definite(40, c) for c in (2.0, 4.0, 9.0)])
    c = torch.randn(3, 40, **F64)
    warm = WarmStart(solve_cg(on_failure="raise"))

    @custom_root(lambda x, a, c: a @ x - c, argnums=(1, 2), solve=warm)
    def solved(x: Tensor, a: Tensor, c: Tensor) -> Tensor:
        return torch.linalg.solve(a, c)

    def loss(a: Tensor, c: Tensor) -> Tensor:
        return solved(torch.zeros(40, **F64), a, c).sin().sum()

    taken: list[int] = []
    point, found = c, c
    for k in range(3):
        point = c + 1e-9 * k
        before = warm.iterations
        found = vmap(grad(loss, 1))(theta, point)
        taken.append(warm.iterations - before)
        x = torch.linalg.solve(theta, point)
        assert relative_error(found, torch.linalg.solve(theta, x.cos())) < 1e-8
    assert max(taken[1:]) < 0.5 * taken[0]
    one = grad(loss, 1)(theta[0], point[0])  # no level is left behind in what is kept
    assert relative_error(one, found[0]) < 1e-8


def test_derivatives_of_the_solve_itself_have_starts_of_their_own() -> None:
    a, b = definite(N, 30.0), torch.randn(N, **F64)
    warm = WarmStart(solve_cg(on_failure="raise"))
    taken: list[int] = []
    for k in range(3):
        right = (b + 1e-9 * k).requires_grad_()
        before = warm.iterations
        x: Any = warm(product(a), right)
        (found,) = torch.autograd.grad(x.square().sum(), right)
        taken.append(warm.iterations - before)
        assert relative_error(found, 2 * torch.linalg.solve(a, x.detach())) < 1e-8
    assert max(taken[1:]) < 0.5 * taken[0]


# What goes wrong ---------------------------------------------------------------------------------


def test_what_failed_is_not_kept() -> None:
    a, b = definite(N), torch.randn(N, **F64)
    warm = WarmStart(solve_cg(on_failure="raise", maxiter=100))
    warm(product(a), b)
    count = warm.iterations
    for bad in (torch.full_like(b, torch.nan), b):
        with pytest.raises(LinearSolveError):
            warm(product(a if bad is not b else -a), bad if bad is not b else torch.randn(N, **F64))
    assert warm.iterations == count
    assert warm.solve(product(a), b).iterations == 0
    warm.reset()
    assert warm.iterations == 0
    assert warm.solve(product(a), b).iterations > 5
    half = warm.solve(lambda v: a.float() @ v, b.float())  # another dtype is another kind
    assert half.iterations > 5


def test_refusals() -> None:
    for solver, text in (
        (solve_lu(), "solves without iterations"),
        (solve_nystrom(rank=3, rho=1.0), "solves without iterations"),
        (torch.linalg.solve, "must be a linear solver that iterates"),
    ):
        with pytest.raises(TypeError, match=text):
            WarmStart(solver)
    assert "CG" in repr(WarmStart(solve_cg()))
    a, b = definite(4), torch.randn(4, **F64)
    assert relative_error(WarmStart(solve_auto())(product(a), b), torch.linalg.solve(a, b)) < 1e-8
