"""Hypergradients and their estimates, on a quadratic with a closed form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from implicit_problems import differences
from tolerances import META_GRADIENT, relative_error
from torch import Tensor, nn

import torchopt
from torchopt.diff import (
    SAMA,
    T1T2,
    FiniteDifference,
    Implicit,
    Neumann,
    hypergradient,
)
from torchopt.linear_solve import solve_cg, solve_nystrom


N, M = 6, 3
G = torch.Generator().manual_seed(8)
Q = torch.linalg.qr(torch.randn(N, N, dtype=torch.float64, generator=G))[0]
H = Q @ torch.diag(torch.tensor([0.5, 1.0, 1.5, 2.0, 3.0, 4.0], dtype=torch.float64)) @ Q.T
B = torch.randn(N, M, dtype=torch.float64, generator=G)
X = {"x": torch.randn(M - 1, dtype=torch.float64, generator=G), "y": torch.tensor(0.7).double()}


def flat(tree: dict[str, Tensor]) -> Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in tree.values()])


def inner(w: dict[str, Tensor], x: dict[str, Tensor]) -> Tensor:
    return 0.5 * flat(w) @ H @ flat(w) + flat(w) @ B @ flat(x)


def outer(w: dict[str, Tensor], x: dict[str, Tensor]) -> Tensor:
    return (flat(w) ** 3).sum() + flat(x).square().sum()


def at(w: Tensor) -> dict[str, Tensor]:
    return {"a": w[:-1].reshape(1, -1), "b": w[-1]}


STAR = -torch.linalg.solve(H, B @ flat(X))
PULL, DIRECT = 3 * STAR**2, 2 * flat(X)


def found(method: Any, w: Tensor = STAR, x: dict[str, Tensor] = X) -> Tensor:
    return flat(hypergradient(outer, inner, at(w), x, method))


def expected(inverse: Tensor) -> Tensor:
    return DIRECT - B.T @ inverse @ PULL


def test_the_exact_one() -> None:
    def value(x: Tensor) -> Tensor:
        w = -torch.linalg.solve(H, B @ x)
        return outer(at(w), {"x": x[:-1], "y": x[-1]})

    exact = expected(torch.linalg.inv(H))
    assert relative_error(differences(value, flat(X)), exact) < META_GRADIENT
    for method in (None, Implicit(), Implicit(solve=solve_cg(rtol=1e-13))):
        assert relative_error(found(method), exact) < 1e-9
    damped = Implicit(solve=solve_nystrom(rank=N, rho=0.1))
    assert relative_error(found(damped), expected(torch.linalg.inv(H + 0.1 * torch.eye(N)))) < 1e-6


def series(lr: float, terms: int) -> Tensor:
    power, total = torch.eye(N).double(), torch.zeros(N, N).double()
    for _ in range(terms):
        total, power = total + power, power - lr * H @ power
    return lr * total


@pytest.mark.parametrize("terms", [1, 2, 7])
def test_neumann_series(terms: int) -> None:
    assert relative_error(found(Neumann(terms, lr=0.3)), expected(series(0.3, terms))) < 1e-12


def test_neumann_series_with_a_rate_of_its_own_comes_to_the_exact_one() -> None:
    errors = [
        relative_error(found(Neumann(n)), expected(torch.linalg.inv(H))) for n in (5, 50, 400)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-9


def test_identities() -> None:
    wanted = expected(0.2 * torch.eye(N).double())
    assert relative_error(found(T1T2(lr=0.2)), wanted) < 1e-12
    assert relative_error(found(FiniteDifference(lr=0.2)), wanted) < 1e-8
    assert relative_error(found(SAMA(torchopt.sgd(0.2))), wanted) < 1e-8


def test_one_step_of_gradient_descent_is_what_t1_t2_differentiates() -> None:
    w = torch.randn(N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def value(x: Tensor) -> Tensor:
        tree = {"x": x[:-1], "y": x[-1]}
        step = torch.func.grad(inner)(at(w.clone()), tree)
        new = {k: v - 0.1 * (step[k] - step[k].detach()) for k, v in at(w).items()}
        return outer(new, tree)

    result = hypergradient(outer, inner, at(w), X, T1T2(0.1))
    assert relative_error(flat(result), torch.func.grad(value)(flat(X))) < 1e-12


def test_the_step_of_an_adaptive_optimizer() -> None:
    """Against the derivative through the step itself, at a state with history."""
    tx = torchopt.adam(0.1)
    w = at(STAR + 0.3)
    state = tx.init(w)
    for _ in range(3):
        state = tx.update(torch.func.grad(inner)(w, X), state, inplace=False)[1]

    def value(x: Tensor) -> Tensor:
        tree = {"x": x[:-1], "y": x[-1]}
        updates = tx.update(torch.func.grad(inner)(w, tree), state, w, inplace=False)[0]
        moved = {k: w[k] + updates[k] - updates[k].detach() for k in w}
        return outer(moved, tree)

    result = hypergradient(outer, inner, w, X, SAMA(tx, state))
    assert relative_error(flat(result), torch.func.grad(value)(flat(X))) < 1e-6


def test_zero_and_large_and_small() -> None:
    """An outer loss without a slope gives zero, not nan; scales of weights do not matter."""
    for method in (FiniteDifference(), SAMA(torchopt.sgd(1.0)), Neumann(3), T1T2(), Implicit()):
        result = hypergradient(lambda w, x: 0 * flat(w).sum(), inner, at(STAR), X, method)
        assert not flat(result).any()
    for size in (1e-4, 1e4):

        def scaled(w: dict[str, Tensor], x: dict[str, Tensor], size: float = size) -> Tensor:
            return inner({k: v / size for k, v in w.items()}, x)

        w = {k: v * size for k, v in at(STAR).items()}
        result = hypergradient(outer, scaled, w, X, FiniteDifference())
        assert relative_error(flat(result), flat(hypergradient(outer, scaled, w, X, T1T2()))) < 1e-7


def test_float32_has_a_step_of_its_own() -> None:
    w = {k: v.float() for k, v in at(STAR).items()}
    x = {k: v.float() for k, v in X.items()}

    def single(w: Any, x: Any) -> Tensor:
        return 0.5 * flat(w) @ H.float() @ flat(w) + flat(w) @ B.float() @ flat(x)

    wanted = flat(hypergradient(outer, single, w, x, T1T2()))
    assert (
        relative_error(flat(hypergradient(outer, single, w, x, FiniteDifference())), wanted) < 1e-3
    )


def test_dropout_is_the_same_on_both_sides_and_nothing_has_changed() -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1)).double()
    x, y = torch.randn(16, 3).double(), torch.randn(16, 1).double()
    w = {k: v.detach().clone() for k, v in net.named_parameters()}
    before = {k: v.clone() for k, v in w.items()}

    def loss(w: Any, h: Tensor) -> Tensor:
        errors = (torch.func.functional_call(net, w, (x,)) - y).square().squeeze(-1)
        return (errors * h).mean()

    def validation(w: Any, h: Tensor) -> Tensor:
        return torch.stack([v.square().sum() for v in w.values()]).sum()

    h = torch.rand(16).double()
    results = []
    for method in (T1T2(), FiniteDifference()):
        torch.manual_seed(3)
        results.append(hypergradient(validation, loss, w, h, method))
    assert relative_error(results[1], results[0]) < 1e-6
    assert all(torch.equal(w[k], before[k]) for k in w)
    assert all(p.grad is None for p in net.parameters())


CLASS: Any = torch.optim.SGD  # in the place of a transformation


def refused(**changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "outer_loss": outer,
        "inner_loss": inner,
        "inner_params": at(STAR),
        "outer_params": X,
        "method": None,
    }
    return hypergradient(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("act", "kind", "text"),
    [
        (lambda: refused(method="cg"), TypeError, "Implicit.*got str: 'cg'"),
        (lambda: refused(outer_loss=3), TypeError, "outer_loss must be a function"),
        (lambda: refused(inner_loss=lambda w, x: flat(w)), ValueError, "inner_loss must return"),
        (lambda: refused(outer_loss=lambda w, x: 1.0), TypeError, "outer_loss must return"),
        (lambda: refused(inner_params=[1.0]), TypeError, "inner_params must be floating-point"),
        (lambda: refused(outer_params={}), ValueError, "outer_params holds no tensor"),
        (lambda: refused(method=Neumann(20, lr=5.0)), ValueError, "diverges.*lr=5"),
        (lambda: Neumann(0), ValueError, "terms must be an integer >= 1"),
        (lambda: T1T2(-1.0), ValueError, "lr"),
        (lambda: FiniteDifference(scale=0.0), ValueError, "scale"),
        (lambda: SAMA(CLASS), TypeError, r"torchopt.adam\(1e-3\)"),
        (lambda: refused(method=Implicit(residual_check=1e-6), inner_params=at(STAR + 1)),
         ValueError, "does not satisfy"),
    ],
)  # fmt: skip
def test_refusals(act: Any, kind: Any, text: str) -> None:
    with pytest.raises(kind, match=text):
        act()
