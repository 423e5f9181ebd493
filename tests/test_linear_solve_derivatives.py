"""The solution of a linear system as an operation: its derivatives in every mode and order."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import nonzero
from linear_systems import F64, IDS, ROWS, Row, definite, general, made, product
from tolerances import relative_error
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from torchopt import linear_solve
from torchopt.linear_solve import (
    LinearOperator,
    LinearSolveWarning,
    solve_cg,
    solve_gmres,
    solve_lu,
)


every = pytest.mark.parametrize("row", ROWS, ids=IDS)
#: One solver of each kind: iterations for symmetric and other matrices, with the adjoint, dense.
KINDS = [
    row for row in ROWS if row.name in ("solve_cg", "solve_gmres", "solve_normal_cg", "solve_lu")
]
kinds = pytest.mark.parametrize("row", KINDS, ids=[row.name for row in KINDS])
N = 4


def problem(row: Row, **options: Any) -> tuple[Any, Any, Tensor, Tensor]:
    """Return a loss by a solver and by ``torch.linalg.solve``, a matrix and a right-hand side."""
    solver, weights = made(row, **options), nonzero(N)

    def mine(a: Tensor, b: Tensor) -> Tensor:
        return (solver(lambda v: a @ v, b) * weights).sin().sum()

    def exact(a: Tensor, b: Tensor) -> Tensor:
        return (torch.linalg.solve(a, b) * weights).sin().sum()

    return mine, exact, row.of(N), nonzero(N)


def assert_same(found: Any, wanted: Any, bound: float = 1e-7) -> None:
    if isinstance(wanted, tuple):
        for x, y in zip(found, wanted):
            assert_same(x, y, bound)
    else:
        assert relative_error(found, wanted) < bound


@every
def test_gradients(row: Row) -> None:
    mine, exact, a, b = problem(row)
    a.requires_grad_()
    b.requires_grad_()
    found = torch.autograd.grad(mine(a, b), (a, b))
    assert_same(found, torch.autograd.grad(exact(a, b), (a, b)))


@kinds
def test_second_derivatives_in_every_order_of_modes(row: Row) -> None:
    """Never the derivative of the iterations, and never with the solution cut off."""
    mine, exact, a, b = problem(row)
    both = (0, 1)
    wanted = jacrev(jacrev(exact, both), both)(a, b)
    for outer, inner in ((jacrev, jacrev), (jacfwd, jacrev), (jacrev, jacfwd)):
        assert_same(outer(inner(mine, both), both)(a, b), wanted)
    found = torch.autograd.functional.hessian(mine, (a.clone(), b.clone()))
    assert_same(found, wanted)


def test_third_derivatives() -> None:
    mine, exact, a, b = problem(ROWS[IDS.index("solve_gmres")])
    direction = nonzero(N, N)

    def along(f: Any) -> Callable[[Tensor], Tensor]:
        return lambda t: f(a + t * direction, b)

    t = torch.zeros((), **F64)
    found = grad(grad(grad(along(mine))))(t)
    assert_same(found, grad(grad(grad(along(exact))))(t), 1e-6)


@kinds
def test_forward_mode(row: Row) -> None:
    mine, exact, a, b = problem(row)
    tangents = nonzero(N, N), nonzero(N)
    wanted = jvp(exact, (a, b), tangents)[1]
    assert_same(jvp(mine, (a, b), tangents)[1], wanted)
    with forward_ad.dual_level():
        dual = mine(*map(forward_ad.make_dual, (a, b), tangents))
        assert_same(forward_ad.unpack_dual(dual).tangent, wanted)


def test_forward_over_forward_is_refused() -> None:
    """torch computes zero for it through any operation of one's own."""
    mine, _, a, b = problem(ROWS[0])
    with pytest.raises(NotImplementedError, match="forward mode over forward"):
        jacfwd(jacfwd(mine, 1), 1)(a, b)


@kinds
def test_batches(row: Row) -> None:
    """Each member ends by itself: systems of different condition, one with the solution zero."""
    a = torch.stack([row.of(N, c) for c in (2.0, 5.0, 10.0, 3.0)])
    b = torch.randn(4, N, **F64)
    b[3] = 0
    solver = made(row)
    solve = vmap(lambda a, b: solver(product(a), b))
    assert relative_error(solve(a, b), torch.linalg.solve(a, b)) < 1e-8
    assert torch.equal(solve(a, b)[3], torch.zeros(N, **F64))
    shared = vmap(lambda b: solver(product(a[2]), b))(b)
    assert relative_error(shared, torch.linalg.solve(a[2].expand(4, N, N), b)) < 1e-8
    across = vmap(lambda a, b: solver(product(a), b), (2, 1), 1)(a.movedim(0, 2), b.T)
    assert relative_error(across, torch.linalg.solve(a, b).T) < 1e-8


@kinds
def test_batches_of_derivatives_and_derivatives_of_batches(row: Row) -> None:
    mine, exact, _, _ = problem(row)
    a, b = torch.stack([row.of(N) for _ in range(3)]), torch.randn(3, N, **F64)
    wanted = vmap(grad(exact, (0, 1)))(a, b)
    assert_same(vmap(grad(mine, (0, 1)))(a, b), wanted)
    assert_same(grad(lambda a, b: vmap(mine)(a, b).sum(), (0, 1))(a, b), wanted)
    a.requires_grad_()
    b.requires_grad_()
    assert_same(torch.autograd.grad(vmap(mine)(a, b).sum(), (a, b)), wanted)
    nested = vmap(vmap(mine, (None, 0)), (0, None))(a, b)
    assert_same(nested, vmap(vmap(exact, (None, 0)), (0, None))(a, b))
    assert_same(vmap(hessian(mine))(a, b), vmap(jacrev(jacrev(exact)))(a, b))


def test_a_member_that_is_not_solved_leaves_the_others() -> None:
    a = torch.stack([definite(N), torch.diag(torch.tensor([1.0, 1.0, 1.0, -1.0]))]).double()
    b = nonzero(2, N)
    found: list[Any] = []

    def solve(a: Tensor, b: Tensor) -> Tensor:
        found.append(solve_cg().solve(product(a), b))
        return found[0].x

    with pytest.warns(LinearSolveWarning, match="1 of 2 systems was not solved"):
        x = vmap(solve)(a, b)
    assert relative_error(x[0], torch.linalg.solve(a[0], b[0])) < 1e-8
    (solution,) = found
    assert [o.success for o in solution.all_outcomes] == [True, False]
    assert solution.outcome.name == "NOT_POSITIVE_DEFINITE"
    assert solution.all_iterations.shape == solution.all_residuals.shape == (2,)


@pytest.mark.parametrize("make", [solve_cg, solve_lu, linear_solve.solve_minres])
def test_complex_systems(make: Any) -> None:
    """The gradient in complex numbers is that of torch: conjugates are where they belong."""
    a = definite(N, complex_=True).requires_grad_()
    b = torch.randn(N, dtype=torch.complex128, requires_grad=True)
    weights = torch.randn(N, dtype=torch.complex128)

    def loss(x: Tensor) -> Tensor:
        return (x * weights).abs().square().sum() + (x * weights).imag.sum()

    x = make(on_failure="raise")(lambda v: (a + a.mH) @ v / 2, b)
    wanted = torch.linalg.solve((a + a.mH) / 2, b)
    found = torch.autograd.grad(loss(x), (a, b))
    assert_same(found, torch.autograd.grad(loss(wanted), (a, b)))


def test_complex_numbers_beside_one_real_number() -> None:
    """They begin at an odd place of the flat vector, which torch's views refuse."""
    like = {"a": nonzero(), "z": torch.randn(3, dtype=torch.complex128)}
    t = torch.tensor(0.5, **F64, requires_grad=True)

    def matvec(v: Any, t: Tensor) -> Any:
        z = v["z"] * (2 + 1j * t)
        return {"a": 3 * v["a"] + t * v["z"].real.sum(), "z": z + t * v["a"]}

    def loss(t: Tensor, make: Any) -> Tensor:
        x = make(on_failure="raise")(lambda v: matvec(v, t), like)
        for name, value in matvec(x, t).items():
            assert_same(value.detach(), like[name])
        return x["a"] + x["z"].abs().square().sum()

    for make in (solve_gmres, solve_lu):
        at = t.detach()
        numeric = (loss(at + 1e-5, make) - loss(at - 1e-5, make)) / 2e-5
        assert_same(torch.autograd.grad(loss(t, make), t)[0], numeric)
        assert_same(grad(loss)(at, make), numeric)


def test_nothing_is_kept() -> None:
    """No circle of references: what a solution was made of goes when it goes."""
    a, b = definite(N).requires_grad_(), nonzero(N)
    gc.disable()
    try:
        twice = 2 * a
        x = solve_cg()(lambda v, m=twice: m @ v, b)
        x.sum().backward()
        gone = weakref.ref(twice)
        del twice, x
        assert gone() is None
    finally:
        gc.enable()


def test_a_learned_ridge() -> None:
    a, b = definite(N), nonzero(N)
    ridge = torch.tensor(0.3, **F64)
    eye = torch.eye(N, **F64)
    for make in (solve_cg, solve_lu, linear_solve.solve_normal_cg):

        def mine(ridge: Tensor, make: Any = make) -> Tensor:
            return make(ridge=ridge, on_failure="raise", rtol=1e-12)(product(a), b).square().sum()

        def exact(ridge: Tensor, normal: bool = make is linear_solve.solve_normal_cg) -> Tensor:
            matrix, right = (a @ a, a @ b) if normal else (a, b)
            return torch.linalg.solve(matrix + ridge * eye, right).square().sum()

        assert_same(grad(mine)(ridge), grad(exact)(ridge))
        assert_same(grad(grad(mine))(ridge), grad(grad(exact))(ridge))


@pytest.mark.parametrize("make", [solve_cg, solve_gmres])
def test_the_adjoint_system_is_solved_with_the_adjoint(make: Any) -> None:
    """Also by solvers for symmetric matrices, which may solve what is nearly so."""
    a = (definite(N) + 1e-3 * general(N)).requires_grad_()
    b = nonzero(N)
    x = make(maxiter=500, on_failure="ignore", rtol=1e-12)(product(a), b)
    solution = torch.linalg.solve(a, b)
    if relative_error(x, solution) < 1e-9:
        (found,) = torch.autograd.grad(x.sin().sum(), a)
        (wanted,) = torch.autograd.grad(solution.sin().sum(), a)
        assert_same(found, wanted, 1e-6)
    else:
        assert make is solve_cg


def test_start_and_preconditioner_have_no_derivative() -> None:
    a, b = definite(N), nonzero(N)
    start, scale = nonzero(N).requires_grad_(), (1 + nonzero(N).square()).requires_grad_()
    solver = made(ROWS[0], preconditioner=lambda v: scale * v)
    b.requires_grad_()
    x = solver(product(a), b, init=start)
    grads = torch.autograd.grad(x.sum(), (start, scale, b), allow_unused=True)
    assert grads[0] is None
    assert grads[1] is None
    assert_same(grads[2], torch.linalg.solve(a, torch.ones(N, **F64)))
    scales = 1 + nonzero(3, N).square()

    def solve(s: Tensor) -> Tensor:
        return made(ROWS[0], preconditioner=lambda v: s * v)(product(a), b)

    assert relative_error(vmap(solve)(scales), x.expand(3, N)) < 1e-8


def test_a_failure_of_the_derivative_is_named() -> None:
    """The system is solved from its solution; the adjoint system has no such start."""
    a, b = definite(20, 1e4).requires_grad_(), nonzero(20)
    exact = torch.linalg.solve(a, b).detach()
    x = solve_cg(maxiter=2)(product(a), b, init=exact)
    with pytest.warns(LinearSolveWarning, match="of a derivative .the adjoint system. was not"):
        x.sum().backward()


# What a product depends on -----------------------------------------------------------------------


class Scaled(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(definite(N))

    def forward(self, v: Tensor) -> Tensor:
        return self.weight @ v


def test_tensors_are_found_wherever_the_function_finds_them() -> None:
    module, b, extra = Scaled(), nonzero(N), nonzero().square().requires_grad_()

    def add(v: Tensor, scale: Any = (extra,)) -> Tensor:
        return scale[0] * v

    options = {"shift": [extra]}
    x = made(ROWS[0])(lambda v: module(v) + add(v) + options["shift"][0] * v, b)
    wanted = torch.linalg.solve(module.weight + 2 * extra * torch.eye(N, **F64), b)
    inputs = (module.weight, extra)
    found = torch.autograd.grad(x.sin().sum(), inputs)
    assert_same(found, torch.autograd.grad(wanted.sin().sum(), inputs))


def test_tensors_that_were_computed_one_from_another_count_once() -> None:
    a = definite(N)
    s = torch.tensor(0.5, **F64, requires_grad=True)
    t = s.square()  # both are used
    x = solve_gmres(on_failure="raise")(lambda v: a @ v + s * v + t * v, torch.ones(N, **F64))
    eye = torch.eye(N, **F64)
    wanted = torch.linalg.solve(a + s * eye + s.square() * eye, torch.ones(N, **F64))
    (found,) = torch.autograd.grad(x.sum(), s)
    assert_same(found, torch.autograd.grad(wanted.sum(), s)[0])


@pytest.mark.parametrize("make", [solve_cg, solve_lu])
def test_hessian_products_of_torch_func(make: Any) -> None:
    p, b = nonzero(N), nonzero(N)

    def loss(p: Tensor, theta: Tensor) -> Tensor:
        return (theta * p**4).sum() / 12 + p.square().sum() + theta[0] * p.sum().square()

    def mine(theta: Tensor) -> Tensor:
        g = grad(lambda p: loss(p, theta))
        return make(on_failure="raise")(lambda v: jvp(g, (p,), (v,))[1], b).square().sum()

    def exact(theta: Tensor) -> Tensor:
        return torch.linalg.solve(jacrev(jacrev(loss))(p, theta), b).square().sum()

    theta = nonzero(N).square()
    assert_same(grad(mine)(theta), grad(exact)(theta))
    leaf = theta.clone().requires_grad_()
    assert_same(torch.autograd.grad(mine(leaf), leaf)[0], grad(exact)(theta))


def test_products_that_differentiate_inside_are_differentiated() -> None:
    theta, b = nonzero(N).square().requires_grad_(), nonzero(N)
    at = nonzero(N)

    def matvec(v: Tensor) -> Tensor:
        p = at.clone().requires_grad_()
        value = (theta * p.cosh()).sum() + p.sum() ** 2
        (g,) = torch.autograd.grad(value, p, create_graph=True)
        return torch.autograd.grad(g, p, v, create_graph=True)[0]

    wanted = torch.linalg.solve(torch.diag(theta * at.cosh()) + 2, b)
    for make in (solve_cg, solve_lu):
        x = make(on_failure="raise")(matvec, b)
        (found,) = torch.autograd.grad(x.square().sum(), theta)
        assert_same(found, torch.autograd.grad(wanted.square().sum(), theta, retain_graph=True)[0])


def recorded_before(theta: Tensor) -> Callable[[Tensor], Tensor]:
    pull = torch.func.vjp(lambda p: theta * p.sinh(), torch.ones(N, **F64))[1]
    return lambda v: pull(v)[0]


class Hidden:
    """Its method looks a tensor up where only the class can see it."""

    tensor = nonzero(N).square() + 1

    def __call__(self, v: Tensor) -> Tensor:
        return type(self).tensor * v


def test_a_tensor_that_cannot_be_exchanged_is_refused() -> None:
    """Instead of a derivative that lacks it; without grad mode it is solved."""
    theta, b = (1 + nonzero(N).square()).requires_grad_(), nonzero(N)
    Hidden.tensor = theta
    graph_of = torch.diag(theta)
    before = (theta * nonzero(N)).requires_grad_()
    for matvec in (recorded_before(theta), Hidden()):
        with pytest.raises(ValueError, match=r"LinearOperator\(fn, tensor\)"):
            solve_cg()(matvec, b)
        with torch.no_grad():
            assert solve_gmres().solve(matvec, b).outcome.success
    x = solve_cg()(lambda v: graph_of @ v + 0 * before * v, b)
    assert x.requires_grad
    with pytest.raises(ValueError, match=r"LinearOperator\(fn, tensor\)"):
        grad(lambda theta: solve_gmres()(recorded_before(theta), b).sum())(theta.detach())


def test_named_tensors_are_differentiated() -> None:
    theta, b = 1 + nonzero(N).square(), nonzero(N)

    def mine(theta: Tensor) -> Tensor:
        operator = LinearOperator(lambda v, d: d["scale"] * v, {"scale": theta, "other": 3})
        return solve_lu()(operator, b).square().sum()

    assert_same(grad(mine)(theta), grad(lambda t: (b / t).square().sum())(theta))
    assert_same(hessian(mine)(theta), hessian(lambda t: (b / t).square().sum())(theta))
