"""SM3: tensors of every number of dimensions, and where several are the least."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import nonzero
from tolerances import assert_close
from torch import Tensor

import torchopt


F64 = {"dtype": torch.float64}


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (4, 1), (2, 3, 2), (2, 1, 3, 2)])
def test_tensors_of_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    """A number of Optax is refused there; here it is as a vector of one."""
    tx, grads = torchopt.scale_by_sm3(0.0, 1e-3), [nonzero(*shape) for _ in range(3)]
    state = tx.init(grads[0])
    sums = [torch.zeros(size, **F64) for size in shape or (1,)]
    for g in grads:
        u, state = tx.update(g, state, inplace=False)
        entries = list(itertools.product(*map(range, shape)))
        v = torch.zeros(shape, **F64)
        for i in entries:
            v[i] = min(float(kept[n]) for kept, n in zip(sums, i or (0,))) + g[i] ** 2
        sums = [torch.zeros_like(kept) for kept in sums]
        for i in entries:
            for kept, n in zip(sums, i or (0,)):
                kept[n] = max(float(kept[n]), float(v[i]))
        assert_close(state.accumulator, torch.cat(sums))
        assert_close(u, g / (v + 1e-3).sqrt())


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0, 3)])
def test_tensors_with_no_entry(shape: tuple[int, ...]) -> None:
    tx, g = torchopt.sm3(), torch.zeros(shape)
    updates, state = tx.update(g, tx.init(g), g, inplace=False)
    assert updates.shape == shape
    assert state.accumulator.shape == (sum(shape),)
    assert (state.accumulator == 0).all()


def second(g: Tensor) -> Tensor:
    """Return the second update of a gradient: what its slices keep is a function of it."""
    tx = torchopt.scale_by_sm3(0.0, 1e-3)
    _, state = tx.update(g, tx.init(g), inplace=False)
    return tx.update(0.5 * g, state, inplace=False)[0]


def test_the_greatest_entry_has_its_whole_derivative() -> None:
    """Its row and its column keep one number; the least of the two is that number."""
    g = torch.tensor([[3.0, 0.5], [-2.0, 1.0]], **F64)
    step = 1e-6
    found = torch.func.jacrev(second)(g)
    assert_close(torch.func.jacfwd(second)(g), found)
    for i in itertools.product(range(2), range(2)):
        shift = torch.zeros_like(g)
        shift[i] = step
        measured = (second(g + shift) - second(g - shift)) / (2 * step)
        assert (found[..., i[0], i[1]] - measured).abs().max() < 1e-8


def test_equal_entries_share_the_derivative() -> None:
    """Of two that are the greatest each has half: what moves both along is exact."""
    tx, g = torchopt.scale_by_sm3(0.0, 1e-3), torch.ones(2, 2, **F64)
    kept = torch.func.jacrev(lambda g: tx.update(g, tx.init(g), inplace=False)[1].accumulator)(g)
    # a row keeps g^2 of the greater one of its two entries, with the slope 2
    assert_close(kept[0], torch.tensor([[1.0, 1.0], [0.0, 0.0]], **F64))
    assert_close(kept.sum(dim=(1, 2)), torch.full((4,), 2.0, **F64))


def test_a_zero_gradient_has_the_slope_of_eps() -> None:
    zero = torch.zeros(2, 2, **F64)
    found = torch.func.jacrev(second)(zero)
    assert_close(found.reshape(4, 4), 0.5 * torch.eye(4, **F64) / 1e-3**0.5)
