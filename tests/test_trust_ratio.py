"""Trust ratios, LAMB and LARS: against Optax, where a norm is zero, and with masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import nonzero
from optax_steps import F64, assert_ends_at
from tolerances import all_finite, assert_close
from torch import Tensor

import torchopt


# Values of Optax ----------------------------------------------------------------------------------


def test_scale_by_trust_ratio() -> None:
    """``chain(scale_by_trust_ratio(min_norm=1.2, trust_coefficient=0.5, eps=0.1), scale(-0.1))``.

    One norm of each parameter is below the floor.
    """
    ratio = torchopt.scale_by_trust_ratio(min_norm=1.2, trust_coefficient=0.5, eps=0.1)
    assert_ends_at(
        torchopt.chain(ratio, torchopt.scale(-0.1)),
        [
            [0.5369341171736438, -1.0183710087587803, 1.9678778170805262],
            [0.08710914645467885, 0.5750333042324471, -0.4121889669913412],
        ],
        [0.30230769230769233, -0.563076923076923],
        {},
    )


def test_lamb() -> None:
    """``lamb(0.03, b1=0.8, b2=0.95, eps=1e-6, weight_decay=0.2)``."""
    assert_ends_at(
        torchopt.lamb(0.03, (0.8, 0.95), 1e-6, 0.2),
        [
            [0.5156674029877059, -0.9744259482653711, 1.8453700634149546],
            [0.08666861152190772, 0.5549926583904902, -0.44425007376895004],
        ],
        [0.28014961197066707, -0.541922432866323],
        {
            "exp_avg_sq": (
                [
                    [0.020622187500000014, 0.006461000000000006, 0.04929250000000004],
                    [0.04974343750000004, 0.053820250000000056, 0.04101275000000003],
                ],
                [0.03233475000000003, 0.04375993750000003],
            )
        },
    )


def test_lars() -> None:
    """``lars(0.05, weight_decay=0.1, trust_coefficient=0.2, eps=0.01, momentum=0.7)``."""
    assert_ends_at(
        torchopt.lars(0.05, 0.7, weight_decay=0.1, trust_coefficient=0.2, eps=0.01),
        [
            [0.5118790202524731, -0.9906665876870739, 1.9518269206374288],
            [0.08625210076222252, 0.6411889405367798, -0.40621447588875703],
        ],
        [0.2932886490695385, -0.5850002167725539],
        {
            "momentum_buffer": (
                [
                    [0.0048572829393051485, 0.0032352364347216014, -0.004517210606207333],
                    [0.0014087053084732432, -0.033746423894600024, 0.003635544072168271],
                ],
                [-0.00015677366204205987, 0.006658431509603274],
            )
        },
    )


def test_lars_with_masks() -> None:
    """The same with ``nesterov=True`` and ``{"w": True, "b": False}`` as both masks, ``eps=0``."""
    only_w = {"w": True, "b": False}
    tx = torchopt.lars(
        0.05,
        0.7,
        weight_decay=0.1,
        nesterov=True,
        trust_coefficient=0.2,
        mask=only_w,
        trust_ratio_mask=only_w,
    )
    assert_ends_at(
        tx,
        [
            [0.5152721653783895, -0.9882904278344016, 1.9485547206248977],
            [0.08745518769127378, 0.6169168510270824, -0.4036953804332594],
        ],
        [0.29400899999999996, -0.4986555],
        {},
    )


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
