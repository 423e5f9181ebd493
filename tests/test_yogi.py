"""Yogi: against Optax, and where the second moment is what it is to become."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import nonzero
from optax_steps import F64, assert_ends_at
from tolerances import assert_close
from torch import Tensor

import torchopt


def test_values_of_optax() -> None:
    """``yogi(0.03, b1=0.8, b2=0.95, eps=1e-3)``."""
    assert_ends_at(
        torchopt.yogi(0.03, (0.8, 0.95), 1e-3),
        [
            [0.50009966608999, -0.9873390120267884, 1.945848894614867],
            [0.1118041474353509, 0.6301227769804573, -0.4509732086315796],
        ],
        [0.2509620099991253, -0.5449139915482366],
        {
            "exp_avg": (
                [
                    [-0.06287959039999999, 0.03632040959999999, 0.008800409600000003],
                    [0.008000409599999994, 0.23056040959999996, -0.004959590400000002],
                ],
                [-0.030319590399999975, -0.0977595904],
            ),
            "exp_avg_sq": (
                [
                    [0.02198100000000002, 0.006981000000000007, 0.05237600000000005],
                    [0.050501000000000046, 0.05700100000000006, 0.04400100000000004],
                ],
                [0.03437600000000003, 0.049001000000000045],
            ),
        },
    )


@pytest.mark.parametrize("setting", [None, False], ids=["fused", "rules"])
def test_the_second_moment_moves_by_a_part_of_the_square(setting: bool | None) -> None:
    """Up, down, and not at all where it is the square; derivatives are those with sign constant."""
    b2 = torch.tensor(0.75, **F64, requires_grad=setting is False)
    g = torch.tensor([2.0, 0.5, -1.0, 0.0], **F64, requires_grad=True)
    tx = torchopt.scale_by_yogi((0.9, b2 if b2.requires_grad else 0.75), 1e-3, 1.0)
    tx = tx.with_accelerated_op(setting)
    state = tx.init(g)
    start = state.exp_avg_sq.detach().requires_grad_()
    state.slots["exp_avg_sq"] = start
    _, state = tx.update(g, state, inplace=False)
    v = state.exp_avg_sq
    assert_close(v.detach(), torch.tensor([2.0, 0.9375, 1.0, 1.0], **F64))
    by_g, by_start = torch.autograd.grad(v.sum(), [g, start], retain_graph=True)
    assert_close(by_g, torch.tensor([1.0, -0.25, 0.0, 0.0], **F64))
    assert_close(by_start, torch.ones(4, **F64))
    if b2.requires_grad:
        (by_b2,) = torch.autograd.grad(v.sum(), b2)
        assert_close(by_b2, torch.tensor(-4.0 + 0.25, **F64))


def test_it_starts_where_it_is_said_to() -> None:
    """``lr 0.1`` moves by 2.76e-5 without a gradient; not if it starts at zero."""
    p = torch.zeros(1, **F64)

    def moved(tx: torchopt.GradientTransformation) -> Tensor:
        return tx.apply_gradients(torch.zeros_like(p), tx.init(p), p, inplace=False)[0]

    expected = -0.1 * 9e-6 / ((1e-6 / (1 - 0.999)) ** 0.5 + 1e-3)
    assert_close(moved(torchopt.yogi(0.1)), torch.tensor([expected], **F64), times=10)
    assert moved(torchopt.yogi(0.1, initial_accumulator_value=0.0)) == 0
    for bad in (-1e-6, float("nan")):
        with pytest.raises(ValueError, match="initial_accumulator_value must be >= 0"):
            torchopt.yogi(initial_accumulator_value=bad)
    with pytest.raises(TypeError, match="initial_accumulator_value must be a number"):
        torchopt.yogi(initial_accumulator_value=torch.ones(1))  # pyright: ignore


def test_the_second_moment_is_never_negative() -> None:
    g = nonzero(100)
    tx = torchopt.scale_by_yogi((0.9, 0.0))
    state = tx.init(g)
    for size in (1.0, 0.999, 0.5, 1e-3, 1e3):
        u, state = tx.update(size * g, state, inplace=False)
        assert (state.exp_avg_sq >= 0).all()
        assert torch.isfinite(u).all()


@pytest.mark.parametrize("recipe", [torchopt.yogi, torchopt.rmsprop], ids=lambda x: x.__name__)
def test_slots_of_complex_numbers_start_as_those_of_two_real_ones(recipe: Any) -> None:
    """A second moment is one of each part, so it starts in each part where it is said to."""
    name = "initial_scale" if recipe is torchopt.rmsprop else "initial_accumulator_value"
    tx, p = recipe(**{name: 0.3}), nonzero(4, dtype=torch.complex128)
    for start, of_parts in zip(*(tx.init(x).slots.values() for x in (p, torch.view_as_real(p)))):
        if of_parts is not None:
            assert_close(torch.view_as_real(start), of_parts)
