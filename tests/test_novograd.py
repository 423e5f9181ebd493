"""NovoGrad: where the norm of a gradient is zero."""

from __future__ import annotations

import pytest
import torch
from conftest import nonzero
from tolerances import assert_close
from torch import Tensor

import torchopt


F64 = {"dtype": torch.float64}


def test_the_size_of_gradients_does_not_count() -> None:
    """But for eps, only changes of it do; all of a parameter are divided by one number."""
    p, grads = nonzero(4, 3), [nonzero(4, 3) for _ in range(3)]
    ends = []
    for factor in (1.0, 1e3):
        tx, now = torchopt.novograd(0.1, eps=0.0), p
        state = tx.init(p)
        for g in grads:
            now, state = tx.apply_gradients(factor * g, state, now, inplace=False)
        ends.append(now)
        assert state.exp_avg_sq.shape == ()
    assert_close(ends[1], ends[0])
    tx = torchopt.scale_by_novograd(eps=0.0)
    first, _ = tx.update(grads[0], tx.init(p), inplace=False)
    assert_close(first, grads[0] / grads[0].norm())


@pytest.mark.parametrize("zero_steps", [1, 2])
def test_derivatives_where_a_norm_is_zero(zero_steps: int) -> None:
    """A zero first gradient has the slope ``1 / eps``, and all orders are finite."""
    eps, g = 0.5, nonzero(3)

    def last(x: Tensor) -> Tensor:
        tx = torchopt.scale_by_novograd((0.0, 0.6), eps)
        state = tx.init(x)
        for _ in range(zero_steps):
            u, state = tx.update(x, state, inplace=False)
        return u

    zero = torch.zeros_like(g)
    assert_close(last(zero), zero)
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        assert_close(jacobian(last)(zero), torch.eye(3, **F64) / eps)
    assert (torch.func.hessian(lambda x: (g * last(x)).sum())(zero) == 0).all()


def test_the_count_may_be_a_tensor() -> None:
    """Then the first step is told by a comparison on the device."""
    grads = [nonzero(3) for _ in range(2)]
    tx = torchopt.scale_by_novograd()
    state, counted = tx.init(grads[0]), tx.init(grads[0])
    counted.step = torch.tensor(0)
    for g in grads:
        u, state = tx.update(g, state, inplace=False)
        v, counted = tx.update(g, counted, inplace=False)
        assert_close(v, u)
        assert_close(counted.exp_avg_sq, state.exp_avg_sq)
