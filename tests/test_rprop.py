"""Rprop: sign changes step by step, rates that are read once, and what a meta-gradient reaches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import F64
from tolerances import assert_close
from torch import Tensor, nn

import torchopt


settings = pytest.mark.parametrize("setting", [None, False], ids=["fused", "rules"])
SIGNS = [1.0, 1.0, 1.0, -1.0, 1.0]


def moves(tx: Any, grads: list[float]) -> Tensor:
    g = [torch.tensor([x], **F64) for x in grads]
    state, found = tx.init(g[:1]), []
    for x in g:
        updates, state = tx.update([x], state, inplace=False)
        found.append(-updates[0])
    return torch.cat(found)


@settings
def test_the_moves_of_one_entry(setting: Any) -> None:
    """It grows twice, rests where the sign changes, and goes on with the smaller size."""
    tx = torchopt.rprop(0.1).with_accelerated_op(setting)
    assert_close(moves(tx, SIGNS), torch.tensor([0.1, 0.12, 0.144, 0.0, 0.072], **F64))


@settings
@pytest.mark.parametrize(("lr", "first"), [(100.0, 50.0), (1e-9, 1e-6)])
def test_the_first_size_is_bounded(lr: float, first: float, setting: Any) -> None:
    tx = torchopt.rprop(lr).with_accelerated_op(setting)
    assert_close(moves(tx, [3.0]), torch.tensor([first], **F64))


def test_a_scheduler_has_no_effect_as_in_torch() -> None:
    """But on the state of a parameter that has its first gradient later."""
    results = []
    for cls in (torchopt.Rprop, torch.optim.Rprop):
        params = [nn.Parameter(torch.zeros(1, **F64)) for _ in range(2)]
        optimizer = cls(params, lr=0.1)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for step, sign in enumerate(SIGNS):
            params[0].grad = torch.full((1,), sign, **F64)
            params[1].grad = params[0].grad.clone() if step > 1 else None
            optimizer.step()
            scheduler.step()
        results.append([p.detach() for p in params])
    assert_close(*results)
    assert_close(results[0][0], torch.tensor([-(0.1 + 0.12 + 0.144 + 0.072)], **F64))


@settings
def test_the_factors_are_learned_and_gradients_are_not(setting: Any) -> None:
    """Moves are lr, lr b, lr b^2, 0, lr a b^2 for the factors a and b."""
    lr, a, b = (torch.tensor(x, **F64, requires_grad=True) for x in (0.1, 0.5, 1.2))
    tx = torchopt.rprop(lr, etas=(a, b)).with_accelerated_op(setting)
    scale = torch.ones(1, **F64, requires_grad=True)
    state, total = tx.init([scale]), torch.zeros(1, **F64)
    for sign in SIGNS:
        updates, state = tx.update([scale * sign], state, inplace=False)
        total = total - updates[0]
    by_lr, by_a, by_b, by_g = torch.autograd.grad(total.sum(), [lr, a, b, scale])
    assert_close(by_lr, torch.tensor(1 + 1.2 + 1.44 + 0.5 * 1.44, **F64))
    assert_close(by_a, torch.tensor(0.144, **F64))
    assert_close(by_b, torch.tensor(0.1 * (1 + 2.4 + 0.5 * 2.4), **F64))
    assert (by_g == 0).all()


def test_each_factor_has_its_own_bounds() -> None:
    for etas, message in (
        ((0.5, 1.0), r"etas\[1\] must be > 1, got 1.0"),
        ((1.0, 1.2), r"etas\[0\] must be > 0 and < 1, got 1.0"),
        ((0.0, 1.2), r"etas\[0\] must be > 0 and < 1, got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            torchopt.rprop(etas=etas)
        with pytest.raises(ValueError, match=message):
            torchopt.Rprop([{"params": [nn.Parameter(torch.ones(1))], "etas": etas}])
