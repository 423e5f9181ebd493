"""Linear solvers: the solution, against SciPy and NumPy, and what is said where there is none."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from conftest import nonzero
from linear_systems import (
    F64,
    IDS,
    KRYLOV,
    ROWS,
    Row,
    definite,
    general,
    indefinite,
    made,
    product,
    shifted,
    spectrum,
)
from tolerances import relative_error
from torch import Tensor

from torchopt import linear_solve
from torchopt.linear_solve import LinearSolveError, LinearSolveWarning, Outcome


every = pytest.mark.parametrize("row", ROWS, ids=IDS)
sparse = pytest.importorskip("scipy.sparse.linalg")


@every
@pytest.mark.parametrize("complex_", [False, True], ids=["real", "complex"])
def test_solutions_are_those_of_numpy(row: Row, complex_: bool) -> None:
    n = 12
    a = row.of(n, complex_=complex_)
    b = torch.randn(n, dtype=a.dtype)
    solution = made(row).solve(product(a), b)
    assert solution.outcome is Outcome.CONVERGED
    wanted = torch.from_numpy(np.linalg.solve(a.numpy(), b.numpy()))
    assert relative_error(solution.x, wanted) < 1e-8
    true = torch.linalg.vector_norm(b - a @ solution.x).item()
    assert abs(true - solution.residual) <= 1e-14 * n
    assert true <= 1e-10 * torch.linalg.vector_norm(b).item()


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
@pytest.mark.parametrize(
    ("make", "of", "peer"),
    [
        (linear_solve.solve_cg, definite, sparse.cg),
        (linear_solve.solve_minres, definite, sparse.minres),
        (linear_solve.solve_gmres, general, sparse.gmres),
        (linear_solve.solve_bicgstab, shifted, sparse.bicgstab),
    ],
    ids=["cg", "minres", "gmres", "bicgstab"],
)
def test_krylov_methods_are_as_good_as_those_of_scipy(
    make: Any, of: Any, peer: Any, condition: float
) -> None:
    """To the same residual in no more than twice the products, whatever the condition."""
    n = 40
    a, b = of(n, condition), torch.randn(n, **F64)
    counted: list[int] = []
    linear = sparse.LinearOperator(
        (n, n), lambda v: (counted.append(1), a.numpy() @ v.reshape(-1))[1], dtype=np.float64
    )
    options: dict[str, Any] = {"restart": n} if peer is sparse.gmres else {}
    x, _ = peer(linear, b.numpy(), rtol=1e-8, maxiter=4000, **options)
    theirs = np.linalg.norm(b.numpy() - a.numpy() @ x) / b.norm().item()
    solution = make(rtol=1e-8, maxiter=4000, on_failure="raise", **options).solve(product(a), b)
    assert solution.residual <= 1e-8 * b.norm().item()
    products = solution.iterations * (2 if peer is sparse.bicgstab else 1)
    if theirs <= 1e-8:
        assert products <= 2 * len(counted) + 10
    error = relative_error(solution.x, torch.linalg.solve(a, b))
    assert error <= 1e-8 * condition


@pytest.mark.parametrize("row", [r for r in ROWS if not r.iterates], ids=lambda r: r.name)
@pytest.mark.parametrize("condition", [1e6, 1e12])
def test_dense_solvers_are_as_good_as_rounding_allows(row: Row, condition: float) -> None:
    a, b = row.of(20, condition), torch.randn(20, **F64)
    x = made(row)(product(a), b)
    assert relative_error(x, torch.linalg.solve(a, b)) < 1e-14 * condition


@every
def test_trees_of_any_shapes(row: Row) -> None:
    """0-d leaves count as one entry, ``None`` stays, dtypes come back."""
    a = row.of(8)
    like = {"s": nonzero(), "w": (nonzero(2, 3), None), "f": nonzero(1).float()}

    def matvec(v: Any) -> Any:
        flat = torch.cat([v["s"].reshape(1), v["w"][0].reshape(-1), v["f"].double()])
        out = a @ flat
        return {"s": out[0], "w": (out[1:7].reshape(2, 3), None), "f": out[7:].float()}

    x = made(row, rtol=1e-5)(matvec, like)
    assert x["s"].shape == ()
    assert x["w"][1] is None
    assert x["f"].dtype == torch.float32
    flat = torch.cat([like["s"].reshape(1), like["w"][0].reshape(-1), like["f"].double()])
    found = torch.cat([x["s"].reshape(1), x["w"][0].reshape(-1), x["f"].double()])
    assert relative_error(found, torch.linalg.solve(a, flat)) < 1e-3


@every
def test_a_scalar_system(row: Row) -> None:
    """TorchOpt 0.7.3 took the size of a scalar for zero and returned zero."""
    x = made(row)(lambda v: 4 * v, torch.tensor(6.0, **F64))
    assert x.shape == ()
    assert abs(x.item() - 1.5) < 1e-9


@every
def test_zero_has_the_solution_zero(row: Row) -> None:
    for matvec in (product(row.of(5)), lambda v: 0 * v):
        solution = made(row).solve(matvec, torch.zeros(5, **F64), init=nonzero(5))
        assert torch.equal(solution.x, torch.zeros(5, **F64))
        assert (solution.iterations, solution.residual) == (0, 0.0)
        assert solution.outcome.success
    assert made(row)(lambda v: v, torch.zeros(0)).shape == (0,)


@every
def test_lucky_ends(row: Row) -> None:
    """A multiple of the identity, where the first vector solves; and a start that solves."""
    b = nonzero(6)
    for c in (1.0, 3.0):
        solution = made(row).solve(lambda v, c=c: c * v, b)
        assert relative_error(solution.x, b / c) < 1e-9
        assert solution.iterations <= 2 or row.make is linear_solve.solve_neumann
    if row in KRYLOV:
        a = row.of(6)
        solution = made(row).solve(product(a), a @ b, init=b)
        assert solution.iterations == 0
        assert torch.equal(solution.x, b)


@pytest.mark.parametrize("row", KRYLOV, ids=lambda row: row.name)
def test_starts(row: Row) -> None:
    """A start near the solution takes fewer iterations; one of ``nan`` is none."""
    a, b = row.of(30, 1e2), torch.randn(30, **F64)
    solver = made(row)
    cold = solver.solve(product(a), b)
    near = solver.solve(product(a), b, init=cold.x + 1e-6 * torch.randn(30, **F64))
    assert near.iterations < cold.iterations or row.make is linear_solve.solve_gmres
    assert near.outcome.success
    fresh = solver.solve(product(a), b, init=torch.full((30,), torch.nan, **F64))
    assert torch.equal(fresh.x, cold.x)
    kept = made(row, init=cold.x).solve(product(a), b)
    assert kept.iterations == 0


@every
def test_what_is_not_solved_says_so(row: Row) -> None:
    """A singular matrix and ``nan``: a warning by default, an error by choice, a named outcome."""
    singular = torch.diag(torch.tensor([1.0, 2.0, 3.0, 0.0], **F64))
    b = nonzero(4)
    options = {"maxiter": 300} if row.iterates else {}
    with pytest.warns(LinearSolveWarning, match=f"{row.name if row.iterates else 'solve_'}"):
        solution = row.make(**options).solve(product(singular), b)
    assert not solution.outcome.success
    assert solution.outcome is not Outcome.CONVERGED
    with pytest.raises(LinearSolveError) as error:
        made(row, **options)(product(singular), b)
    assert error.value.outcome is solution.outcome
    assert solution.outcome.text in str(error.value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ignored = made(row, on_failure="ignore").solve(product(definite(4)), torch.nan * b)
        assert ignored.outcome is Outcome.NON_FINITE
        broken = made(row, on_failure="ignore").solve(lambda v: v * torch.nan, b)
        assert broken.outcome is Outcome.NON_FINITE


@pytest.mark.parametrize(
    ("make", "a", "outcome"),
    [
        (linear_solve.solve_cg, torch.diag(torch.tensor([1.0, -1.0])), "NOT_POSITIVE_DEFINITE"),
        (linear_solve.solve_cholesky, -torch.eye(2), "NOT_POSITIVE_DEFINITE"),
        (linear_solve.solve_cg, torch.diag(torch.tensor([1.0, 0.0])), "SINGULAR"),
        (linear_solve.solve_normal_cg, torch.diag(torch.tensor([1.0, 0.0])), "SINGULAR"),
        (linear_solve.solve_minres, torch.diag(torch.tensor([1.0, 0.0])), "SINGULAR"),
        (linear_solve.solve_gmres, torch.diag(torch.tensor([1.0, 0.0])), "SINGULAR"),
        (linear_solve.solve_lu, torch.tensor([[1.0, 1.0], [1.0, 1.0 + 1e-16]]), "SINGULAR"),
        (linear_solve.solve_bicgstab, torch.tensor([[0.0, -1.0], [1.0, 0.0]]), "BREAKDOWN"),
        (linear_solve.solve_neumann, -torch.eye(2), "DIVERGED"),
        (linear_solve.solve_neumann, torch.diag(torch.tensor([1.0, 1e-6])), "MAX_STEPS"),
        (linear_solve.solve_cholesky, torch.tensor([[2.0, 3.0], [-1.0, 2.0]]), "STAGNATED"),
    ],
)
def test_names_of_failures(make: Any, a: Tensor, outcome: str) -> None:
    options = {"maxiter": 50} if outcome == "MAX_STEPS" else {}
    solver = make(on_failure="ignore", **options)
    solution = solver.solve(product(a.double()), torch.tensor([1.0, 2.0], **F64))
    assert solution.outcome is Outcome[outcome]


def test_a_short_restart_may_stagnate_and_says_so() -> None:
    """A cyclic shift: nothing is gained before the last vector."""
    n = 10
    solver = linear_solve.solve_gmres(restart=n - 1, on_failure="ignore")
    b = torch.eye(n, **F64)[0]
    assert solver.solve(lambda v: v.roll(1), b).outcome is Outcome.STAGNATED
    whole = linear_solve.solve_gmres(restart=n, on_failure="raise")
    assert relative_error(whole(lambda v: v.roll(1), b), b.roll(-1)) < 1e-12


def test_float32_does_not_believe_its_recurrence() -> None:
    """The residual is that of ``x``: small, or called stagnated."""
    a, b = definite(20, 1e5).float(), torch.randn(20)
    for make in (linear_solve.solve_cg, linear_solve.solve_minres, linear_solve.solve_bicgstab):
        solution = make(on_failure="ignore", maxiter=150).solve(product(a), b)
        true = torch.linalg.vector_norm(b - a @ solution.x).item()
        assert abs(solution.residual - true) <= 1e-3 * true + 1e-6
        assert solution.outcome.success == (solution.residual <= 1e-5 * b.norm().item())


def test_tolerances_are_relative_and_absolute() -> None:
    a, b = definite(50, 1e3), 1e-3 * torch.randn(50, **F64)
    size = b.norm().item()
    rough = linear_solve.solve_cg(rtol=1e-2).solve(product(a), b)
    fine = linear_solve.solve_cg(rtol=1e-6).solve(product(a), b)
    assert rough.iterations < fine.iterations
    assert 1e-6 * size < rough.residual <= 1e-2 * size
    absolute = linear_solve.solve_cg(rtol=0.0, atol=1e-5).solve(product(a), b)
    assert absolute.residual <= 1e-5
    assert absolute.iterations < fine.iterations
    with pytest.warns(LinearSolveWarning, match="max_steps after 3 iterations"):
        linear_solve.solve_cg(maxiter=3)(product(a), b)


@pytest.mark.parametrize("row", KRYLOV, ids=lambda row: row.name)
def test_preconditioners_change_the_way_only(row: Row) -> None:
    """Badly scaled rows and columns, undone by the preconditioner."""
    n = 30
    d = torch.logspace(0, 3, n, **F64)
    scale = d.outer(d)
    a = (definite(n, 5.0) if row.of is not general else shifted(n, 5.0)) * scale
    b = torch.randn(n, **F64)
    power = -4 if row.make is linear_solve.solve_normal_cg else -2
    options = {"restart": n} if row.make is linear_solve.solve_gmres else {}
    plain = row.make(maxiter=400, on_failure="ignore", rtol=1e-8, **options)
    better = made(row, preconditioner=lambda v: d**power * v, rtol=1e-8, maxiter=400, **options)
    without, with_it = plain.solve(product(a), b), better.solve(product(a), b)
    assert with_it.outcome.success
    assert relative_error(d * with_it.x, d * torch.linalg.solve(a, b)) < 1e-5
    assert with_it.iterations < without.iterations or options


@pytest.mark.parametrize("ridge", [0.5, torch.tensor(0.5, **F64)], ids=["number", "tensor"])
@every
def test_ridges_are_added(row: Row, ridge: Any) -> None:
    a, b = row.of(8), torch.randn(8, **F64)
    eye = torch.eye(8, **F64)
    x = made(row, ridge=ridge)(product(a), b)
    normal = row.make is linear_solve.solve_normal_cg
    matrix, right = (a.T @ a, a.T @ b) if normal else (a, b)
    assert relative_error(x, torch.linalg.solve(matrix + 0.5 * eye, right)) < 1e-8


def test_minres_finds_the_solution_of_least_norm() -> None:
    a = indefinite(8) * 1.0
    q, _ = torch.linalg.qr(torch.randn(8, 8, **F64))
    values = torch.tensor([3.0, -2.0, 1.0, 0.5, -0.3, 2.0, 0.0, 0.0], **F64)
    a = q * values @ q.T
    b = a @ torch.randn(8, **F64)
    x = linear_solve.solve_minres(on_failure="raise")(product(a), b)
    assert relative_error(x, torch.linalg.pinv(a) @ b) < 1e-8


def test_the_neumann_series_reports_its_last_term() -> None:
    a, b = definite(6, 20.0), torch.randn(6, **F64)
    solver = linear_solve.solve_neumann(step=0.5, maxiter=30, on_failure="ignore")
    solution = solver.solve(product(a), b)
    step, terms = torch.eye(6, **F64) - 0.5 * a, [0.5 * b]
    for _ in range(29):
        terms.append(step @ terms[-1])
    assert relative_error(solution.x, sum(terms[1:], terms[0])) < 1e-12
    assert solution.extra is not None
    assert relative_error(solution.extra, terms[-1].norm()) < 1e-12
    assert solution.outcome is Outcome.MAX_STEPS


def test_nystrom_is_as_good_as_what_it_leaves_out() -> None:
    n, rho = 40, 0.1
    q = torch.linalg.qr(torch.randn(n, n, **F64)).Q
    a, b = q * spectrum(n, 1e8) @ q.T, torch.randn(n, **F64)
    exact = torch.linalg.solve(a + rho * torch.eye(n, **F64), b)
    errors = []
    for rank in (2, 10, n):
        solver = linear_solve.solve_nystrom(rank=rank, rho=rho, rtol=1e-6)
        solution = solver.solve(product(a), b)
        errors.append(relative_error(solution.x, exact))
        true = torch.linalg.vector_norm(b - a @ solution.x - rho * solution.x)
        assert abs(solution.residual - true.item()) < 1e-10
        assert (solution.outcome is Outcome.CONVERGED) == (true <= 1e-6 * b.norm()).item()
    assert errors[0] > 2 * errors[1] > errors[2]
    assert errors[2] < 1e-6
    better_m = linear_solve.nystrom_preconditioner(product(a), b, rank=15, rho=1e-4)
    better_m.check(b)
    plain, better = (
        linear_solve.solve_cg(ridge=1e-4, preconditioner=m).solve(product(a), b)
        for m in (None, better_m)
    )
    assert better.iterations < 0.5 * plain.iterations
    with pytest.raises(ValueError, match="not positive semidefinite"):
        linear_solve.nystrom_preconditioner(product(-a), b, rank=5, rho=0.1)
