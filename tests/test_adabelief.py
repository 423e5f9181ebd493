"""AdaBelief: where gradients are what was expected of them."""

from __future__ import annotations

import pytest
import torch
from tolerances import all_finite, assert_close
from torch import Tensor

import torchopt


F64 = {"dtype": torch.float64}


def test_a_constant_gradient_is_expected_more_and_more() -> None:
    """With b2 = 0 and no eps the divisor is ``b1^t |g|``: steps are ``lr / b1^t``."""
    p, g = torch.zeros(1, **F64), torch.full((1,), -3.0, **F64)
    tx = torchopt.adabelief(0.1, (0.5, 0.0), 0.0, eps_root=0.0)
    state, places = tx.init(p), []
    for _ in range(3):
        p, state = tx.apply_gradients(g, state, p, inplace=False)
        places.append(p.clone())
    assert_close(torch.cat(places), torch.tensor([0.2, 0.6, 1.4], **F64))


def test_what_is_inside_the_root_adds_up() -> None:
    """Of gradients that are zero it alone is left: ``eps_root (1 + b2 + b2^2)`` after 3 steps."""
    g = torch.zeros(2, **F64)
    tx = torchopt.scale_by_belief((0.9, 0.5), eps_root=0.25)
    state = tx.init(g)
    for _ in range(3):
        _, state = tx.update(g, state, inplace=False)
    assert_close(state.exp_avg_var, torch.full((2,), 0.4375, **F64))


@pytest.mark.parametrize("eps_root", [0.0, 1e-16, 1e-4])
@pytest.mark.parametrize("setting", [None, False], ids=["fused", "rules"])
def test_derivatives_where_the_variance_is_zero(eps_root: float, setting: bool | None) -> None:
    """Gradients that are zero, and with ``b1 = 0`` all: ``g - m`` is zero. Finite, and known."""
    point = torch.tensor([0.0, 0.7], **F64, requires_grad=True)
    eps = 1e-3

    def last(g: Tensor) -> Tensor:
        tx = torchopt.scale_by_belief((0.0, 0.9), eps, eps_root)
        tx = tx.with_accelerated_op(setting)
        state = tx.init(g)
        for _ in range(2):
            u, state = tx.update(g, state, inplace=False)
        return u

    # the variance is eps_root (1 + b2), whatever g is, so the update is linear in it
    slope = 1 / ((eps_root * 1.9 / (1 - 0.9**2)) ** 0.5 + eps)
    u = last(point)
    assert_close(u.detach(), slope * point.detach(), times=10)
    (by_g,) = torch.autograd.grad(u.sum(), point, create_graph=True)
    assert_close(by_g.detach(), torch.full((2,), slope, **F64), times=10)
    if by_g.requires_grad:
        (second,) = torch.autograd.grad(by_g.sum(), point, allow_unused=True)
        assert second is None or all_finite(second)
