"""A few iterations of a linear solver: the iterate that was reached, though its residual rose."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from linear_systems import F64, definite, indefinite, product
from tolerances import relative_error
from torch import Tensor

from torchopt import linear_solve
from torchopt.diff import Implicit
from torchopt.linear_solve import LinearSolveError, LinearSolveWarning, Outcome
from torchopt.solvers import LBFGS, minimize


sparse = pytest.importorskip("scipy.sparse.linalg")
QUIET: dict[str, Any] = {"on_failure": "ignore"}


def hessian_of_a_network() -> tuple[Tensor, Tensor]:
    """Return the Hessian of a small network at its minimum, as iMAML has it, and a cotangent.

    Mostly in directions of little curvature, for which the residual rises at first.
    """
    x = torch.randn(20, 5, **F64) * torch.logspace(0, -1, 5, **F64)
    y, start = torch.randint(0, 3, (20,)), torch.randn(18, **F64)

    def loss(p: Tensor) -> Tensor:
        bias = torch.cat([p[16:], torch.zeros(1, **F64)])
        logits = torch.tanh(x @ p[:10].view(5, 2)) @ p[10:16].view(2, 3) + bias
        near = 0.5 * 0.01 * (p - start).square().sum()
        return torch.nn.functional.cross_entropy(logits, y) + near

    params: Any = minimize(loss, LBFGS(), start).params
    hessian: Any = torch.func.hessian(loss)(params)
    values, vectors = torch.linalg.eigh(hessian)
    return hessian, vectors @ (values**-0.5 * torch.randn(18, **F64).sign())


def iterates(a: Tensor, b: Tensor, count: int, **options: Any) -> list[Tensor]:
    """Return the first iterates of SciPy's conjugate gradients."""
    found: list[Tensor] = []
    sparse.cg(
        a.numpy(),
        b.numpy(),
        maxiter=count,
        rtol=0.0,
        callback=lambda x: found.append(torch.from_numpy(x.copy())),
        **options,
    )
    return found


def test_truncated_cg_is_that_of_scipy_though_the_residual_rises() -> None:
    a, b = hessian_of_a_network()
    risen = 0
    for k, x in enumerate(iterates(a, b, 5), 1):
        risen += bool(torch.linalg.vector_norm(b - a @ x) > torch.linalg.vector_norm(b))
        solution = linear_solve.solve_cg(maxiter=k, **QUIET).solve(product(a), b)
        assert relative_error(solution.x, x) < 1e-10
        assert (solution.outcome, solution.iterations) == (Outcome.MAX_STEPS, k)
        assert abs(solution.residual - torch.linalg.vector_norm(b - a @ x).item()) < 1e-9
    assert risen
    with pytest.warns(LinearSolveWarning, match="max_steps after 5 iterations"):
        linear_solve.solve_cg(maxiter=5)(product(a), b)
    with pytest.raises(LinearSolveError) as error:
        linear_solve.solve_cg(maxiter=5, on_failure="raise")(product(a), b)
    assert error.value.outcome is Outcome.MAX_STEPS


def test_truncated_cg_from_a_start_and_with_a_preconditioner() -> None:
    a, b = hessian_of_a_network()
    start, inverse = torch.randn(18, **F64), torch.linspace(0.5, 2.0, 18, **F64)
    wanted = iterates(a, b, 4, x0=start.numpy(), M=np.diag(inverse.numpy()))[-1]
    solver = linear_solve.solve_cg(maxiter=4, preconditioner=lambda v: inverse * v, **QUIET)
    assert relative_error(solver(product(a), b, init=start), wanted) < 1e-10


def test_truncated_cg_of_a_batch() -> None:
    """Each system by itself: one whose residual rises, one whose falls, one that is solved."""
    a, b = hessian_of_a_network()
    eye = torch.eye(18, **F64)
    matrices = torch.stack([a, definite(18, 5.0), eye])
    solver = linear_solve.solve_cg(maxiter=2, **QUIET)
    found = torch.func.vmap(lambda a: solver(lambda v: a @ v, b))(matrices)
    for k in range(2):
        assert relative_error(found[k], iterates(matrices[k], b, 2)[-1]) < 1e-10
    assert relative_error(found[2], b) < 1e-12


def test_truncated_cg_on_the_normal_equations() -> None:
    """With a ridge they are a definite system of their own, and the residual may rise as well."""
    root, b = hessian_of_a_network()
    normal = root.T @ root + 1e-4 * torch.eye(18, **F64)
    b = torch.linalg.solve(root.T, b)
    right, risen = root.T @ b, 0
    for k, x in enumerate(iterates(normal, right, 5), 1):
        risen += bool(torch.linalg.vector_norm(right - normal @ x) > right.norm())
        solver = linear_solve.solve_normal_cg(maxiter=k, ridge=1e-4, **QUIET)
        assert relative_error(solver(product(root), b), x) < 1e-8
    assert risen


def test_truncated_minres_with_a_preconditioner() -> None:
    """It lowers the residual in the norm of the preconditioner: the Euclidean one may rise."""
    a, b = indefinite(18, 1e3), torch.randn(18, **F64)
    inverse = torch.logspace(0, -4, 18, **F64)
    risen = 0
    for k in range(1, 7):
        wanted, _ = sparse.minres(
            a.numpy(), b.numpy(), M=np.diag(inverse.numpy()), rtol=1e-30, maxiter=k
        )
        x = torch.from_numpy(wanted)
        risen += bool(torch.linalg.vector_norm(b - a @ x) > torch.linalg.vector_norm(b))
        solver = linear_solve.solve_minres(maxiter=k, preconditioner=lambda v: inverse * v, **QUIET)
        solution = solver.solve(product(a), b)
        assert relative_error(solution.x, x) < 1e-8
        assert solution.outcome is Outcome.MAX_STEPS
    assert risen


def test_where_cg_meets_what_it_is_not_made_for_nothing_gets_worse() -> None:
    """A direction without curvature: the iterate is taken only if its residual is smaller."""
    b = torch.randn(18, **F64)
    for seed in range(10):
        torch.manual_seed(seed)
        solution = linear_solve.solve_cg(**QUIET).solve(product(indefinite(18, 1e2)), b)
        assert solution.outcome is Outcome.NOT_POSITIVE_DEFINITE
        assert solution.residual <= torch.linalg.vector_norm(b).item()


def test_an_implicit_derivative_by_a_few_iterations() -> None:
    """What iMAML does: the hypergradient of the second iterate, and a warning."""
    a, b = hessian_of_a_network()
    shift = torch.randn(18, **F64, requires_grad=True)

    def loss(p: Tensor, shift: Tensor) -> Tensor:
        return 0.5 * p @ a @ p - shift @ p

    start = torch.linalg.solve(a, shift.detach())
    adjoint = Implicit(solve=linear_solve.solve_cg(maxiter=2))
    solver = LBFGS(tolerance_grad=1e-6)
    params: Any = minimize(loss, solver, start, shift, adjoint=adjoint).params
    with pytest.warns(LinearSolveWarning, match="max_steps after 2 iterations"):
        (found,) = torch.autograd.grad(params @ b, shift)
    assert relative_error(found, iterates(a, b, 2)[-1]) < 1e-10
