"""Linear systems that hold ``nan``, or that an approximation cannot be made of: never a number."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from linear_systems import ROWS, Row
from tolerances import relative_error
from torch import Tensor

from torchopt.diff.implicit import custom_root
from torchopt.linear_solve import (
    LinearSolveError,
    LinearSolveWarning,
    Outcome,
    solve_bicgstab,
    solve_cg,
    solve_nystrom,
)


F64 = {"dtype": torch.float64}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("where", ["b", "A"])
def test_the_solution_is_nan_and_not_the_start(row: Row, where: str, value: float) -> None:
    b, factor = torch.ones(3, **F64), 1.0
    b, factor = (b * value, factor) if where == "b" else (b, value)
    with pytest.warns(LinearSolveWarning, match="non_finite"):
        solution = row.make().solve(lambda v: 0.5 * factor * v, b)
    assert solution.outcome is Outcome.NON_FINITE
    assert bool(solution.x.isnan().all())


def test_other_members_of_a_batch_are_solved() -> None:
    b = torch.ones(3, 2, **F64)
    b[1] = torch.nan
    solver = solve_cg(on_failure="ignore")
    x = torch.func.vmap(lambda b: solver(lambda v: 2 * v, b))(b)
    assert bool(x[1].isnan().all())
    assert torch.equal(x[::2], torch.full((2, 2), 0.5, **F64))


@pytest.mark.parametrize("solve", [None, solve_cg()], ids=["chosen", "cg"])
@pytest.mark.parametrize("kind", ["loss", "jacobian"])
def test_an_implicit_derivative_is_refused(solve: Any, kind: str) -> None:
    """A gradient of zero would let a training go on as if nothing had been."""

    def condition(x: Tensor, a: Tensor) -> Tensor:
        return (x - a).sqrt() if kind == "jacobian" else x - a

    root = custom_root(condition, argnums=1, solve=solve)(lambda x, a: a.clone())
    a = torch.ones((), requires_grad=True)
    loss = root(torch.zeros(()), a) * (torch.nan if kind == "loss" else 1.0)
    with pytest.warns(LinearSolveWarning), pytest.raises(RuntimeError, match="not finite"):
        loss.backward()
    assert a.grad is None


def test_an_iteration_that_bursts_is_not_blamed_on_the_system() -> None:
    a = torch.diag(torch.tensor([1.0, 2.0, 0.0, 3.0], **F64))
    solver = solve_bicgstab(on_failure="ignore")
    solution = solver.solve(lambda v: a @ v, torch.ones(4, **F64))
    assert solution.outcome is Outcome.BREAKDOWN
    assert bool(solution.x.isfinite().all())


def test_nystrom_tells_of_what_is_no_approximation() -> None:
    """That it is approximate was asked for; that the operator is indefinite was not."""
    d, b = torch.tensor([1.0, -1.0, 2.0], **F64), torch.ones(3, **F64)
    with pytest.warns(LinearSolveWarning, match="not_positive_definite"):
        solve_nystrom(rank=3, rho=0.1)(lambda v: d * v, b)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = solve_nystrom(rank=1, rho=0.1).solve(lambda v: d.abs() * v, b)
    assert solution.outcome is Outcome.APPROXIMATE
    with pytest.raises(LinearSolveError):
        solve_nystrom(rank=1, rho=0.1, on_failure="raise")(lambda v: d.abs() * v, b)


def test_nystrom_of_full_rank_is_exact_however_small_rho_is() -> None:
    g = torch.Generator().manual_seed(0)
    root = torch.randn(4, 4, generator=g, **F64)
    a, b = root @ root.T + torch.eye(4), torch.randn(4, generator=g, **F64)
    x = solve_nystrom(rank=4, rho=1e-12)(lambda v: a @ v, b)
    assert relative_error(x, torch.linalg.solve(a, b)) < 1e-9
