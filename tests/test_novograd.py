"""NovoGrad: against Optax, and where the norm of a gradient is zero."""

from __future__ import annotations

import pytest
import torch
from conftest import nonzero
from optax_steps import F64, assert_ends_at
from tolerances import assert_close
from torch import Tensor

import torchopt


def test_values_of_optax() -> None:
    """``novograd(0.03, b1=0.8, b2=0.6, eps=1e-3, weight_decay=0.2)``."""
    assert_ends_at(
        torchopt.novograd(0.03, (0.8, 0.6), 1e-3, 0.2),
        [
            [0.4923000925253337, -0.9568539091093664, 1.8615735165226763],
            [0.0865729020405722, 0.6077723959932685, -0.4017822374964466],
        ],
        [0.27697558045527937, -0.5061800636323609],
        {
            "exp_avg": (
                [
                    [0.02295630013084999, -0.42802467588670795, 1.0933783490246118],
                    [0.05676511368005586, 1.4057118996917053, -0.281290761212603],
                ],
                [-0.057739268264354875, -0.9645082070143757],
            ),
            "exp_avg_sq": (1.0608559999999998, 0.37659999999999993),
        },
    )


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
