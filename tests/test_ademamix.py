"""AdEMAMix: beside Optax, whose schedules count from 0, and at the ends of its warm-up."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import nonzero
from tolerances import assert_close

import torchopt
from torchopt.optimizers.ademamix import _slowing


def last_weight(tx: torchopt.GradientTransformation) -> torch.Tensor:
    p = torch.tensor([0.5, -1.0, 2.0, 0.1], dtype=torch.float64)
    grads = [
        [0.3, -0.2, 1.0, -0.5],
        [-0.6, 0.1, -0.2, 0.9],
        [0.02, 0.3, -0.05, -0.1],
        [-0.1, -0.02, -0.3, -0.2],
    ]
    state = tx.init(p)
    for g in grads:
        p, state = tx.apply_gradients(torch.tensor(g, dtype=torch.float64), state, p, inplace=False)
    return p


def test_values_of_optax_under_schedules_of_the_count_from_0() -> None:
    """``optax.contrib.ademamix(0.03, 0.7, 0.9, b3, alpha, 1e-3, 0.0, weight_decay=0.2)``, 0.2.8.

    With ``b3`` and ``alpha`` as schedules: the authors' formulas at ``count / 3``, 0.95 and 3.0.
    """
    tx = torchopt.ademamix(
        0.03,
        (0.7, 0.9, lambda count: _slowing(0.7, 0.95, min(count / 3, 1.0))),
        lambda count: 3.0 * min(count / 3, 1.0),
        1e-3,
        0.2,
    )
    expected = [0.48709699937330014, -0.9482620372631889, 1.8359051532776858, 0.12033622914501842]
    assert_close(last_weight(tx), torch.tensor(expected, dtype=torch.float64))


def half_life(beta: float) -> float:
    return math.log(0.5) / math.log(beta)


@pytest.mark.parametrize("as_tensors", [False, True])
@pytest.mark.parametrize("b1", [0.0, 0.5, 0.9])
def test_half_lives_grow_in_a_line(b1: float, as_tensors: bool) -> None:
    def kept(done: Any) -> float:
        first, last = (
            torch.tensor(b, dtype=torch.float64) if as_tensors else b for b in (b1, 0.99)
        )
        return float(_slowing(first, last, done))

    start = half_life(b1) if b1 else 0.0
    for done in (0.125, 0.5, 1.0):
        wanted = (1 - done) * start + done * half_life(0.99)
        assert half_life(kept(done)) == pytest.approx(wanted, rel=1e-9)


def test_without_a_slow_momentum_it_is_adamw() -> None:
    p, grads = nonzero(4), [nonzero(4) for _ in range(3)]
    ours = torchopt.ademamix(0.1, (0.8, 0.9, 0.99), 0.0, 1e-6, 0.3)
    theirs = torchopt.adamw(0.1, (0.8, 0.9), 1e-6, 0.3)
    ends = []
    for tx in (ours, theirs):
        now, state = p, tx.init(p)
        for g in grads:
            now, state = tx.apply_gradients(g, state, now, inplace=False)
        ends.append(now)
    assert_close(ends[0], ends[1])


def test_defaults() -> None:
    """Those of Optax; the authors' PyTorch code has ``alpha=2``."""
    assert torchopt.ademamix().hyperparameters() == {
        "maximize": False,
        "betas": (0.9, 0.999, 0.9999),
        "alpha": 5.0,
        "eps": 1e-8,
        "alpha_warmup": 0,
        "beta3_warmup": 0,
        "weight_decay": 0.0,
        "lr": 1e-3,
    }
