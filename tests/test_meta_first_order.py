"""Steps of the differentiable face without second derivatives, and without any."""

import copy
import weakref

import pytest
import torch
from adapting import all_close, batch, close, follow, graph_size, mlp, mse
from cases import every, every_meta_case
from torch.func import functional_call

import torchopt


pytestmark = pytest.mark.usefixtures("float64_by_default")


@pytest.mark.sampled(1)
@pytest.mark.parametrize("way", ["argument", "attribute", "inner_loop"])
@every_meta_case
def test_create_graph_false_is_first_order_maml(case, way):
    net, support, query = mlp(), [batch() for _ in range(3)], batch()
    start = list(net.parameters())
    # By hand: the gradients are constants, what else the update reads (weight decay) is not.
    tx, params = case.tx(), dict(net.named_parameters())
    state = tx.init(params)
    for x, y in support:
        leaves = {n: p.detach().requires_grad_(True) for n, p in params.items()}
        loss = (functional_call(net, leaves, x) - y).square().mean()
        grads = torch.autograd.grad(loss, list(leaves.values()))
        updates, state = tx.update(dict(zip(params, grads)), state, params, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)
    outer = (functional_call(net, params, query[0]) - query[1]).square().mean()
    expected = torch.autograd.grad(outer, start)

    if way == "inner_loop":
        with torchopt.inner_loop(net, case.tx(), create_graph=False) as optimizer:
            for data in support:
                optimizer.step(mse(net, data))
            found = torch.autograd.grad(mse(net, query), start)
    else:
        optimizer = case.meta(net, **case.kwargs)
        optimizer.create_graph = way != "attribute"
        switch = {"create_graph": False} if way == "argument" else {}
        for data in support:
            optimizer.step(mse(net, data), **switch)
        found = torch.autograd.grad(mse(net, query), start)
    all_close(found, expected)


@every(lambda case: case.meta and case.torch_cls and not case.needs_params)
def test_first_order_maml_is_the_gradient_at_the_adapted_weights(case):
    net, support, query = mlp(), [batch() for _ in range(3)], batch()
    twin, start = copy.deepcopy(net), list(net.parameters())
    with torchopt.inner_loop(net, case.tx()) as inner:
        for data in support:
            inner.step(mse(net, data))
        second = torch.autograd.grad(mse(net, query), start)
    peer = case.torch_cls(twin.parameters(), **case.kwargs)
    for data in support:
        follow(peer, twin, data)
    expected = torch.autograd.grad(mse(twin, query), list(twin.parameters()))
    optimizer = case.meta(net, **case.kwargs)
    for data in support:
        optimizer.step(mse(net, data), create_graph=False)
    all_close(torch.autograd.grad(mse(net, query), start), expected)
    differ = any((g - e).abs().max() > 1e-5 for g, e in zip(second, expected))
    assert differ != case.flat("gradients")


def test_first_order_still_gives_the_learning_rate_its_gradient():
    net, support, query = mlp(), batch(), batch()
    lr = torch.tensor(0.1, requires_grad=True)
    optimizer = torchopt.MetaSGD(net, lr=lr)
    (expected_direction,) = torch.autograd.grad(mse(net, support), net[2].bias, retain_graph=True)
    optimizer.step(mse(net, support), create_graph=False)
    weight = net[2].bias
    (found,) = torch.autograd.grad(weight.sum(), lr, retain_graph=True)
    close(found, -expected_direction.sum())
    assert torch.autograd.grad(mse(net, query), lr)[0].abs() > 0


@every_meta_case
def test_no_grad_steps_record_nothing_and_use_the_memory_of_one(case):
    net = mlp()
    twin = copy.deepcopy(net)
    optimizer, recorded = case.meta(net, **case.kwargs), case.meta(twin, **case.kwargs)
    sizes, old = [], []
    for _ in range(4):
        data = batch()
        loss = mse(net, data)
        sizes.append(graph_size(loss))
        with torch.no_grad():
            optimizer.step(loss)
        recorded.step(mse(twin, data))
        old.append(weakref.ref(net[0].weight))
        del loss
    assert len(set(sizes)) == 1
    assert [ref() is None for ref in old] == [True, True, True, False]
    for p, q in zip(net.parameters(), twin.parameters()):
        assert p.is_leaf
        assert p.requires_grad
        assert torch.equal(p, q)
    (state,) = torchopt.extract_state_dict(optimizer)
    for column in state.slots.values():
        for value in (x for x in column.values() if x is not None):
            assert value.grad_fn is None
            assert not value.requires_grad


def test_no_grad_with_a_learned_learning_rate_records_nothing():
    net, lr = mlp(), torch.tensor(0.1, requires_grad=True)
    optimizer = torchopt.MetaAdam(net, lr=lr)
    loss = mse(net, batch())
    with torch.no_grad():
        optimizer.step(loss)
    assert all(p.is_leaf and p.requires_grad for p in net.parameters())


def test_retain_graph_lets_one_loss_be_differentiated_twice():
    net, other, data = mlp(), mlp(), batch()
    loss = mse(net, data) + mse(other, data)
    torchopt.MetaSGD(net).step(loss, create_graph=False, retain_graph=True)
    torchopt.MetaSGD(other).step(loss, create_graph=False)
    assert all(p.grad_fn is not None for p in [*net.parameters(), *other.parameters()])
