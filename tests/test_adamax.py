"""Adamax and Adadelta: where their rules have corners, and numbers at the ends of their ranges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import F64
from conftest import nonzero
from tolerances import all_finite, assert_close
from torch import Tensor

import torchopt


settings = pytest.mark.parametrize("setting", [None, False], ids=["fused", "rules"])


@settings
def test_a_tie_of_the_maximum_gives_the_mean_of_both_derivatives(setting: Any) -> None:
    """``max(b2 n, |g| + eps)`` at 0.5 * 2 = 1: half of ``dn = b2`` and half of ``dg = sign g``."""
    tx = torchopt.scale_by_adamax((0.0, 0.5), eps=0.25).with_accelerated_op(setting)
    g = torch.tensor([0.75, -0.75], **F64, requires_grad=True)
    n = torch.full((2,), 2.0, **F64, requires_grad=True)
    state = tx.init([g])
    state.exp_inf[0] = n
    _, new = tx.update([g], state, inplace=False)
    assert_close(new.exp_inf[0].detach(), torch.ones(2, **F64))
    by_g, by_n = torch.autograd.grad(new.exp_inf[0].sum(), [g, n])
    assert_close(by_g, torch.tensor([0.5, -0.5], **F64))
    assert_close(by_n, torch.full((2,), 0.25, **F64))


@settings
def test_the_first_gradient_may_be_zero(setting: Any) -> None:
    """Then the update is ``g / (|g| + eps)``, whose derivative at 0 is ``1 / eps``."""
    tx = torchopt.scale_by_adamax(eps=1e-3).with_accelerated_op(setting)
    g = torch.zeros(2, **F64, requires_grad=True)
    updates, _ = tx.update([g], tx.init([g]), inplace=False)
    assert (updates[0] == 0).all()
    (slope,) = torch.autograd.grad(updates[0].sum(), g)
    assert_close(slope, torch.full((2,), 1e3, **F64))


@settings
@pytest.mark.parametrize(("rho", "expected"), [(1.0, 1.0), (0.0, None)])
def test_the_ends_of_rho(rho: float, expected: Any, setting: Any) -> None:
    """At 1 both averages stay zero, which is gradient descent; at 0 they are the last squares."""
    eps, g = 1e-3, nonzero(3)
    tx = torchopt.scale_by_adadelta(rho, eps).with_accelerated_op(setting)
    updates, _ = tx.update([g], tx.init([g]))
    assert_close(updates[0], g if expected else g * (eps / (g.square() + eps)).sqrt())


@settings
def test_without_eps_adadelta_stays_and_is_finite(setting: Any) -> None:
    tx = torchopt.scale_by_adadelta(0.9, 0.0).with_accelerated_op(setting)
    g = nonzero(3).requires_grad_()
    state = tx.init([g])
    for _ in range(3):
        updates, state = tx.update([g], state, inplace=False)
    assert (updates[0] == 0).all()
    (slope,) = torch.autograd.grad(updates[0].sum(), g, create_graph=True)
    assert all_finite(slope)
    second: Tensor = torch.autograd.grad(slope.sum(), g, allow_unused=True, materialize_grads=True)[
        0
    ]
    assert all_finite(second)
