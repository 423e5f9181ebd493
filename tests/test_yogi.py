"""Yogi: where the second moment is what it is to become."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import nonzero
from tolerances import assert_close
from torch import Tensor

import torchopt


F64 = {"dtype": torch.float64}


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
