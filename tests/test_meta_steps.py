"""A step of the differentiable face: new tensors, connected; tied, frozen and untouched ones."""

import pytest
import torch
from adapting import (
    adapted_loss,
    all_close,
    assert_derivative,
    batch,
    close,
    follow,
    mlp,
    mse,
    with_peer,
)
from cases import every_meta_case, every_torch_meta_case
from odd_modules import Tied, TwoHeads
from torch import nn
from torch.func import functional_call

import torchopt


pytestmark = pytest.mark.usefixtures("float64_by_default")


@every_meta_case
def test_step_puts_new_connected_tensors_into_the_module(case):
    net, data = mlp(), batch()
    before = dict(net.named_parameters())
    values = {n: p.detach().clone() for n, p in before.items()}
    optimizer = case.meta(net, **case.kwargs)
    assert optimizer.step(mse(net, data)) is None
    after = dict(net.named_parameters())
    assert after.keys() == before.keys()
    for n in before:
        assert after[n] is not before[n]
        assert after[n].grad_fn is not None
        assert isinstance(after[n], nn.Parameter)
        assert torch.equal(before[n], values[n])
        assert torch.equal(after[n], values[n]) == (case.algorithm.rests > 0)
    for g in torch.autograd.grad(mse(net, batch()), list(before.values())):
        assert torch.isfinite(g).all()
        assert g.abs().max() > 0


@every_meta_case
def test_equals_the_functional_face(case):
    net, support, query = mlp(), [batch() for _ in range(4)], batch()
    start = dict(net.named_parameters())
    params, tx = dict(start), case.tx()
    state = tx.init(params)
    for x, y in support:
        loss = (functional_call(net, params, x) - y).square().mean()
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        updates, state = tx.update(dict(zip(params, grads)), state, params, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)
    outer = (functional_call(net, params, query[0]) - query[1]).square().mean()
    expected = torch.autograd.grad(outer, list(start.values()))

    optimizer = case.meta(net, **case.kwargs)
    for data in support:
        optimizer.step(mse(net, data))
    # sums over all parameters are rounded in their order, which is that of a sorted tree there
    same = torch.equal if case.algorithm.size != "all" else torch.allclose
    for n, p in net.named_parameters():
        assert same(p, params[n])
    found = torch.autograd.grad(mse(net, query), list(start.values()))
    all_close(found, expected)
    (own,) = torchopt.extract_state_dict(optimizer)
    assert own.step == state.step == 4
    assert own.slots.keys() == state.slots.keys()
    for slot, column in state.slots.items():
        for n in params:
            found = own.slots[slot][n]
            assert found is column[n] is None or same(found, column[n])
    assert own.counters == state.counters


def test_outer_backward_accumulates_into_the_original_parameters():
    net, tasks = mlp(), [(batch(), batch()) for _ in range(2)]
    start = list(net.parameters())
    expected = [torch.zeros_like(p) for p in start]
    for support, query in tasks:
        loss = adapted_loss(net, torchopt.sgd(0.1), support, query)()
        expected = [e + g for e, g in zip(expected, torch.autograd.grad(loss, start))]
    for support, query in tasks:
        with torchopt.inner_loop(net, torchopt.sgd(0.1)) as inner:
            for _ in range(3):
                inner.step(mse(net, support))
            mse(net, query).backward()
    for p, e in zip(start, expected):
        close(p.grad, e)
    net.zero_grad()
    assert all(p.grad is None for p in start)


def test_step_leaves_grad_fields_alone():
    net, data = mlp(), batch()
    start = list(net.parameters())
    torchopt.MetaAdam(net).step(mse(net, data))
    assert all(p.grad is None for p in start)


# Tied, frozen and untouched parameters ------------------------------------------------------------


@every_torch_meta_case
def test_tied_weights_stay_tied_and_count_once(case):
    net = Tied()
    optimizer, twin, peer = with_peer(case, net)
    for _ in range(3):
        data = batch()
        optimizer.step(mse(net, data))
        follow(peer, twin, data)
        assert net.encode.weight is net.decode.weight
        assert net.again.bias is net.encode.bias
    all_close(net.parameters(), twin.parameters())
    (state,) = torchopt.extract_state_dict(optimizer)
    for column in state.slots.values():
        assert set(column) == set(dict(net.named_parameters()))


def test_tied_weights_meta_gradient_against_central_differences():
    net = Tied()
    function = adapted_loss(net, torchopt.adam(0.05), batch(), batch())
    assert_derivative(function, list(net.parameters()))


@every_meta_case
def test_frozen_parameters_stay_the_same_objects(case):
    net, data = mlp(), batch()
    net[0].weight.requires_grad_(False)
    frozen, bits = net[0].weight, net[0].weight.clone()
    bias = net[0].bias
    optimizer = case.meta(net, **case.kwargs)
    for _ in range(2):
        optimizer.step(mse(net, data))
    assert net[0].weight is frozen
    assert torch.equal(frozen, bits)
    assert not frozen.requires_grad
    assert net[0].bias is not bias


@every_torch_meta_case
def test_a_parameter_unfrozen_later_starts_its_own_count(case):
    net = mlp()
    net[0].weight.requires_grad_(False)
    optimizer, twin, peer = with_peer(case, net)
    for k in range(5):
        if k == 2:
            net[0].weight.requires_grad_(True)
            twin[0].weight.requires_grad_(True)
        data = batch()
        optimizer.step(mse(net, data))
        follow(peer, twin, data)
    all_close(net.parameters(), twin.parameters())


@every_torch_meta_case
def test_parameters_the_loss_does_not_touch_are_untouched_and_right_later(case):
    net = TwoHeads()
    optimizer, twin, peer = with_peer(case, net)
    for k, head in enumerate("aaabab"):
        idle = {"a": "b", "b": "a"}[head]
        objects = dict(net.heads[idle].named_parameters())
        bits = {n: p.detach().clone() for n, p in objects.items()}
        slots = _slots_of(optimizer, f"heads.{idle}.weight")
        x, y = batch()
        optimizer.step((net(x, head) - y).square().mean())
        peer.zero_grad()
        (twin(x, head) - y).square().mean().backward()
        peer.step()
        for n, p in net.heads[idle].named_parameters():
            assert p is objects[n]
            assert torch.equal(p, bits[n])
        if k:
            now = _slots_of(optimizer, f"heads.{idle}.weight")
            assert now.keys() == slots.keys()
            assert all(now[s] is slots[s] for s in slots)
    for (n, p), q in zip(net.named_parameters(), twin.parameters()):
        close(p, q.data)
        assert _count(optimizer, n) == {"a": 4, "b": 2}.get(n.split(".")[1], 6)


def _slots_of(optimizer, name):
    (state,) = torchopt.extract_state_dict(optimizer)
    return {slot: column.get(name) for slot, column in state.slots.items()}


def _count(optimizer, name):
    (state,) = torchopt.extract_state_dict(optimizer)
    return state.step[name] if isinstance(state.step, dict) else state.step
