"""SOAP: other code, its first step, and bases that gradients leave open."""

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
from references.soap import soap as reference
from tolerances import all_finite, assert_close
from torch import Tensor

import torchopt


#: pytorch_optimizer 4.1.0 in float64, with its ``torch.linalg.qr`` left in float64: ``SOAP(params,
#: lr=0.03, betas=(0.8, 0.9), eps=1e-4, weight_decay=0.2, precondition_frequency=3,
#: shampoo_beta=0.7)``. It is the authors' code of December 2024 rewritten.
OTHERS = [
    [
        *(0.862873319549154, 0.8373945353052099, 0.1472225584969128, -0.634802676966628),
        *(-1.130045241807702, -0.21743273400982685, 0.5798030857959422, 0.9390874387201685),
        *(0.4021042751485191, -0.5039414414883681, -1.0098031556940064, -0.4871850981826729),
    ],
    [0.8824419361241905, 0.8255486360892456, 0.19998034742511528],
    [
        *(0.9374742179861517, 0.8440716774307521, 0.18213287306488418, -0.651791390393013),
        *(-1.1251974861326877, -0.1465877333165859, 0.5684717518537045, 0.9354358757622168),
        *(0.3879172328375142, -0.45524437828764847, -0.9855889833212231, -0.43861446018279165),
    ],
]
NUMBERS = {"lr": 0.03, "betas": (0.8, 0.9), "eps": 1e-4, "weight_decay": 0.2, "shampoo_beta": 0.7}


def test_values_of_other_code() -> None:
    assert_ends_at(torchopt.soap(**NUMBERS, precondition_frequency=3), OTHERS)


def test_the_first_step_moves_nothing_and_finds_the_bases() -> None:
    p, g = nonzero(3, 3), nonzero(3, 3)
    tx = torchopt.soap(0.1, weight_decay=0.5)
    updates, state = tx.update(g, tx.init(p), p, inplace=False)
    assert (updates == 0).all()
    assert (state.exp_avg == 0).all()
    assert (state.exp_avg_sq == 0).all()
    assert_close(state.preconditioner_0, 0.05 * g @ g.mT)
    assert_close(state.preconditioner_1, 0.05 * g.mT @ g)
    u, s, v = torch.linalg.svd(g)
    turned = state.basis_0.mT @ g @ state.basis_1
    assert_close(turned.diag().abs(), s, times=10)
    assert_close(turned.abs(), torch.diag(s), times=10)
    assert ((state.basis_0.mT @ u).abs() - torch.eye(3)).abs().max() < 1e-9
    assert ((v @ state.basis_1).abs() - torch.eye(3)).abs().max() < 1e-9


def test_a_vector_has_adams_rule_from_the_second_step_on() -> None:
    p, grads = nonzero(5), [nonzero(5) for _ in range(4)]
    theirs = torch.nn.Parameter(p.clone())
    optimizer = torch.optim.Adam([theirs], 0.1, (0.8, 0.9), eps=0.0)
    tx = torchopt.soap(0.1, (0.8, 0.9), eps=0.0, weight_decay=0.0)
    state = tx.init(p)
    p, state = tx.apply_gradients(nonzero(5), state, p, inplace=False)
    for g in grads:
        theirs.grad = g.clone()
        optimizer.step()
        p, state = tx.apply_gradients(g, state, p, inplace=False)
    assert_close(p, theirs.detach())
    assert list(state.slots) == ["exp_avg", "exp_avg_sq"]


def test_eps_is_added_to_the_root_as_it_is() -> None:
    """At the second step a vector moves by ``lr sqrt(1 - b2) g / (sqrt(1 - b2) |g| + eps)``."""
    p, g = torch.zeros(3, **F64), torch.tensor([0.5, -2.0, 1e-3], **F64)
    tx = torchopt.soap(0.1, (0.8, 0.9), eps=0.3, weight_decay=0.0)
    _, state = tx.update(g, tx.init(p), p, inplace=False)
    update, _ = tx.update(g, state, p, inplace=False)
    assert_close(update, -0.1 * 0.1**0.5 * g / (0.1**0.5 * g.abs() + 0.3))


@pytest.mark.parametrize("frequency", [1, 2])
@pytest.mark.parametrize("shape", [(), (1, 3), (5, 2), (2, 3, 2), (2, 1, 3, 2)], ids=str)
def test_tensors_of_any_number_of_dimensions(shape: tuple[int, ...], frequency: int) -> None:
    p, grads = nonzero(*shape), [nonzero(*shape) for _ in range(6)]
    more = {"precondition_frequency": frequency, "max_preconditioner_dim": 9}
    tx = torchopt.soap(**NUMBERS, **more)
    state, now = tx.init(p), p
    k = {**NUMBERS, **more, "precondition_1d": False}
    for g, (weights, _) in zip(grads, reference(k, p, grads)):
        now, state = tx.apply_gradients(g, state, now, inplace=False)
        assert_close(now, weights, times=1000)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0, 3)], ids=str)
def test_tensors_with_no_entry(shape: tuple[int, ...]) -> None:
    tx, g = torchopt.soap(), torch.zeros(shape)
    state = tx.init(g)
    for _ in range(2):
        updates, state = tx.update(g, state, g, inplace=False)
        assert updates.shape == shape


def test_the_signs_of_a_basis_do_not_matter() -> None:
    tx, grads = torchopt.scale_by_soap(precondition_frequency=1), [nonzero(4, 3) for _ in range(4)]
    state = tx.init(grads[0])
    for g in grads[:2]:
        _, state = tx.update(g, state, inplace=False)
    other = torchopt.OptState(state.step, dict(state.slots))
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0], **F64)
    other.slots["basis_0"] = state.basis_0 * signs
    other.slots["basis_1"] = state.basis_1 * -signs[:3]
    for g in grads[2:]:
        expected, state = tx.update(g, state, inplace=False)
        found, other = tx.update(g, other, inplace=False)
        assert_close(found, expected)
        assert_close(other.exp_avg_sq, state.exp_avg_sq)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("frequency", [pytest.param(1, marks=pytest.mark.thorough), 2])
def test_meta_gradients_of_matrices_of_low_rank(rank: int, frequency: int) -> None:
    """The bases of 4 x 3 matrices are completed, from unit vectors and from the bases before."""
    w, loss = low_rank_problem(rank)
    k = {"weight_decay": 0.1, "precondition_frequency": frequency}

    def by_start(w: Tensor) -> Tensor:
        return unrolled(torchopt.soap(0.1, (0.8, 0.9), 0.1, **k), loss, w, 5)

    def by_numbers(x: Tensor) -> Tensor:
        tx = torchopt.soap(x[0], (x[1], x[2]), x[3], shampoo_beta=x[4], **k)
        return unrolled(tx, loss, w, 5)

    assert_meta_gradient(by_start, w, h=1e-5)
    assert_meta_gradient(by_numbers, torch.tensor([0.1, 0.8, 0.9, 0.1, 0.7], **F64))
    inner_of = lambda net: torchopt.MetaSOAP(net, 0.1, (0.8, 0.9), 0.1, **k)  # noqa: E731
    found = meta_gradient(inner_of, w, loss, 5)
    assert_close(found, torch.func.grad(by_start)(w), times=1e4)


def test_the_bases_carry_a_part_of_the_meta_gradient() -> None:
    """With constant bases, as a derivative that stops there has them, it is another one."""
    w, loss = low_rank_problem(3)
    tx = torchopt.scale_by_soap((0.8, 0.9), 0.1)
    w = w.requires_grad_()
    found = []
    for cut in (False, True):
        state, now = tx.init(w), w
        for _ in range(3):
            (g,) = torch.autograd.grad(loss(now), now, create_graph=True)
            u, state = tx.update(g, state, inplace=False)
            now = now - 0.1 * u
            for name in ("basis_0", "basis_1") if cut else ():
                state.slots[name] = state.slots[name].detach()
        found += torch.autograd.grad(now.sin().sum(), w)
    assert (found[0] - found[1]).abs().max() > 0.01 * found[0].abs().max()


def test_second_order() -> None:
    w, loss = low_rank_problem(2)

    def function(w: Tensor) -> Tensor:
        tx = torchopt.soap(0.1, (0.8, 0.9), 0.1, precondition_frequency=1)
        return unrolled(tx, loss, w, 3)

    reverse = torch.func.jacrev(torch.func.jacrev(function))(w)
    assert_close(torch.func.hessian(function)(w), reverse, times=1e5)
    step = torch.zeros_like(w)
    step[1, 2] = 1e-5
    slope = torch.func.grad(function)
    measured = (slope(w + step) - slope(w - step)) / 2e-5
    assert (reverse[..., 1, 2] - measured).abs().max() < 1e-5 * measured.abs().max()


@pytest.mark.parametrize("frequency", [1, 2])
def test_gradients_that_are_zero(frequency: int) -> None:
    """All of them, or a row that always is: it stays where it is, and derivatives are finite."""
    tx = torchopt.soap(0.1, weight_decay=0.0, precondition_frequency=frequency)
    factor = nonzero(4, 3)
    factor[1] = 0.0

    def function(w: Tensor, factor: Tensor) -> Tensor:
        state, start = tx.init(w), w
        for _ in range(4):
            w, state = tx.apply_gradients(factor * w.sin(), state, w, inplace=False)
        return w - start

    w = nonzero(4, 3)
    assert (function(w, factor)[1] == 0).all()
    assert (function(w, 0 * factor) == 0).all()
    for f in (factor, 0 * factor):
        first = torch.func.jacrev(function)(w, f)
        assert all_finite(first)
        assert_close(first[1], torch.zeros_like(first[1]))
        assert all_finite(torch.func.hessian(lambda w, f=f: function(w, f).sum())(w))


@pytest.mark.parametrize("frequency", [1, 2])
def test_states_at_different_counts_in_one_batch(frequency: int) -> None:
    tx, grads = torchopt.scale_by_soap(precondition_frequency=frequency), nonzero(4, 3, 2)
    states = [tx.init(grads[0])]
    for k in range(3):
        states.append(tx.update(grads[k], states[k], inplace=False)[1])
    for state in states:
        state.step = torch.tensor(state.step)
    batch = torch.utils._pytree.tree_map(lambda *xs: torch.stack(xs), *states)

    def update(g: Tensor, state: torchopt.OptState) -> tuple[Tensor, torchopt.OptState]:
        return tx.update(g, state, inplace=False)

    found, after = torch.vmap(update)(grads, batch)
    slopes = torch.vmap(torch.func.jacrev(lambda g, s: update(g, s)[0]))(grads, batch)
    for k, state in enumerate(states):
        expected, new = update(grads[k], state)
        assert_close(found[k], expected)
        for name, value in new.slots.items():
            assert_close(after.slots[name][k], value, what=name)
        own = torch.func.jacrev(lambda g, s=state: update(g, s)[0])(grads[k])
        assert_close(slopes[k], own, times=100)


@pytest.mark.thorough  # ten seconds
def test_compiled_steps_have_the_same_derivative() -> None:
    """The first, which finds a basis, and one that turns it."""
    tx, w, factor = torchopt.soap(0.1, eps=0.1, precondition_frequency=1), nonzero(3, 1), nonzero(1)

    def step(w: Tensor, state: torchopt.OptState) -> tuple[Tensor, torchopt.OptState]:
        return tx.apply_gradients(factor * w.sin(), state, w, inplace=False)

    found = []
    for take in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        start = w.clone().requires_grad_()
        now, state = start, tx.init(start)
        for _ in range(2):
            now, state = take(now, state)
        outer = (now**3).sum() + (state.basis_0 + 0.3).sin().square().sum()
        found.append((now.detach(), *torch.autograd.grad(outer, start)))
    assert_close(found[1], found[0], times=100)
