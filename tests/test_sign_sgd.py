"""Sign-SGD and Signum: what nothing moves, and what their meta-gradients reach."""

from __future__ import annotations

import pytest
import torch
from conftest import nonzero
from tolerances import assert_close

import torchopt


F64 = {"dtype": torch.float64}


def test_nothing_moves_without_a_gradient() -> None:
    """The sign of 0 is 0; of complex numbers each part has its own."""
    tx = torchopt.scale_by_sign()
    for g, sign in (
        (
            torch.tensor([0.0, -0.0, 3.0, -1e-300], **F64),
            torch.tensor([0.0, 0.0, 1.0, -1.0], **F64),
        ),
        (torch.tensor([3.0 - 4.0j, 0.0 + 2.0j]), torch.tensor([1.0 - 1.0j, 0.0 + 1.0j])),
    ):
        assert torch.equal(tx.update(g, tx.init(g), inplace=False)[0], sign)


@pytest.mark.parametrize("setting", [None, False], ids=["fused", "rules"])
def test_the_momentum_that_is_kept_is_differentiable(setting: bool | None) -> None:
    g = nonzero(3).requires_grad_()
    momentum = torch.tensor(0.9, **F64, requires_grad=True)
    tx = torchopt.signum(0.1, momentum, use_accelerated_op=setting)
    updates, state = tx.update(g, tx.init(g), inplace=False)
    by_g, by_momentum = torch.autograd.grad(
        state.momentum_buffer.sum(), [g, momentum], retain_graph=True
    )
    assert_close(by_g, torch.full((3,), 0.1, **F64))
    assert_close(by_momentum, -g.detach().sum())
    assert_close(updates.detach(), -0.1 * g.detach().sign())
    found = (
        torch.autograd.grad(updates.sum(), [g, momentum], allow_unused=True)
        if (updates.requires_grad)
        else (None, None)
    )
    assert all(d is None or (d == 0).all() for d in found)


def test_signum_without_momentum_is_sign_sgd() -> None:
    p, grads = nonzero(4), [nonzero(4) for _ in range(3)]
    ends = []
    for tx in (torchopt.signum(0.1, 0.0, 0.2), torchopt.sign_sgd(0.1, 0.2)):
        now, state = p, tx.init(p)
        for g in grads:
            now, state = tx.apply_gradients(g, state, now, inplace=False)
        ends.append(now)
    assert torch.equal(*ends)
