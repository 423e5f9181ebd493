"""Linear operators: tags, adjoints, what is chosen from them, and refused calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import nonzero
from linear_systems import F64, definite, general, indefinite, product
from tolerances import assert_close, relative_error

from torchopt import linear_solve
from torchopt.linear_solve import LinearOperator, solve_auto, solve_cg, solve_gmres, solve_lu


def test_the_adjoint_is_derived_or_given() -> None:
    a, u = general(5, complex_=True), torch.randn(5, dtype=torch.complex128)
    derived = LinearOperator(lambda v, a: a @ v, a)
    given = LinearOperator(lambda v, a: a @ v, a, adjoint=lambda u, a: a.mH @ u)
    for operator in (derived, given):
        assert_close(operator.adjoint_product(u), a.mH @ u)
        assert_close(operator(u), a @ u)
        operator.check(u)


@pytest.mark.parametrize(
    ("tags", "matrix", "match"),
    [
        ("symmetric", general(4), "not symmetric"),
        ("positive_definite", -torch.eye(4, **F64), "not positive definite"),
        ("lower_triangular", general(4), "not lower triangular"),
        ("upper_triangular", general(4), "not upper triangular"),
        ("diagonal", definite(4), "not lower triangular"),
    ],
)
def test_wrong_tags_are_found(tags: str, matrix: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        LinearOperator(product(matrix), tags=tags).check(nonzero(4))
    wrong = LinearOperator(product(matrix), adjoint=lambda u: 2 * u)
    with pytest.raises(ValueError, match="not the adjoint"):
        wrong.check(nonzero(4))


@pytest.mark.parametrize(
    ("tags", "matrix", "small", "large"),
    [
        ((), general(6), "solve_lu", "solve_gmres"),
        (("symmetric",), indefinite(6), "solve_lu", "solve_minres"),
        (("positive_definite",), definite(6), "solve_cholesky", "solve_cg"),
        (("diagonal",), torch.diag(nonzero(6)), "solve_diagonal", "solve_diagonal"),
        (("lower_triangular",), general(6).tril() + torch.eye(6), *["solve_triangular"] * 2),
        (("upper_triangular",), general(6).triu() + torch.eye(6), *["solve_triangular"] * 2),
    ],
)
def test_a_solver_is_chosen_from_tags(tags: Any, matrix: Any, small: str, large: str) -> None:
    b = nonzero(6)
    operator = LinearOperator(product(matrix), tags=tags)
    operator.check(b)
    for limit, name in ((500, small), (5, large)):
        matrix.requires_grad_()
        solution = solve_auto(max_dense=limit, on_failure="raise").solve(operator, b)
        assert solution.method == name
        assert relative_error(solution.x, torch.linalg.solve(matrix, b)) < 1e-8
        weights = nonzero(6)
        (found,) = torch.autograd.grad(solution.x @ weights, matrix)
        (wanted,) = torch.autograd.grad(torch.linalg.solve(matrix, b) @ weights, matrix)
        assert relative_error(found, wanted) < 1e-7
        matrix.requires_grad_(False)


def test_a_wrong_tag_gives_no_wrong_solution_in_silence() -> None:
    a, b = general(6) + torch.eye(6, **F64), nonzero(6)
    for tag in ("positive_definite", "diagonal", "lower_triangular"):
        with pytest.raises(linear_solve.LinearSolveError):
            solve_auto(on_failure="raise")(LinearOperator(product(a), tags=tag), b)


def test_complex_operators_are_not_taken_for_triangular() -> None:
    a = general(4, complex_=True).tril() + torch.eye(4)
    b = torch.randn(4, dtype=torch.complex128)
    operator = LinearOperator(product(a), tags="lower_triangular")
    solution = solve_auto(on_failure="raise").solve(operator, b)
    assert solution.method == "solve_lu"
    assert relative_error(solution.x, torch.linalg.solve(a, b)) < 1e-10


def test_operators_that_are_linear_over_the_reals_only() -> None:
    """Such as the Hessian of a real function of complex parameters."""
    b = torch.randn(5, dtype=torch.complex128)
    for make in (solve_cg, solve_lu, solve_gmres):
        x = make(on_failure="raise")(lambda v: 3 * v + v.conj(), b)
        assert relative_error(3 * x + x.conj(), b) < 1e-9


def test_products_that_call_autograd_themselves() -> None:
    """A Hessian-vector product on a graph that was recorded before: the usual code of users."""
    p = nonzero(6).requires_grad_()
    (g,) = torch.autograd.grad(p.cosh().sum() + p.sum() ** 2, p, create_graph=True)

    def matvec(v: Any) -> Any:
        return torch.autograd.grad(g, p, v, retain_graph=True)[0]

    hessian, b = torch.diag(p.detach().cosh()) + 2, nonzero(6).requires_grad_()
    wanted = torch.linalg.solve(hessian, b)
    (exact,) = torch.autograd.grad(wanted.sum(), b)
    for make in (solve_cg, solve_lu, solve_gmres):
        x = make(on_failure="raise")(matvec, b)
        assert relative_error(x, wanted) < 1e-8
        with pytest.raises(RuntimeError, match="the product records no graph"):
            x.sum().backward()
        symmetric = LinearOperator(matvec, tags="symmetric")
        x = make(on_failure="raise")(symmetric, b)
        assert relative_error(torch.autograd.grad(x.sum(), b)[0], exact) < 1e-8


def eye(v: Any) -> Any:
    return v


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: solve_cg()(torch.eye(2), torch.ones(2)), TypeError, "lambda v: A @ v"),
        (lambda: solve_cg()(3, torch.ones(2)), TypeError, "must be a function"),
        (lambda: solve_cg()(eye, torch.ones(2, dtype=torch.int64)), TypeError, "floating-point"),
        (lambda: solve_cg()(eye, {"a": 1.0}), TypeError, "at 'a'"),
        (lambda: solve_cg()(eye, {}), ValueError, "at least one entry"),
        (lambda: solve_cg()(lambda v: v[:1], torch.ones(2)), ValueError, r"shape \(2,\)"),
        (lambda: solve_cg()(lambda v: [v], torch.ones(2)), ValueError, r"matvec\(v\)"),
        (lambda: solve_cg()(lambda v: v * 1j, torch.ones(2)), TypeError, "make b complex"),
        (lambda: solve_cg()(eye, torch.ones(2), init=torch.ones(3)), ValueError, "init must be"),
        (lambda: solve_cg(rtol=-1.0), ValueError, "rtol must be >= 0"),
        (lambda: solve_cg(atol="a"), TypeError, "atol must be a number"),
        (lambda: solve_cg(ridge=-1), ValueError, "ridge must be >= 0"),
        (lambda: solve_cg(ridge=torch.ones(2)), TypeError, "ridge must be a number"),
        (lambda: solve_cg(maxiter=1.5), TypeError, "maxiter must be an integer"),
        (lambda: solve_cg(maxiter=-1), ValueError, "maxiter must be >= 0"),
        (lambda: solve_cg(on_failure="stop"), ValueError, "'warn', 'raise' or 'ignore'"),
        (lambda: solve_cg(preconditioner=torch.eye(2)), TypeError, "lambda v: A @ v"),
        (lambda: solve_gmres(restart=0), ValueError, "restart must be >= 1"),
        (lambda: linear_solve.solve_neumann(step=0), ValueError, "step must be a number > 0"),
        (lambda: linear_solve.solve_nystrom(rank=0, rho=1.0), ValueError, "rank must be >= 1"),
        (lambda: linear_solve.solve_nystrom(rank=1, rho=0), ValueError, "rho must be"),
        (lambda: LinearOperator(eye, tags="round"), ValueError, "tags must be of 'symmetric'"),
        (lambda: LinearOperator(torch.eye(2)), TypeError, "fn must be a function"),  # pyright: ignore[reportArgumentType]
    ],
)
def test_refused_calls(call: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()
