"""A solution's derivatives of all orders and modes are those of the map, whatever found it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from implicit_problems import condition, differences, exact, newton, outer, start, theta, tree_of
from tolerances import META_GRADIENT, relative_error
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jacrev, vmap

from torchopt.diff.implicit import custom_fixed_point, custom_root, root_jvp, root_vjp
from torchopt.linear_solve import solve_lu, solve_normal_cg


def solution(at: Tensor, **options: Any) -> Tensor:
    """The number of ``exact`` as a differentiable function."""
    return outer(custom_root(condition, argnums=1, **options)(newton)(start(), tree_of(at)))


def by_autograd(at: Tensor) -> Tensor:
    at = at.detach().requires_grad_()
    return torch.autograd.grad(solution(at), at)[0]


GRADIENT = differences(exact, theta())
HESSIAN = differences(by_autograd, theta())


@pytest.mark.parametrize("take", [by_autograd, grad(solution), jacfwd(solution)])
def test_first_derivatives(take: Callable[[Tensor], Tensor]) -> None:
    assert relative_error(take(theta()), GRADIENT) < META_GRADIENT


@pytest.mark.parametrize(
    ("first", "second"),
    list(itertools.product([jacrev, jacfwd], repeat=2)),
    ids=lambda f: f.__name__,
)
def test_second_derivatives(first: Any, second: Any) -> None:
    """Forward over forward too, where torch by itself computes zero without a word."""
    assert relative_error(second(first(solution))(theta()), HESSIAN) < META_GRADIENT


def test_second_derivatives_by_plain_autograd() -> None:
    found = torch.autograd.functional.hessian(solution, theta())
    assert relative_error(found, HESSIAN) < META_GRADIENT


def test_third_derivatives() -> None:
    def along(at: Tensor) -> Tensor:
        return solution(theta() + at * theta())

    def thrice(at: Tensor) -> Tensor:
        return jacfwd(jacrev(jacfwd(along)))(at)

    zero = torch.zeros((), dtype=torch.float64)
    expected = differences(jacrev(jacrev(along)), zero)
    assert relative_error(thrice(zero).reshape(1), expected) < META_GRADIENT


def test_plain_forward_mode_and_reverse_over_it() -> None:
    v = torch.randn(4, dtype=torch.float64)
    with forward_ad.dual_level():
        at = theta().requires_grad_()
        dual = forward_ad.make_dual(at, v)
        tangent = forward_ad.unpack_dual(solution(dual)).tangent
        (g,) = torch.autograd.grad(solution(dual), at)
        product = forward_ad.unpack_dual(g).tangent
    assert tangent is not None
    assert product is not None
    assert relative_error(tangent, GRADIENT @ v) < META_GRADIENT
    assert relative_error(product, HESSIAN @ v) < META_GRADIENT


def test_batches() -> None:
    """Each member of a batch is solved, also by a loop that ends by a condition."""
    batch = torch.randn(3, 4, dtype=torch.float64)
    takes = (solution, grad(solution), jacfwd(solution), jacrev(jacrev(solution)))
    for take in (*takes, jacfwd(jacfwd(solution))):
        expected = torch.stack([take(row) for row in batch])
        assert relative_error(vmap(take)(batch), expected) < 1e-9

    def total(rows: Tensor) -> Tensor:
        return vmap(vmap(solution))(rows).sum()

    found = grad(total)(batch.unsqueeze(1))
    assert relative_error(found.squeeze(1), torch.stack([grad(solution)(x) for x in batch])) < 1e-9


def test_a_solver_that_takes_batches_is_called_once() -> None:
    calls = []

    @custom_root(lambda x, t: x * t - 1, argnums=1)
    def inverse(x: Tensor, t: Tensor) -> Tensor:
        calls.append(1)
        return 1 / t

    t = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    found = vmap(grad(lambda t: inverse(torch.ones_like(t), t)))(t)
    assert relative_error(found, -1 / t**2) < 1e-12
    assert len(calls) == 1


def test_batches_of_what_is_not_differentiated() -> None:
    """Also of whole numbers, such as labels."""

    def pick(w: Tensor, k: Tensor) -> Tensor:
        return w.gather(0, k.reshape(1))[0]

    weights, labels = torch.rand(3, 2, dtype=torch.float64) + 1, torch.tensor([0, 1, 1])

    @custom_root(lambda x, t, w, k: x * pick(w, k) - t, argnums=1)
    def solve(x: Tensor, t: Tensor, w: Tensor, k: Tensor) -> Tensor:
        return t / pick(w, k)

    def value(t: Tensor, w: Tensor, k: Tensor) -> Tensor:
        return solve(t, t, w, k) ** 2

    t = torch.tensor(3.0, dtype=torch.float64)
    found = vmap(grad(value), (None, 0, 0))(t, weights, labels)
    assert relative_error(found, 2 * t / weights[range(3), labels] ** 2) < 1e-12


@pytest.mark.parametrize("solve", [solve_lu(), solve_normal_cg(rtol=1e-13), "own"])
def test_any_linear_solver(solve: Any) -> None:
    """A function of one's own is differentiated as those of the library are."""

    def own(matvec: Any, b: Any) -> Any:
        def column(v: list[float]) -> list[float]:
            product = matvec(tree_like(v))
            return [*product["w"].tolist(), product["b"].item()]

        def tree_like(v: list[float]) -> dict[str, Tensor]:
            z = torch.tensor(v, dtype=torch.float64)
            return {"w": z[:3], "b": z[3]}

        matrix = torch.tensor([column(row) for row in torch.eye(4).tolist()], dtype=torch.float64)
        right = torch.cat([b["w"], b["b"].reshape(1)])
        return tree_like(torch.linalg.solve(matrix.T, right).tolist())

    def value(at: Tensor) -> Tensor:
        return solution(at, solve=own if solve == "own" else solve)

    assert relative_error(grad(value)(theta()), GRADIENT) < META_GRADIENT
    assert relative_error(jacfwd(jacfwd(value))(theta()), HESSIAN) < META_GRADIENT
    assert relative_error(jacrev(jacrev(value))(theta()), HESSIAN) < META_GRADIENT


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("how", ["variable", "module", "nested", "partial"])
def test_closures(how: str, order: int) -> None:
    """What the condition closes over is differentiated, plainly and under torch.func."""

    def value(at: Tensor) -> Tensor:
        hidden = tree_of(at)
        if how == "variable":
            fn: Any = lambda x: condition(x, hidden)  # noqa: E731
        elif how == "module":
            holder = torch.nn.Module()
            holder.u, holder.v = hidden["u"], hidden["v"]
            fn = lambda x: condition(x, {"u": holder.u, "v": holder.v})  # noqa: E731
        elif how == "nested":
            inside = lambda: hidden  # noqa: E731
            fn = lambda x: condition(x, inside())  # noqa: E731
        else:
            fn = functools.partial(condition, theta=hidden)
        solver = custom_root(lambda x, _: fn(x), argnums=1)(lambda x, _: newton(x, hidden))
        return outer(solver(start(), torch.zeros((), dtype=torch.float64)))

    if order == 1:
        at = theta().requires_grad_()
        assert relative_error(torch.autograd.grad(value(at), at)[0], GRADIENT) < META_GRADIENT
        assert relative_error(grad(value)(theta()), GRADIENT) < META_GRADIENT
        assert relative_error(jacfwd(value)(theta()), GRADIENT) < META_GRADIENT
        batch = torch.stack([theta(), theta() + 0.1])
        expected = torch.stack([grad(value)(x) for x in batch])
        assert relative_error(vmap(grad(value))(batch), expected) < 1e-9
    else:
        assert relative_error(jacrev(jacrev(value))(theta()), HESSIAN) < META_GRADIENT
        assert relative_error(jacfwd(jacfwd(value))(theta()), HESSIAN) < META_GRADIENT


def test_pure_products() -> None:
    at = theta()
    x = newton(start(), tree_of(at))
    jacobian = differences(
        lambda t: torch.cat([*(v.reshape(-1) for v in newton(start(), tree_of(t)).values())]), at
    )
    bar = {"w": torch.randn(3, dtype=torch.float64), "b": torch.randn((), dtype=torch.float64)}
    (found,) = root_vjp(condition, x, (tree_of(at),), bar)
    flat = torch.cat([found["u"], found["v"].reshape(1)])
    assert relative_error(flat, torch.cat([bar["w"], bar["b"].reshape(1)]) @ jacobian) < 1e-8
    dot = torch.randn(4, dtype=torch.float64)
    moved = root_jvp(condition, x, (tree_of(at),), (tree_of(dot),))
    assert relative_error(torch.cat([moved["w"], moved["b"].reshape(1)]), jacobian @ dot) < 1e-8
    still = root_jvp(condition, x, (tree_of(at),), (None,))
    assert not still["w"].any()


def test_products_are_differentiable() -> None:
    """In the solution, the arguments and the cotangent, as functions that know of no solver."""

    def vjp(x: Tensor, t: Tensor, bar: Tensor) -> Tensor:
        return root_vjp(lambda x, t, _: x**3 * t - t**2, x, (t, "constant"), bar)[0]

    def formula(x: Tensor, t: Tensor, bar: Tensor) -> Tensor:
        return -(x**3 - 2 * t) * bar / (3 * x**2 * t)

    point = [torch.tensor(v, dtype=torch.float64) for v in (1.2, 0.7, -0.4)]
    for k in range(3):
        for take in (grad, jacfwd):
            assert relative_error(take(vjp, k)(*point), grad(formula, k)(*point)) < 1e-10


def test_a_game() -> None:
    """Two players with losses of their own: the Jacobian of their gradients is not symmetric."""
    g = torch.Generator().manual_seed(0)
    mixed = torch.randn(3, 3, dtype=torch.float64, generator=g)

    def first(x: Tensor, y: Tensor, t: Tensor) -> Tensor:
        return x @ mixed @ y + x.square().sum() - (t * x).sum()

    def second(x: Tensor, y: Tensor, t: Tensor) -> Tensor:
        return -x @ mixed @ y * 0.5 + y.square().sum() * t.square().sum() - y.sum()

    def stationary(xy: tuple[Tensor, Tensor], t: Tensor) -> tuple[Tensor, Tensor]:
        return grad(first, 0)(*xy, t), grad(second, 1)(*xy, t)

    def solve(_: Any, t: Tensor) -> tuple[Tensor, Tensor]:
        eye = torch.eye(3, dtype=torch.float64)
        matrix = torch.cat(
            [
                torch.cat([2 * eye, mixed], 1),
                torch.cat([-0.5 * mixed.T, 2 * t.square().sum() * eye], 1),
            ]
        )
        z = torch.linalg.solve(matrix, torch.cat([t, torch.ones_like(t)]))
        return z[:3], z[3:]

    wrapped = custom_root(stationary, argnums=1, residual_check=1e-10)(solve)

    def value(t: Tensor) -> Tensor:
        x, y = wrapped((torch.zeros(3), torch.zeros(3)), t)
        return (x * y).sum() + x[0] ** 2

    def exact(t: Tensor) -> Tensor:
        x, y = solve(None, t)
        return (x * y).sum() + x[0] ** 2

    t = torch.tensor([0.5, -1.0, 0.7], dtype=torch.float64)
    assert relative_error(grad(value)(t), grad(exact)(t)) < 1e-9
    assert relative_error(jacrev(jacrev(value))(t), jacrev(jacrev(exact))(t)) < 1e-9


def test_a_complex_unknown_after_a_real_one() -> None:
    """Pieces of one vector of reals, of which the complex one begins at an odd place."""

    def function(x: Any, t: Tensor) -> Any:
        return {"r": x["r"] - t**2, "z": x["z"] - torch.complex(t * x["r"], t)}

    @custom_root(function, argnums=1, solve=solve_lu())
    def solve(x: Any, t: Tensor) -> Any:
        return {"r": t**2, "z": torch.complex(t**3, t)}

    start = {
        "r": torch.zeros((), dtype=torch.float64),
        "z": torch.zeros((), dtype=torch.complex128),
    }
    t = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    found = solve(start, t)
    (first,) = torch.autograd.grad(
        found["r"] + found["z"].real + 2 * found["z"].imag, t, create_graph=True
    )
    assert relative_error(first, 2 * t + 3 * t**2 + 2) < 1e-12
    (second,) = torch.autograd.grad(first, t)
    assert relative_error(second, 2 + 6 * t) < 1e-12


def test_complex_solutions() -> None:
    """Of a condition that is not holomorphic."""

    def function(z: Tensor, t: Tensor) -> Tensor:
        return z + 0.3 * z.conj() * t - torch.complex(t, t**2)

    @custom_root(function, argnums=1)
    def solve(z: Tensor, t: Tensor) -> Tensor:
        for _ in range(200):
            z = torch.complex(t, t**2) - 0.3 * z.conj() * t
        return z

    def value(t: Tensor) -> Tensor:
        return (solve(torch.zeros((), dtype=torch.complex128), t) * (1 + 2j)).real ** 2

    t = torch.tensor(0.8, dtype=torch.float64)
    expected = differences(lambda t: value(t.detach()), t)
    assert relative_error(grad(value)(t).reshape(1), expected) < META_GRADIENT


def test_fixed_points() -> None:
    """An equilibrium layer, with weights that only the map knows."""
    g = torch.Generator().manual_seed(1)
    layer = torch.nn.Linear(5, 5, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(5, 5, dtype=torch.float64, generator=g) * 0.15)
    x = torch.randn(4, 5, dtype=torch.float64, generator=g)

    def equilibrium(z: Tensor, x: Tensor) -> Tensor:
        for _ in range(120):
            z = torch.tanh(layer(z) + x)
        return z

    wrapped = custom_fixed_point(
        lambda z, x: torch.tanh(layer(z) + x), argnums=1, residual_check=1e-12
    )(equilibrium)
    inputs = [x.clone().requires_grad_(), layer.weight, layer.bias]
    through = torch.autograd.grad(equilibrium(0 * x, inputs[0]).pow(2).sum(), inputs)
    found = torch.autograd.grad(wrapped(0 * x, inputs[0]).pow(2).sum(), inputs)
    for a, b in zip(found, through):
        assert relative_error(a, b) < 1e-9
