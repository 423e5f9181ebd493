"""Trust ratios, LAMB and LARS: where a norm is zero, and with masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import nonzero
from tolerances import all_finite, assert_close
from torch import Tensor

import torchopt


F64 = {"dtype": torch.float64}


def test_lamb_without_a_ratio_is_adamw() -> None:
    params = {"w": nonzero(3, 2), "b": nonzero(2)}
    grads = {"w": nonzero(3, 2), "b": nonzero(2)}
    k: dict[str, Any] = {"lr": 0.03, "betas": (0.8, 0.9), "eps": 1e-4, "weight_decay": 0.2}
    mask = {"w": True, "b": False}
    ours = torchopt.lamb(**k, mask=mask, trust_ratio_mask=mask)
    adamw = torchopt.adamw(**k, mask=mask)
    found, _ = ours.update(grads, ours.init(params), params, inplace=False)
    expected, _ = adamw.update(grads, adamw.init(params), params, inplace=False)
    assert_close(found["b"], expected["b"])
    assert_close(found["w"].norm(), 0.03 * params["w"].norm())
    assert (found["w"] - expected["w"]).abs().max() > 1e-3


# Norms that are zero ------------------------------------------------------------------------------


def scaled(g: Tensor, p: Tensor, **k: Any) -> Tensor:
    tx = torchopt.scale_by_trust_ratio(**k)
    return tx.update(g, tx.init(p), p, inplace=False)[0]


@pytest.mark.parametrize("zero", ["gradient", "parameter", "both"])
def test_the_ratio_is_the_constant_1_where_a_norm_is_zero(zero: str) -> None:
    """In value, in derivatives of first and second order, and whatever the coefficient is."""
    g = torch.zeros(3, **F64) if zero in ("gradient", "both") else nonzero(3)
    p = torch.zeros(3, **F64) if zero in ("parameter", "both") else nonzero(3)
    numbers = (torch.tensor(0.3, **F64), torch.tensor(0.0, **F64))

    def update(g: Tensor, p: Tensor, coefficient: Tensor, eps: Tensor) -> Tensor:
        return scaled(g, p, trust_coefficient=coefficient, eps=eps)

    point = (g, p, *numbers)
    assert_close(update(*point), g)
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        by_g, by_p, *by_numbers = jacobian(update, argnums=(0, 1, 2, 3))(*point)
        assert_close(by_g, torch.eye(3, **F64))
        assert (by_p == 0).all()
        assert all((derivative == 0).all() for derivative in by_numbers)
    hessian = torch.func.hessian(lambda g, p: update(g, p, *numbers).sum(), argnums=(0, 1))(g, p)
    assert all((block == 0).all() for row in hessian for block in row)


def test_a_floor_takes_the_place_of_a_norm() -> None:
    """Below the floor the norm does not count, at zero neither: no ratio is 1 for that."""
    g, p, floor = nonzero(3), nonzero(3), torch.tensor(5.0, **F64)
    for gradient, param in ((g, p), (torch.zeros_like(g), p), (g, torch.zeros_like(p))):
        assert_close(scaled(gradient, param, min_norm=floor, trust_coefficient=0.5), 0.5 * gradient)
    by_p = torch.func.jacrev(lambda p: scaled(g, p, min_norm=floor))(p)
    assert (by_p == 0).all()
    by_floor = torch.func.jacrev(lambda n: scaled(g, p, min_norm=n, eps=1.0))(floor)
    assert_close(by_floor, g / (floor + 1) ** 2)


def test_derivatives_are_those_of_the_equation() -> None:
    p, g = nonzero(3, 2), nonzero(3, 2)
    coefficient, eps = torch.tensor(0.7, **F64), torch.tensor(0.2, **F64)
    point = (p, g, coefficient, eps)

    def ours(p: Tensor, g: Tensor, coefficient: Tensor, eps: Tensor) -> Tensor:
        return scaled(g, p, trust_coefficient=coefficient, eps=eps)

    def plain(p: Tensor, g: Tensor, coefficient: Tensor, eps: Tensor) -> Tensor:
        return coefficient * p.norm() / (g.norm() + eps) * g

    assert_close(ours(*point), plain(*point))
    every = (0, 1, 2, 3)
    found = torch.func.jacrev(ours, every)(*point)
    assert_close(found, torch.func.jacrev(plain, every)(*point))
    assert all_finite(*found)


@pytest.mark.parametrize("recipe", [torchopt.lamb, torchopt.lars])
def test_parameters_that_are_zero_move(recipe: Any) -> None:
    params, grads = {"w": torch.zeros(3, **F64)}, {"w": nonzero(3)}
    tx = recipe(lr=0.5, eps=0.0)
    updates, _ = tx.update(grads, tx.init(params), params)
    expected = -0.5 * (grads["w"].sign() if recipe is torchopt.lamb else grads["w"])
    assert_close(updates["w"], expected)


def test_what_it_needs_and_refuses() -> None:
    tx, g = torchopt.scale_by_trust_ratio(), [torch.ones(2)]
    with pytest.raises(ValueError, match="The trust ratio needs"):
        tx.update(g, tx.init(g))
    for name in ("min_norm", "trust_coefficient", "eps"):
        with pytest.raises(ValueError, match=f"{name} must be >= 0"):
            torchopt.scale_by_trust_ratio(**{name: -0.1})
    with pytest.raises(ValueError, match="Nesterov momentum needs"):
        torchopt.lars(momentum=0.0, nesterov=True)


def test_complex_norms_are_those_of_complex_numbers() -> None:
    p, g = nonzero(3, dtype=torch.complex128), nonzero(3, dtype=torch.complex128)
    assert_close(scaled(g, p), g * (p.norm() / g.norm()))
