"""Arguments, results and problems of implicit derivatives, as people write them."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from implicit_problems import differences
from tolerances import META_GRADIENT, relative_error
from torch import Tensor

import torchopt
from torchopt.diff import Implicit
from torchopt.diff.implicit import custom_root
from torchopt.solvers import LBFGS, GradientDescent, minimize


def numbers(*values: float) -> list[Tensor]:
    return [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in values]


ONE = torch.ones((), dtype=torch.float64)


# Arguments ---------------------------------------------------------------------------------------


def weighted(x: Tensor, a: Tensor, b: Tensor, *, power: int = 1) -> Tensor:
    return x**power - a**2 * b


def solve(x: Tensor, a: Tensor, b: Tensor, power: int = 1, limit: int = 3) -> Tensor:
    assert limit == 3
    return (a**2 * b) ** (1 / power)


CALLS: dict[str, Any] = {
    "by position": lambda f, a, b: f(ONE, a, b),
    "by keyword": lambda f, a, b: f(ONE, b=b, a=a),
    "all by keyword": lambda f, a, b: f(x=ONE, b=b, a=a),
    "mixed": lambda f, a, b: f(ONE, a, b=b),
    "with an option of both": lambda f, a, b: f(ONE, a, b, power=1),
    "with an option of the solver": lambda f, a, b: f(ONE, a, b, limit=3),
}


@pytest.mark.parametrize("how", CALLS)
@pytest.mark.parametrize("argnums", [(1, 2), ("a", "b"), (1, "b")])
def test_arguments_are_matched_by_name(how: str, argnums: Any) -> None:
    a, b = numbers(1.5, -0.7)
    x = CALLS[how](custom_root(weighted, argnums=argnums)(solve), a, b)
    for found, expected in zip(torch.autograd.grad(x, [a, b]), (2 * a * b, a**2)):
        assert relative_error(found, expected) < 1e-12


def test_an_option_of_both_is_the_same_in_both() -> None:
    a, b = numbers(1.5, 0.7)
    x = custom_root(weighted, argnums=(1, 2), residual_check=1e-9)(solve)(ONE, a, b, 2)
    found = torch.autograd.grad(x, [a, b])
    assert relative_error(found[0], b.sqrt()) < 1e-12


def test_other_names_are_matched_by_position() -> None:
    a, b = numbers(1.5, -0.7)
    solver = custom_root(lambda z, first, second: z - first * second**2, argnums=2)
    x = solver(lambda x, p, q: p.detach() * q**2)(ONE, a.detach(), b)
    assert relative_error(torch.autograd.grad(x, b)[0], 2 * a * b) < 1e-12


def test_any_number_of_arguments() -> None:
    a, b = numbers(1.5, -0.7)
    solver = custom_root(lambda x, *args: x - args[0] * args[1], argnums=(1, 2))
    x = solver(lambda x, *args: args[0] * args[1])(ONE, a, b)
    assert torch.autograd.grad(x, [a, b]) == (b, a)


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


def test_trees_with_what_is_no_tensor() -> None:
    """Tuples, lists, named tuples, ``None``, strings, modules, whole numbers, shared objects."""
    a, b = numbers(1.5, -0.7)
    net = torch.nn.Linear(1, 1, dtype=torch.float64)
    given = {"pair": Pair(a, b), "flag": True, "name": "x", "none": None, "k": torch.tensor(2)}

    def condition(x: Any, options: Any, parts: Any) -> Any:
        pair, (module, text) = options["pair"], parts
        assert options["flag"] is True
        assert options["none"] is None
        assert text == "text"
        return [x[0] - pair.left * options["k"], None, x[2] - module(pair.right.reshape(1))]

    def solver(x: Any, options: Any, parts: Any) -> Any:
        pair = options["pair"]
        return [pair.left * options["k"], None, parts[0](pair.right.reshape(1))]

    x = custom_root(condition, argnums=1)(solver)(ONE, given, (net, "text"))
    assert x[1] is None
    value = x[0] * 3 + x[2].sum()
    found = torch.autograd.grad(value, [a, b, net.weight, net.bias])
    assert [g.item() for g in found] == pytest.approx([6.0, net.weight.item(), b.item(), 1.0])


def test_aux_is_handed_on_without_derivative() -> None:
    (t,) = numbers(4.0)
    box = object()

    @custom_root(lambda x, t: x * x - t, argnums=1, has_aux=True)
    def solver(x: Tensor, t: Tensor) -> Any:
        return t.sqrt(), {"steps": 3, "box": box, "trace": t * 2}

    x, aux = solver(ONE, t)
    assert aux["steps"] == 3
    assert aux["box"] is box
    assert aux["trace"] == 8
    assert not aux["trace"].requires_grad
    assert torch.autograd.grad(x, t)[0] == 0.25
    traces = torch.func.vmap(lambda t: solver(t, t)[1]["trace"])(torch.tensor([1.0, 4.0]))
    assert traces.tolist() == [2.0, 8.0]


def test_a_solver_may_differentiate_inside_and_work_in_place() -> None:
    """As the examples of TorchOpt 0.7.3 do, on parameters that require grad."""
    (t,) = numbers(3.0)

    def objective(params: Any, t: Tensor) -> Tensor:
        return sum((p - t).square().sum() for p in params)  # type: ignore[return-value]

    @custom_root(torch.func.grad(objective), argnums=1)
    def solver(params: Any, t: Tensor) -> Any:
        tx = torchopt.sgd(lr=0.25)
        state = tx.init(params)
        with torch.enable_grad():
            for _ in range(60):
                grads = torch.autograd.grad(objective(params, t), params)
                updates, state = tx.update(grads, state, inplace=True)
                params = torchopt.apply_updates(params, updates, inplace=True)
        return params

    params = tuple(torch.zeros(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    found = solver(params, t)
    assert isinstance(found, tuple)
    assert relative_error(torch.autograd.grad(found[0].sum() + found[1][0], t)[0], 3.0) < 1e-12
    assert t.grad is None


# The adjoint -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "solver",
    [
        LBFGS(tolerance_grad=1e-9, tolerance_change=0),
        GradientDescent(torchopt.sgd(0.2), max_iter=3000, tolerance_grad=1e-11, tolerance_change=0),
    ],
    ids=["LBFGS", "GradientDescent"],
)
def test_solvers_by_their_condition(solver: Any) -> None:
    """A quadratic with a closed form: ``w = -H^-1 B x``; in arguments and closures."""
    g = torch.Generator().manual_seed(5)
    root = torch.randn(4, 4, dtype=torch.float64, generator=g)
    hessian = root @ root.T / 4 + torch.eye(4, dtype=torch.float64)
    mixed = torch.randn(4, 3, dtype=torch.float64, generator=g)
    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)

    def fn(p: Any, x: Tensor) -> Tensor:
        w = torch.cat([p["a"], p["b"].reshape(1)])
        return 0.5 * scale * w @ hessian @ w + w @ mixed @ x

    start = {"a": torch.zeros(3, dtype=torch.float64), "b": ONE * 0}
    x = torch.randn(3, dtype=torch.float64, generator=g).requires_grad_()

    def value(x: Tensor) -> Tensor:
        solution = minimize(fn, solver, start, x, adjoint=Implicit())
        assert solution.outcome.success
        return solution.params["a"].square().sum() + solution.params["b"] + 0 * solution.value

    def formula(x: Tensor) -> Tensor:
        w = -torch.linalg.solve(hessian, mixed @ x) / scale
        return w[:3].square().sum() + w[3]

    for found, expected in zip(
        torch.autograd.grad(value(x), [x, scale]), torch.autograd.grad(formula(x), [x, scale])
    ):
        assert relative_error(found, expected) < 1e-8
    at = x.detach()
    hess = torch.func.hessian(formula)(at)
    assert relative_error(torch.func.jacrev(torch.func.jacrev(value))(at), hess) < 1e-8
    rows = torch.stack([at, 2 * at])
    expected = torch.func.vmap(torch.func.grad(formula))(rows)
    assert relative_error(torch.func.vmap(torch.func.grad(value))(rows), expected) < 1e-8


def test_the_value_at_a_solution_has_its_derivative() -> None:
    (t,) = numbers(2.0)
    fn = lambda p, t: (p - t).square() + t * p  # noqa: E731
    solution = minimize(fn, LBFGS(tolerance_grad=1e-12), ONE, t, adjoint=Implicit())
    # p = t / 2, value 3 t^2 / 4
    assert relative_error(torch.autograd.grad(solution.value, t)[0], 1.5 * t) < 1e-9


@pytest.mark.parametrize("kind", ["ridge", "logistic"])
def test_hyperparameters_of_regressions(kind: str) -> None:
    """The derivative of a validation loss by the strength of the penalty and weights of data."""
    g = torch.Generator().manual_seed(2)
    x, y = torch.randn(8, 4, dtype=torch.float64, generator=g), torch.randn(8, generator=g).double()
    xv, yv = (
        torch.randn(20, 4, dtype=torch.float64, generator=g),
        torch.randn(20, generator=g).double(),
    )

    def losses(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
        if kind == "ridge":
            return (x @ w - y).square()
        return torch.nn.functional.softplus(-torch.sign(y) * (x @ w))

    def objective(w: Tensor, h: Tensor) -> Tensor:
        return (losses(w, x, y) * h[1:].sigmoid()).mean() + h[0].exp() * w.square().sum()

    def validation(h: Tensor) -> Tensor:
        start = torch.zeros(4, dtype=torch.float64)
        solver = LBFGS(tolerance_grad=1e-9, tolerance_change=0)
        w = minimize(objective, solver, start, h, adjoint=Implicit(residual_check=1e-8)).params
        return losses(w, xv, yv).mean()

    def exact(h: Tensor) -> Tensor:
        w = torch.zeros(4, dtype=torch.float64)
        for _ in range(1 if kind == "ridge" else 6):
            hessian = torch.func.hessian(objective)(w, h)
            w = w - torch.linalg.solve(hessian, torch.func.grad(objective)(w, h))
        return losses(w, xv, yv).mean()

    h = torch.randn(9, dtype=torch.float64, generator=g) - 1
    found = torch.func.grad(validation)(h)
    assert relative_error(found, differences(exact, h)) < META_GRADIENT
    assert found[0] != 0


@pytest.mark.parametrize(
    "kind", ["definite", "indefinite", "ill-conditioned", "far from symmetric"]
)
def test_quadratics(kind: str) -> None:
    """Stationary points of ``0.5 w'Hw + w'Bx`` by the dense solution, whatever H is; also b = 0."""
    g = torch.Generator().manual_seed(9)
    q, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=g))
    eigenvalues = {
        "definite": [1.0, 2.0, 3.0, 4.0, 5.0],
        "indefinite": [-3.0, -0.5, 1.0, 2.0, 4.0],
        "ill-conditioned": [1e-6, 1e-3, 1.0, 10.0, 100.0],
        "far from symmetric": [1.0, 2.0, 3.0, 4.0, 5.0],
    }[kind]
    h = q @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ q.T
    if kind == "far from symmetric":
        h = h + 5 * torch.randn(5, 5, dtype=torch.float64, generator=g).triu(1)
    b = torch.randn(5, 3, dtype=torch.float64, generator=g)

    @custom_root(lambda w, x: h @ w + b @ x, argnums=1)
    def solver(w: Tensor, x: Tensor) -> Tensor:
        return -torch.linalg.solve(h, b @ x)

    x = torch.randn(3, dtype=torch.float64, generator=g).requires_grad_()
    w = solver(torch.zeros(5, dtype=torch.float64), x)
    for cotangent in (torch.randn(5, dtype=torch.float64, generator=g), torch.zeros(5).double()):
        (found,) = torch.autograd.grad(w, x, cotangent, retain_graph=True)
        expected = -b.T @ torch.linalg.solve(h.T, cotangent)
        assert relative_error(found, expected) < 1e-8
    jacobian = torch.func.jacrev(lambda x: solver(torch.zeros(5).double(), x))(x.detach())
    assert relative_error(jacobian, differences(lambda x: solver(x, x), x)) < 1e-6


def test_what_a_closure_holds_and_does_not_use_gets_no_gradient() -> None:
    net = torch.nn.Linear(2, 1, dtype=torch.float64)
    (t,) = numbers(2.0)

    def objective(w: Any, t: Tensor) -> Tensor:
        x = torch.eye(2, dtype=torch.float64)
        return (torch.func.functional_call(net, w, (x,)) - t).square().sum() + t * sum(
            v.square().sum() for v in w.values()
        )

    start = {name: p.detach() for name, p in net.named_parameters()}
    solver = LBFGS(tolerance_grad=1e-9, tolerance_change=0)
    minimize(objective, solver, start, t, adjoint=Implicit()).params["bias"].sum().backward()
    assert t.grad is not None
    assert all(p.grad is None for p in net.parameters())
