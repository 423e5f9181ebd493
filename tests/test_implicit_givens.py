"""What implicit differentiation is given: maps, networks with unused parts, solvers not called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from tolerances import relative_error
from torch import Tensor, nn

import torchopt
from torchopt.diff import T1T2, Implicit, custom_fixed_point, custom_root, hypergradient
from torchopt.linear_solve import solve_cg, solve_lu, solve_nystrom
from torchopt.nn import ImplicitMetaGradientModule
from torchopt.solvers import LBFGS, Anderson, GaussNewton, Newton, find_root, fixed_point, minimize


def squares(w: dict[str, Tensor], a: Tensor) -> Tensor:
    """Depends on one leaf of two."""
    return (w["used"] - a * a).square().sum()


def start() -> dict[str, Tensor]:
    return {"used": torch.zeros(2, dtype=torch.float64), "unused": torch.ones(3).double()}


class Part(ImplicitMetaGradientModule, linear_solve=solve_cg()):
    """Has a head that the objective makes no use of."""

    def __init__(self, a: Tensor) -> None:
        super().__init__()
        self.a = a
        self.used = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.head = nn.Linear(2, 2)

    def objective(self) -> Tensor:
        return squares({"used": self.used}, self.a)

    def solve(self) -> None:
        with torch.no_grad():
            self.used.copy_(self.a * self.a)


def by_module(a: Tensor) -> Tensor:
    part = Part(a)
    part.solve()
    return part.used


def by_decorator(a: Tensor) -> Tensor:
    condition = torchopt.diff.stationarity.stationarity(squares)
    solver = custom_root(condition, argnums=1, solve=solve_cg())
    return solver(lambda w, a: {**w, "used": a * a + w["used"]})(start(), a)["used"]


def by_minimize(a: Tensor) -> Tensor:
    found = minimize(squares, LBFGS(), start(), a, adjoint=Implicit(solve=solve_cg()))
    return found.params["used"]


@pytest.mark.parametrize("how", [by_module, by_decorator, by_minimize])
def test_parameters_without_use_do_no_harm(how: Callable[[Tensor], Tensor]) -> None:
    """The zeros that stand for their gradients were taken for a hidden tensor."""
    a = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(how(a).sum(), a, create_graph=True)
    assert relative_error(first, torch.tensor(6.0)) < 1e-8  # of 2 a^2
    assert relative_error(torch.autograd.grad(first, a)[0], torch.tensor(4.0)) < 1e-6


def test_hypergradients_of_a_network_with_an_unused_part() -> None:
    outer = lambda w, h: w["used"].sum()  # noqa: E731
    a = torch.tensor(1.5, dtype=torch.float64)
    w = {**start(), "used": (a * a).expand(2)}
    found = hypergradient(outer, squares, w, a, Implicit(solve=solve_cg()))
    assert relative_error(found, torch.tensor(6.0)) < 1e-8


X = torch.zeros(3)


def fixed(image: Any) -> Any:
    return lambda: custom_fixed_point(lambda x, a: image, 1)(lambda x, a: x)(
        X, torch.ones((), requires_grad=True)
    )


def made(**options: Any) -> Callable[[], Any]:
    body = {"solve": lambda self: None, "objective": lambda self: torch.ones(())}
    return lambda: type(ImplicitMetaGradientModule)(
        "Net", (ImplicitMetaGradientModule,), body, **options
    )


loss = lambda w, h: (w - h).square().sum()  # noqa: E731
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], tuple[str, ...]]] = {
    "map-to-number": (fixed(torch.ones(())), ValueError, ("like its argument", "(3,)", "()")),
    "map-to-larger": (fixed(torch.ones(2, 3)), ValueError, ("like its argument", "(2, 3)")),
    "map-to-pair": (fixed((X, X)), ValueError, ("does not match", "tuple of length 2", "tensor")),
    "map-to-none": (fixed(None), ValueError, ("like its argument", "None")),
    "fixed-point": (
        lambda: fixed_point(lambda x: x.sum(), Anderson(), X),
        ValueError,
        ("like params", "(3,)", "()"),
    ),
    "maker": (
        lambda: custom_root(loss, 1, solve=solve_cg),
        TypeError,
        ("solve(matvec, b)", "function solve_cg", "Call it: solve_cg(...)"),
    ),
    "maker-with-arguments": (
        lambda: Implicit(solve=solve_nystrom),
        TypeError,
        ("Call it: solve_nystrom(...)",),
    ),
    "maker-of-a-class": (made(linear_solve=solve_lu), TypeError, ("Call it: solve_lu(...)",)),
    "one-argument": (
        lambda: custom_root(loss, 1, solve=lambda b: b),
        TypeError,
        ("a lambda", "Write solve=torchopt.linear_solve.solve_cg()"),
    ),
    "class-option": (
        made(linearsolve=solve_cg()),
        TypeError,
        ("class Net", "no argument 'linearsolve'", "'linear_solve'", "'residual_check'"),
    ),
    "method-class": (
        lambda: hypergradient(loss, loss, X, X, cast(Any, T1T2)),
        TypeError,
        ("T1T2()", "the class T1T2"),
    ),
    "preconditioner": (
        lambda: solve_cg(preconditioner=torch.eye(3)),
        TypeError,
        ("preconditioner must be", "lambda v: A @ v"),
    ),
}
for name, call in {
    "minimize": lambda adjoint: minimize(lambda x: x.square().sum(), LBFGS(), X, adjoint=adjoint),
    "find_root": lambda adjoint: find_root(lambda x: x, Newton(), X, adjoint=adjoint),
    "least_squares": lambda adjoint: torchopt.solvers.least_squares(
        lambda x: x, GaussNewton(), X, adjoint=adjoint
    ),
}.items():
    for wrong in ("implicit", Implicit, 3):
        REFUSED[f"{name}-{type(wrong).__name__}"] = (
            lambda call=call, wrong=wrong: call(wrong),
            TypeError,
            ("adjoint must be", "Implicit()", "Unrolled()", "None, got"),
        )


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_what_to_type(name: str) -> None:
    refused, kind, phrases = REFUSED[name]
    with pytest.raises(kind) as caught:
        refused()
    for phrase in phrases:
        assert phrase in str(caught.value), f"{phrase!r} is not in {caught.value}"
