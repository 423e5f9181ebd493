"""Shampoo: other code, tensors of every number of dimensions, and matrices of low rank."""

from __future__ import annotations

import pytest
import torch
from conftest import nonzero
from preconditioning import (
    F64,
    assert_ends_at,
    assert_meta_gradient,
    low_rank_problem,
    meta_gradient,
    unrolled,
)
from references.shampoo import shampoo as reference
from tolerances import all_finite, assert_close
from torch import Tensor

import torchopt


#: pytorch_optimizer 4.1.0 in float64, ``Shampoo(params, lr=0.03, momentum=0.0, matrix_eps=1e-6,
#: preconditioning_compute_steps=1)``: vectors have a full matrix there.
OTHERS = [
    [
        *(0.8626356900780172, 0.9302177306098708, 0.1336053917519753, -0.7622241376950185),
        *(-1.0366833631048866, -0.2836232023127871, 0.6706473752643421, 0.978597807042106),
        *(0.3964315848810304, -0.535334793565938, -0.9897100528531351, -0.540174169178065),
    ],
    [0.8786155931065097, 0.9360709409352501, 0.1280387542477632],
    [
        *(0.8518868343807929, 0.9203074912750391, 0.1333550129582207, -0.7568858606984414),
        *(-1.012353229729811, -0.28163198181013016, 0.665438608864504, 0.9781020358154675),
        *(0.398055468510312, -0.5354399210159362, -0.9902915039337962, -0.5405184661436067),
    ],
]


def test_values_of_other_code() -> None:
    assert_ends_at(torchopt.shampoo(0.03, eps=1e-6, precondition_1d=True), OTHERS)


def test_a_vector_has_adagrads_rule() -> None:
    p, grads = nonzero(5), [nonzero(5) for _ in range(4)]
    theirs = torch.nn.Parameter(p.clone())
    optimizer = torch.optim.Adagrad([theirs], 0.1, initial_accumulator_value=0.3, eps=0.0)
    tx = torchopt.shampoo(0.1, eps=0.3)
    state = tx.init(p)
    for g in grads:
        theirs.grad = g.clone()
        optimizer.step()
        p, state = tx.apply_gradients(g, state, p, inplace=False)
    assert_close(p, theirs.detach())
    assert list(state.slots) == ["diagonal_0"]


def test_the_first_step_of_a_matrix() -> None:
    """Singular values s of a gradient become ``s / sqrt(s^2 + eps)``."""
    g = nonzero(5, 3)
    u, s, v = torch.linalg.svd(g, full_matrices=False)
    tx = torchopt.scale_by_shampoo(eps=0.2)
    found, _ = tx.update(g, tx.init(g), inplace=False)
    assert_close(found, u @ torch.diag(s / (s * s + 0.2).sqrt()) @ v, times=10)


@pytest.mark.parametrize("frequency", [1, 3])
@pytest.mark.parametrize("shape", [(), (1,), (1, 3), (2, 3, 2), (2, 1, 3, 2)], ids=str)
def test_tensors_of_any_number_of_dimensions(shape: tuple[int, ...], frequency: int) -> None:
    p, grads = nonzero(*shape), [nonzero(*shape) for _ in range(4)]
    k = {"lr": 0.1, "eps": 0.2, "precondition_frequency": frequency}
    tx = torchopt.shampoo(**k)
    state, now = tx.init(p), p
    defaults = {"momentum": 0.0, "weight_decay": 0.0, "precondition_1d": False}
    for g, (weights, _) in zip(grads, reference({**defaults, **k, **LONG}, p, grads)):
        now, state = tx.apply_gradients(g, state, now, inplace=False)
        assert_close(now, weights, times=10)


LONG = {"max_preconditioner_dim": 9}


def test_of_many_dimensions_the_last_are_one() -> None:
    p, g = nonzero(2, 3, 1, 2, 2), nonzero(2, 3, 1, 2, 2)
    tx = torchopt.shampoo()
    found, state = tx.apply_gradients(g, tx.init(p), p, inplace=False)
    flat, _ = tx.apply_gradients(g.flatten(3), tx.init(p.flatten(3)), p.flatten(3), inplace=False)
    assert torch.equal(found.flatten(3), flat)
    assert state.preconditioner_3.shape == (4, 4)
    assert state.diagonal_2.shape == (1,)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0, 3)], ids=str)
def test_tensors_with_no_entry(shape: tuple[int, ...]) -> None:
    tx, g = torchopt.shampoo(), torch.zeros(shape)
    assert tx.update(g, tx.init(g), g, inplace=False)[0].shape == shape


def test_roots_are_of_the_first_step_and_then_of_each_third() -> None:
    tx, grads = torchopt.scale_by_shampoo(0.1, 3), [nonzero(3, 2) for _ in range(5)]
    state, roots = tx.init(grads[0]), []
    assert torch.equal(state.inverse_root_0, torch.eye(3, **F64))
    for g in grads:
        _, state = tx.update(g, state, inplace=False)
        roots.append(state.inverse_root_0)
    stay = [torch.equal(roots[k], roots[k + 1]) for k in range(4)]
    assert stay == [True, True, False, True]
    gram = grads[0] @ grads[0].mT + 0.1 * torch.eye(3, **F64)
    assert_close(torch.linalg.matrix_power(roots[0], 4) @ gram, torch.eye(3, **F64), times=10)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("frequency", [1, 2])
def test_meta_gradients_of_matrices_of_low_rank(rank: int, frequency: int) -> None:
    """Preconditioners of which most eigenvalues are equal."""
    w, loss = low_rank_problem(rank)
    k = {"momentum": 0.5, "weight_decay": 0.1, "precondition_frequency": frequency}

    def by_start(w: Tensor) -> Tensor:
        return unrolled(torchopt.shampoo(0.2, eps=0.05, **k), loss, w, 3)

    def by_numbers(x: Tensor) -> Tensor:
        return unrolled(torchopt.shampoo(x[0], eps=x[1], **k), loss, w, 3)

    assert_meta_gradient(by_start, w)
    assert_meta_gradient(by_numbers, torch.tensor([0.2, 0.05], **F64))
    found = meta_gradient(lambda net: torchopt.MetaShampoo(net, 0.2, eps=0.05, **k), w, loss, 3)
    assert_close(found, torch.func.grad(by_start)(w), times=100)


def test_second_order_of_matrices_of_low_rank() -> None:
    w, loss = low_rank_problem(1)

    def function(w: Tensor) -> Tensor:
        return unrolled(torchopt.shampoo(0.2, eps=0.05), loss, w, 2)

    reverse = torch.func.jacrev(torch.func.jacrev(function))(w)
    assert_close(torch.func.hessian(function)(w), reverse, times=100)
    assert_close(torch.func.jacfwd(torch.func.jacfwd(function))(w), reverse, times=100)
    step = torch.zeros_like(w)
    step[1, 2] = 1e-4
    slope = torch.func.grad(function)
    measured = (slope(w + step) - slope(w - step)) / 2e-4
    assert (reverse[..., 1, 2] - measured).abs().max() < 1e-5 * measured.abs().max()


def test_a_zero_gradient_has_the_slope_of_eps() -> None:
    tx, zero = torchopt.scale_by_shampoo(eps=0.04), torch.zeros(2, 3, **F64)
    update = lambda g: tx.update(g, tx.init(g), inplace=False)[0]  # noqa: E731
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        assert_close(jacobian(update)(zero).reshape(6, 6), 5.0 * torch.eye(6, **F64))
    assert all_finite(torch.func.hessian(lambda g: update(g).sum())(zero))


def test_states_at_different_counts_in_one_batch() -> None:
    tx, grads = torchopt.scale_by_shampoo(0.1, 2), nonzero(2, 3, 2)
    one = tx.init(grads[0])
    states = [tx.update(grads[0], one, inplace=False)[1]]
    states.append(tx.update(grads[1], states[0], inplace=False)[1])
    tree_map = torch.utils._pytree.tree_map
    for state in states:
        state.step = torch.tensor(state.step)
    batch = tree_map(lambda *xs: torch.stack(xs), *states)
    update = lambda g, s: tx.update(g, s, inplace=False)  # noqa: E731
    found, after = torch.vmap(update)(grads, batch)
    for k, state in enumerate(states):
        expected, new = update(grads[k], state)
        assert_close(found[k], expected)
        assert_close(after.inverse_root_0[k], new.inverse_root_0)
