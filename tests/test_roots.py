"""Roots and fixed points: found as by SciPy, differentiated in every order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import nonzero
from equations import F64, N, central_jacobian, contraction, mixing, tridiagonal
from tolerances import assert_close, relative_error
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, vmap

from torchopt.diff import custom_root
from torchopt.linear_solve import solve_cg, solve_gmres, solve_normal_cg
from torchopt.solvers import (
    LBFGS,
    Anderson,
    Bisection,
    Broyden,
    FixedPointIteration,
    Newton,
    Outcome,
    Unrolled,
    find_root,
    fixed_point,
)


scipy = pytest.importorskip("scipy.optimize")
TIGHT = {"tolerance_grad": 1e-11}
SOLVERS = {
    "newton": Newton(**TIGHT),
    "newton-gmres": Newton(linear_solve=solve_gmres(), **TIGHT),
    "newton-normal": Newton(linear_solve=solve_normal_cg(), **TIGHT),
    "broyden": Broyden(**TIGHT),
    "broyden-jacobian": Broyden(jacobian="jacobian", **TIGHT),
}
every = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)


@every
@pytest.mark.parametrize("fn", [tridiagonal, mixing])
def test_roots_are_those_of_scipy(solver: Any, fn: Any) -> None:
    c = 1 + 0.1 * torch.randn(N, **F64)
    start = torch.full((N,), -1.0, **F64) if fn is tridiagonal else torch.zeros(N, **F64)
    theirs = scipy.root(lambda x: fn(torch.from_numpy(x), c).numpy(), start.numpy(), tol=1e-13)
    assert theirs.success
    solution = find_root(fn, solver, start, c).checked()
    assert solution.outcome is Outcome.CONVERGED
    assert relative_error(solution.params, torch.from_numpy(theirs.x)) < 1e-9
    residual = fn(solution.params, c)
    assert solution.grad_norm == residual.abs().max().item() <= 1e-11
    assert abs(solution.value - residual.norm().item()) < 1e-15
    assert torch.equal(start, torch.full((N,), start[0].item(), **F64))


def test_broyden_takes_as_few_calls_as_scipy() -> None:
    calls: list[int] = []
    c, start = torch.ones(N, **F64), torch.zeros(N, **F64)

    def counted(x: Any) -> Any:
        calls.append(1)
        return mixing(torch.from_numpy(x), c).numpy()

    scipy.broyden1(counted, start.numpy(), f_tol=1e-11)
    solution = find_root(mixing, SOLVERS["broyden"], start, c).checked()
    assert solution.evaluations <= 2 * len(calls)


def test_newton_converges_quadratically_and_shortens_steps_that_leave_the_domain() -> None:
    solution = find_root(lambda p: p.log(), Newton(**TIGHT), torch.tensor(4.0, **F64)).checked()
    assert abs(solution.params.item() - 1) < 1e-10  # a whole step leads below zero
    assert solution.iterations < 12
    whole = Newton(halvings=0, **TIGHT)
    assert find_root(lambda p: p.log(), whole, torch.tensor(4.0, **F64)).outcome is (
        Outcome.NOT_FINITE
    )


def test_trees_and_complex_numbers() -> None:
    def fn(p: Any, a: Tensor) -> Any:
        return {"z": p["z"] ** 2 + p["s"][0] - a, "s": p["s"] ** 3 - 8, "n": None}

    start = {"z": torch.tensor([1.0 + 1.0j, -1.0 + 0.5j]).to(torch.complex128), "n": None}
    start["s"] = torch.tensor([1.0, 2.0], **F64)
    a = torch.tensor([0.0, 1.0 + 2.0j], dtype=torch.complex128, requires_grad=True)
    solution = find_root(fn, SOLVERS["newton"], start, a).checked()
    z = solution.params["z"]
    assert_close(z**2, a - 2, times=100)
    assert solution.params["n"] is None
    (found,) = torch.autograd.grad(z.real.sum() + z.imag.square().sum(), a)
    branch = torch.where((z.detach() / (a - 2).detach().sqrt()).real > 0, 1.0, -1.0)
    wanted = branch * (a - 2).sqrt()
    (exact,) = torch.autograd.grad(wanted.real.sum() + wanted.imag.square().sum(), a)
    assert_close(found, exact, times=1e4)


# Derivatives -------------------------------------------------------------------------------------


@every
def test_implicit_derivatives_of_first_and_second_order(solver: Any) -> None:
    """Against central differences of the solution, then of the gradient."""
    c, weights, start = 1 + 0.1 * torch.randn(N, **F64), nonzero(N), torch.zeros(N, **F64)

    def loss(c: Tensor) -> Tensor:
        return (find_root(mixing, solver, start, c).params * weights).sin().sum()

    c.requires_grad_()
    (g,) = torch.autograd.grad(loss(c), c, create_graph=True)
    point = c.detach()
    wanted = central_jacobian(loss, point)
    assert relative_error(g, wanted) < 1e-7
    assert relative_error(grad(loss)(point), wanted) < 1e-7
    if solver not in (SOLVERS["newton"], SOLVERS["broyden"]):
        return  # the second derivative has nothing of the solver in it
    h = torch.stack([torch.autograd.grad(g[k], c, retain_graph=True)[0] for k in range(N)])
    numeric = central_jacobian(grad(loss), point)
    assert relative_error(h, numeric) < 1e-6
    assert relative_error(jacrev(jacfwd(loss))(point), numeric) < 1e-6


def test_bisection_has_right_derivatives_of_second_order() -> None:
    """The solver itself has no derivative at all."""

    def root(a: Tensor) -> Tensor:
        return find_root(
            lambda p, a: p**3 + p - a, Bisection(lower=-2.0, upper=9.0), a * 0, a
        ).params

    a = torch.tensor([1.0, 5.0, 10.0], **F64)
    p = root(a)
    assert relative_error(p**3 + p, a) < 1e-8
    first, second = 1 / (3 * p**2 + 1), -6 * p / (3 * p**2 + 1) ** 3
    assert relative_error(vmap(grad(root))(a), first) < 1e-7
    assert relative_error(vmap(grad(grad(root)))(a), second) < 1e-6
    leaf = a.clone().requires_grad_()
    (g,) = torch.autograd.grad(root(leaf).sum(), leaf, create_graph=True)
    assert relative_error(torch.autograd.grad(g.sum(), leaf)[0], second) < 1e-6


@pytest.mark.parametrize("name", ["newton", "broyden", "newton-gmres"])
def test_recorded_iterations_have_the_same_gradient(name: str) -> None:
    c = (1 + 0.1 * torch.randn(N, **F64)).requires_grad_()
    start, weights = torch.zeros(N, **F64), nonzero(N)
    grads = []
    for adjoint in (Unrolled(), None):
        options = {} if adjoint is None else {"adjoint": adjoint}
        solution = find_root(mixing, SOLVERS[name], start, c, **options)
        grads.append(torch.autograd.grad((solution.params * weights).sum(), c)[0])
    assert relative_error(grads[0], grads[1]) < (1e-9 if name != "broyden" else 1e-3)
    assert not find_root(mixing, SOLVERS[name], start, c, adjoint=None).params.requires_grad


@pytest.mark.parametrize("name", ["newton", "broyden"])
def test_inside_custom_root(name: str) -> None:
    @custom_root(mixing, argnums=1)
    def solve(start: Tensor, c: Tensor) -> Tensor:
        return find_root(mixing, SOLVERS[name], start, c, adjoint=None).checked().params

    c, start = torch.ones(N, **F64), torch.zeros(N, **F64)
    found = jacrev(solve, 1)(start, c)
    assert relative_error(found, central_jacobian(lambda c: solve(start, c), c)) < 1e-6
    batch = 1 + 0.1 * torch.randn(3, N, **F64)
    solutions = vmap(lambda c: solve(start, c))(batch)
    assert relative_error(solutions, torch.stack([solve(start, c) for c in batch])) < 1e-12


# Fixed points ------------------------------------------------------------------------------------

POINTS = {
    "iteration": FixedPointIteration(**TIGHT),
    "damped": FixedPointIteration(damping=0.5, **TIGHT),
    "anderson": Anderson(**TIGHT),
    "anderson-mixing": Anderson(mixing=0.5, history_size=3, **TIGHT),
    "newton": Newton(**TIGHT),
    "broyden": Broyden(**TIGHT),
}


@pytest.mark.parametrize("solver", POINTS.values(), ids=POINTS)
def test_fixed_points_are_those_of_scipy(solver: Any) -> None:
    c, start, weights = 0.5 * nonzero(N), torch.zeros(N, **F64), nonzero(N)
    theirs = scipy.fixed_point(
        lambda x: contraction(torch.from_numpy(x), c).numpy(), start.numpy(), xtol=1e-13
    )

    def loss(c: Tensor) -> Tensor:
        return (fixed_point(contraction, solver, start, c).params * weights).sin().sum()

    solution = fixed_point(contraction, solver, start, c).checked()
    assert relative_error(solution.params, torch.from_numpy(theirs)) < 1e-9
    found = grad(loss)(c)
    assert relative_error(found, central_jacobian(loss, c)) < 1e-7
    if solver is POINTS["anderson"]:
        assert relative_error(hessian(loss)(c), central_jacobian(grad(loss), c)) < 1e-6


def test_anderson_takes_fewer_calls() -> None:
    """And solves a linear fixed point in as many as there are unknowns, like GMRES."""
    c, start = nonzero(N), torch.zeros(N, **F64)
    plain, fast = (
        fixed_point(contraction, POINTS[name], start, c).checked()
        for name in ("iteration", "anderson")
    )
    assert fast.evaluations < 0.7 * plain.evaluations
    a = 0.9 * torch.linalg.qr(torch.randn(N, N, **F64)).Q
    solver = Anderson(history_size=N, ridge=0.0, tolerance_grad=1e-9)
    linear = fixed_point(lambda p: a @ p + c, solver, start).checked()
    assert linear.iterations <= N + 2
    assert relative_error(linear.params, torch.linalg.solve(torch.eye(N, **F64) - a, c)) < 1e-7


# What goes wrong ---------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [*SOLVERS.values(), *POINTS.values()], ids=[*SOLVERS, *POINTS])
def test_calls_are_counted(solver: Any) -> None:
    calls: list[int] = []
    c, start = torch.linspace(0, 1, N, **F64), torch.zeros(N, **F64)

    def counted(x: Tensor) -> Tensor:
        calls.append(1)
        return contraction(x, c) - x

    solution = find_root(counted, solver, start, adjoint=None)
    assert solution.evaluations == len(calls)
    steps = iter(range(1000))
    state = solver.init(lambda x: contraction(x, c) - x, start)
    while solver.terminate(state) is None and next(steps) < 999:
        state = solver.step(lambda x: contraction(x, c) - x, state)
    assert torch.equal(state.params, solution.params)
    assert state.iterations == solution.iterations


def test_names_of_failures() -> None:
    start = torch.tensor(1.0, **F64)
    still = FixedPointIteration(tolerance_grad=0.0)
    assert fixed_point(lambda p: p + 1e-14, still, start).outcome is Outcome.STAGNATED
    none = find_root(lambda p: p**2 + 1, Newton(), start)
    assert not none.outcome.success
    with pytest.raises(RuntimeError, match=str(none.outcome)):
        none.checked()
    assert find_root(lambda p: 0 * p + 1, Newton(), start).outcome is Outcome.SINGULAR
    assert find_root(lambda p: p**3 - 2, Newton(max_iter=1), start).outcome is Outcome.MAX_ITER
    assert find_root(lambda p: p**3 - 2, Newton(max_eval=2), start).outcome is Outcome.MAX_EVAL
    assert find_root(lambda p: p + torch.nan, Newton(), start).outcome is Outcome.NOT_FINITE
    growing = fixed_point(lambda p: 3 * p + 1, FixedPointIteration(max_iter=50), start)
    assert growing.outcome is Outcome.MAX_ITER
    assert not find_root(lambda p: p**2 + 1, Broyden(max_iter=30), start).outcome.success
    flat = Bisection(lower=0.0, upper=1.0, tolerance_grad=0.0, tolerance_change=1e-3)
    assert find_root(lambda p: 2 * p - 0.7, flat, start).outcome is Outcome.SMALL_CHANGE


def test_an_unconverged_root_warns_where_it_is_differentiated() -> None:
    c = torch.ones(N, **F64).requires_grad_()
    with pytest.warns(UserWarning, match="has not come to one"):
        find_root(mixing, Newton(max_iter=1, **TIGHT), torch.full((N,), 3.0, **F64), c)


def identity(p: Any) -> Any:
    return p


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: find_root(identity, LBFGS(), torch.ones(1)), TypeError, "must find roots"),  # pyright: ignore[reportArgumentType]
        (lambda: find_root(3, Newton(), torch.ones(1)), TypeError, "find_root.fn, solver"),  # pyright: ignore[reportArgumentType]
        (lambda: fixed_point(3, Newton(), torch.ones(1)), TypeError, "fixed_point.fn, solver"),  # pyright: ignore[reportArgumentType]
        (lambda: find_root(lambda p: p[:1], Newton(), torch.ones(2)), ValueError, "least_squares"),
        (lambda: find_root(lambda p: {"a": p}, Newton(), torch.ones(2)), ValueError, "What fn"),
        (lambda: find_root(identity, Newton(), {"a": 1}), TypeError, "at 'a'"),
        (lambda: Newton(linear_solve=torch.linalg.solve), TypeError, "linear_solve must be"),  # pyright: ignore[reportArgumentType]
        (lambda: Newton(halvings=-1), ValueError, "halvings must be"),
        (lambda: Broyden(jacobian="exact"), ValueError, "jacobian must be"),  # pyright: ignore[reportArgumentType]
        (lambda: Broyden(history_size=0), ValueError, "history_size must be"),
        (lambda: Anderson(mixing=0.0), ValueError, "mixing must be"),
        (lambda: FixedPointIteration(damping=1.5), ValueError, "damping must be"),
        (
            lambda: find_root(identity, Bisection(lower=1.0, upper=2.0), torch.ones(1)),
            ValueError,
            "different signs.*entry 0 it is 1 at 1 and 2 at 2",
        ),
        (
            lambda: find_root(identity, Bisection(lower=1.0, upper=-1.0), torch.ones(1)),
            ValueError,
            "lower must be below upper",
        ),
    ],
)
def test_refused_calls(call: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()


def test_the_linear_solver_of_the_derivative_is_a_choice() -> None:
    from torchopt.diff import Implicit

    c = torch.linspace(0, 1, N, **F64).requires_grad_()
    start = torch.zeros(N, **F64)
    exact = find_root(mixing, SOLVERS["newton"], start, c)
    wanted = torch.autograd.grad(exact.params.sum(), c)[0]
    other = find_root(mixing, SOLVERS["newton"], start, c, adjoint=Implicit(solve=solve_gmres()))
    assert relative_error(torch.autograd.grad(other.params.sum(), c)[0], wanted) < 1e-8
    wrong = Implicit(solve=solve_cg(on_failure="raise", maxiter=1))
    bad = find_root(mixing, SOLVERS["newton"], start, c, adjoint=wrong)
    with pytest.raises(RuntimeError, match="not solved by solve_cg"):
        torch.autograd.grad(bad.params.sum(), c)
