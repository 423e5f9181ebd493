"""Lion: its defaults, and what its meta-gradients reach."""

from __future__ import annotations

import pytest
import torch
from cases import ALGORITHMS
from conftest import nonzero
from tolerances import assert_close
from torch import nn

import torchopt


(ROWS,) = [list(row.cases()) for row in ALGORITHMS if row.recipe is torchopt.lion]
every_row = pytest.mark.parametrize("case", ROWS, ids=lambda case: case.name)


def test_defaults_are_those_of_the_paper() -> None:
    row = next(row for row in ALGORITHMS if row.recipe is torchopt.lion)
    assert row.defaults() == {
        "lr": 1e-4,
        "betas": (0.9, 0.99),
        "weight_decay": 0.0,
        "maximize": False,
        "exp_avg_dtype": None,
    }


# Meta-gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", [None, False], ids=["fused", "rules"])
def test_meta_gradients_are_those_of_steps_whose_signs_are_constants(setting: bool | None) -> None:
    """In ``p_t = (1 - lr wd) p_{t-1} - lr u_t`` the signs ``u_t`` do not depend on anything."""
    net, x, y = nn.Linear(3, 2, bias=False, dtype=torch.float64), nonzero(8, 3), nonzero(8, 2)
    start, steps, weights = net.weight, 3, nonzero(2, 3)
    lr, wd, b1, b2, factor = (
        torch.tensor(v, requires_grad=True, dtype=torch.float64) for v in (0.03, 0.2, 0.7, 0.9, 1.0)
    )
    inner = torchopt.MetaLion(net, lr, (b1, b2), wd, use_accelerated_op=setting)
    signs = []
    for _ in range(steps):
        before = net.weight.detach()
        inner.step((factor * net(x) - y).square().mean())
        with torch.no_grad():
            signs.append((before - net.weight) / lr - wd * before)
    found = torch.autograd.grad((weights * net.weight).sum(), [start, lr, wd, b1, b2, factor])

    p = start
    for u in signs:
        p = p - lr * (u + wd * p)
    assert_close(torch.stack(signs).abs(), torch.ones(steps, 2, 3, dtype=torch.float64))
    expected = torch.autograd.grad((weights * p).sum(), [start, lr, wd])
    assert_close(found[:3], expected)
    assert_close(found[0], weights * (1 - lr * wd) ** steps)
    assert all(derivative == 0 for derivative in found[3:])


def test_the_momentum_that_is_kept_is_differentiable() -> None:
    g, b2 = nonzero(3).requires_grad_(), torch.tensor(0.9, requires_grad=True, dtype=torch.float64)
    tx = torchopt.scale_by_lion((0.8, b2))
    _, state = tx.update(g, tx.init(g), inplace=False)
    by_g, by_b2 = torch.autograd.grad(state.exp_avg.sum(), [g, b2])
    assert_close(by_g, torch.full((3,), 0.1, dtype=torch.float64))
    assert_close(by_b2, -g.detach().sum())
