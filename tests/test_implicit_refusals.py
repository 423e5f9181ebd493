"""What errors of implicit derivatives say: what was given and expected, and what to type."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from torchopt.diff import Implicit
from torchopt.diff.implicit import custom_fixed_point, custom_root, root_jvp, root_vjp
from torchopt.solvers import LBFGS, minimize


# What callers hand over in the place of something else.
NUMBER: Any = 3
NAME: Any = "cg"
SINGLE: Any = torch.ones(())


def root_of(x: Tensor, t: Tensor) -> Tensor:
    return x * x - t


def sqrt(x: Tensor, t: Tensor) -> Tensor:
    return t.sqrt()


def number(value: float = 4.0) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def call(condition: Any = root_of, solver: Any = sqrt, argnums: Any = 1, **options: Any) -> Any:
    wrapped = custom_root(condition, argnums, **options)(solver)
    x = wrapped(torch.ones((), dtype=torch.float64), number())
    leaf = x[0] if isinstance(x, tuple) else x
    return torch.autograd.grad(leaf, leaf)


ONE = torch.ones((), dtype=torch.float64)


class Hidden:
    """Keeps a tensor where no search finds it."""

    __slots__ = ("value",)

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return x * x - t * self.value


def backward_of(solve: Any) -> Any:
    x = custom_root(root_of, 1, solve=solve)(sqrt)(torch.ones(()), t := number())
    return torch.autograd.grad(x, t)


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], tuple[str, ...]]] = {
    "start": (lambda: call(argnums=0), ValueError, ("the start", "argument after the start is 1")),
    "start-by-name": (lambda: call(argnums="x"), ValueError, ("the start",)),
    "negative": (lambda: call(argnums=-1), ValueError, ("from 1 on", "-1")),
    "none": (lambda: call(argnums=()), ValueError, ("from 1 on", "argnums=1")),
    "bool": (lambda: call(argnums=True), TypeError, ("a position, a name", "True")),
    "far": (lambda: call(argnums=2), ValueError, ("argnums=2", "sqrt(x", "has not")),
    "far-open": (
        lambda: custom_root(root_of, 3)(lambda x, *args: x)(torch.ones(()), number()),
        ValueError,
        ("out of range", "2 positional"),
    ),
    "no-name": (lambda: call(argnums="lam"), ValueError, ("'lam'", "has not")),
    "no-function": (lambda: custom_root(NUMBER, 1), TypeError, ("optimality_fn", "3")),
    "no-solver": (lambda: custom_root(root_of, 1)(NUMBER), TypeError, ("decorates a solver",)),
    "no-linear-solver": (
        lambda: custom_root(root_of, 1, solve=NAME),
        TypeError,
        ("solve(matvec, b)", "solve_cg()", "'cg'"),
    ),
    "negative-check": (lambda: call(residual_check=-1.0), ValueError, ("residual_check", "-1")),
    "another-order": (
        lambda: custom_root(lambda x, a, b: x, 1)(lambda x, b, a: x),
        ValueError,
        ("same arguments in another order", "(x, b, a)", "(x, a, b)"),
    ),
    "no-place": (
        lambda: call(condition=lambda x: x, solver=sqrt),
        TypeError,
        ("has no place for 't'", "argnums names it"),
    ),
    "no-first": (lambda: call(condition=lambda *, x: x), TypeError, ("as its first argument",)),
    "call": (
        lambda: custom_root(root_of, 1)(sqrt)(torch.ones(()), t=1.0, k=2),
        TypeError,
        ("sqrt(x", "unexpected keyword argument 'k'"),
    ),
    "structure": (
        lambda: call(solver=lambda x, t: {"x": t.sqrt()}, condition=lambda x, t: x["x"] ** 2 - t),
        ValueError,
        ("does not match the solution", "the first is a tensor of shape ()", "has_aux=True"),
    ),
    "shapes": (
        lambda: call(condition=lambda x, t: (x * x - t).reshape(1)),
        ValueError,
        ("shapes of the solution: ()", "(1,)"),
    ),
    "no-tensor": (
        lambda: call(condition=lambda x, t: 0.0),
        TypeError,
        ("must hold tensors", "0.0"),
    ),
    "aux": (
        lambda: call(solver=lambda x, t: (t.sqrt(), 7)),
        TypeError,
        ("floating-point or complex", "7", "'1'", "has_aux=True"),
    ),
    "no-aux": (lambda: call(has_aux=True), TypeError, ("(solution, aux)", "a tensor")),
    "no-solution": (lambda: call(solver=lambda x, t: []), ValueError, ("holds no tensor",)),
    "unsolved": (
        lambda: call(solver=lambda x, t: t.sqrt() + 0.1, residual_check=1e-6),
        ValueError,
        ("does not satisfy the condition", "0.41", "residual_check=1e-06", "root_of"),
    ),
    "nan": (
        lambda: call(solver=lambda x, t: t.sqrt() * float("nan"), residual_check=1.0),
        ValueError,
        ("is not finite there",),
    ),
    "unseen": (
        lambda: call(condition=Hidden(number())),
        RuntimeError,
        ("reaches the condition", "not seen from outside", "argnums"),
    ),
    "gradient-in-solver": (
        lambda: call(solver=lambda x, t: torch.autograd.grad(x * x, x)[0]),
        RuntimeError,
        ("torch.enable_grad()",),
    ),
    "singular": (
        lambda: backward_of(lambda matvec, b: b / 0),
        RuntimeError,
        ("not finite", "singular", "a lambda"),
    ),
    "other-structure-of-linear-solver": (
        lambda: backward_of(lambda matvec, b: [b]),
        ValueError,
        ("What the linear solver returned does not match the solution",),
    ),
    "vjp-args": (
        lambda: root_vjp(root_of, torch.ones(()), SINGLE, torch.ones(())),
        TypeError,
        ("args must be a tuple", "(theta,)"),
    ),
    "vjp-cotangent": (
        lambda: root_vjp(root_of, torch.ones(()), (torch.ones(()),), torch.ones(2)),
        ValueError,
        ("cotangent must have the shapes", "(2,)"),
    ),
    "jvp-tangents": (
        lambda: root_jvp(root_of, torch.ones(()), (torch.ones(()),), ()),
        ValueError,
        ("tangents must be a tuple like args, of length 1",),
    ),
    "adjoint": (lambda: Implicit(solve=NUMBER), TypeError, ("solve(matvec, b)",)),
    "adjoint-unsolved": (
        lambda: minimize(
            lambda p, t: (p.exp() - t * p).sum(),
            LBFGS(max_iter=1),
            torch.zeros(2),
            number(),
            adjoint=Implicit(residual_check=1e-4),
        ),
        ValueError,
        ("does not satisfy", "residual_check=0.0001"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    refused, kind, phrases = REFUSED[name]
    with pytest.raises(kind) as caught:
        refused()
    for phrase in phrases:
        assert phrase in str(caught.value), f"{phrase!r} is not in {caught.value}"
    assert len(str(caught.value)) < 700


def test_an_argument_that_requires_grad_and_is_not_named_warns() -> None:
    solver = custom_root(lambda x, a, b: x - a * b, argnums=1)(lambda x, a, b: a * b)
    with pytest.warns(UserWarning, match="not differentiated by 'b'.*argnums=1"):
        x = solver(torch.zeros(()), a := number(2.0), number(3.0))
    assert torch.autograd.grad(x, a)[0] == 3


def test_what_is_hidden_is_found_though_nothing_else_requires_grad() -> None:
    solver = custom_root(Hidden(number()), argnums=1)(lambda x, t: t)
    with pytest.raises(RuntimeError, match="not seen from outside"):
        solver(torch.ones(()), torch.ones(()))


def test_globals_of_code_without_a_module_are_seen() -> None:
    """As in a notebook that is run by ``exec``."""
    scope: dict[str, Any] = {"a": (a := number())}
    exec("def condition(x, t):\n    return x - a * t", scope)
    x = custom_root(scope["condition"], argnums=1)(lambda x, t: 4 * t)(ONE, ONE)
    assert torch.autograd.grad(x, a)[0] == 1


def test_only_the_start_warns() -> None:
    solver = custom_root(root_of, argnums=1)(sqrt)
    with pytest.warns(UserWarning, match="Only the start"):
        x = solver(number(), torch.tensor(4.0))
    assert not x.requires_grad


def test_nothing_warns_and_nothing_is_recorded_where_nothing_requires_grad() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = custom_root(root_of, argnums=1)(sqrt)(torch.ones(()), torch.tensor(4.0))
        with torch.no_grad():
            y = custom_root(root_of, argnums=1)(sqrt)(torch.ones(()), number())
    assert not x.requires_grad
    assert not y.requires_grad
    assert x == y == 2


def test_an_unsolved_member_of_a_batch_is_found() -> None:
    solver = custom_root(root_of, argnums=1, residual_check=1e-6)(
        lambda x, t: t.sqrt().clamp(max=2.0)
    )
    value = torch.func.vmap(lambda t: solver(t, t))
    assert torch.equal(value(torch.tensor([1.0, 4.0])), torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match="does not satisfy"):
        value(torch.tensor([1.0, 9.0]))


def test_a_fixed_point_of_another_structure() -> None:
    solver = custom_fixed_point(lambda x, t: [x, t], argnums=1)(lambda x, t: t)
    with pytest.raises(ValueError, match="does not match"):
        solver(torch.zeros(()), number())


def test_a_solver_that_ended_early_warns() -> None:
    with pytest.warns(UserWarning, match="has not come to one.*MAX_ITER"):
        minimize(
            lambda p, t: (p.exp() - t * p).sum(),
            LBFGS(max_iter=1),
            torch.zeros(2),
            number(),
            adjoint=Implicit(),
        )


def test_a_solution_unlike_the_start_at_which_the_condition_fails() -> None:
    def condition(x: Tensor, theta: Tensor) -> Tensor:
        return x * x - theta

    def solver(x: Tensor, theta: Tensor) -> Any:
        return theta.sqrt(), theta

    theta = torch.tensor(2.0, requires_grad=True)
    with pytest.raises(TypeError, match=r"solver.*not that of the start.*pass has_aux=True"):
        custom_root(condition, argnums=1)(solver)(torch.tensor(1.0), theta)
    found, _ = custom_root(condition, argnums=1, has_aux=True)(solver)(torch.tensor(1.0), theta)
    (gradient,) = torch.autograd.grad(found, theta)
    torch.testing.assert_close(gradient, 0.5 / theta.detach().sqrt())
