"""Outer loops: graphs neither grow nor are kept alive."""

import gc
import weakref

import pytest
import torch
from adapting import batch, graph_size, mlp, mse
from cases import every_meta_kind

import torchopt


pytestmark = pytest.mark.usefixtures("float64_by_default")


@pytest.mark.parametrize("outer_cls", [torch.optim.Adam, torchopt.Adam], ids=["torch", "torchopt"])
def test_outer_loop_of_a_torch_optimizer_does_not_grow(outer_cls):
    net = mlp()
    start = list(net.parameters())
    lr = torch.tensor(0.05, requires_grad=True)
    inner = torchopt.MetaAdam(net, lr=lr)
    outer = outer_cls([*start, lr], lr=0.01)
    support, query = batch(), batch()
    losses, sizes = [], []
    for _ in range(15):
        net_state = torchopt.extract_state_dict(net)
        inner_state = torchopt.extract_state_dict(inner)
        for _ in range(2):
            inner.step(mse(net, support))
        loss = mse(net, query)
        sizes.append(graph_size(loss))
        torchopt.recover_state_dict(net, net_state)
        torchopt.recover_state_dict(inner, inner_state)
        outer.zero_grad()
        loss.backward()
        outer.step()
        losses.append(loss.item())
        assert all(p is q for p, q in zip(net.parameters(), start))
    assert len(set(sizes)) == 1
    assert losses[-1] < losses[0]


def test_graph_grows_with_each_step_and_not_after_stop_gradient():
    net, data = mlp(), batch()
    inner = torchopt.MetaAdam(net, lr=0.01)
    growing, constant = [], []
    for _ in range(3):
        inner.step(mse(net, data))
        growing.append(graph_size(mse(net, data)))
    assert growing[0] < growing[1] < growing[2]
    for _ in range(3):
        torchopt.stop_gradient(net)
        torchopt.stop_gradient(inner)
        inner.step(mse(net, data))
        constant.append(graph_size(mse(net, data)))
    assert len(set(constant)) == 1
    assert constant[0] < growing[1]


class _Token:
    """Dies with the graph node that holds it."""


class _Watched(torch.autograd.Function):
    """The identity; its node in the graph holds a token."""

    @staticmethod
    def forward(ctx, x, tokens):
        ctx.token = _Token()
        tokens.add(ctx.token)
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g, None


@pytest.mark.parametrize("backward", [False, True], ids=["unused", "backward"])
@every_meta_kind
def test_no_reference_cycle_keeps_a_graph_alive(case, backward):
    net, support, query = mlp(), batch(), batch()
    tokens, weights = weakref.WeakSet(), []

    def loss_of(net, data):
        return _Watched.apply(mse(net, data), tokens)

    gc.collect()
    gc.disable()
    try:
        optimizer = case.meta(net, **case.kwargs)
        states = torchopt.extract_state_dict(net), torchopt.extract_state_dict(optimizer)
        for _ in range(3):
            optimizer.step(loss_of(net, support))
            weights += [weakref.ref(p) for p in net.parameters()]
        loss = loss_of(net, query)
        assert len(tokens) >= 1
        assert any(w() is not None for w in weights[:4])
        if backward:
            loss.backward()
        torchopt.recover_state_dict(net, states[0])
        torchopt.recover_state_dict(optimizer, states[1])
        del loss
        assert len(tokens) == 0
        assert all(w() is None for w in weights)
        optimizer_ref, net_ref = weakref.ref(optimizer), weakref.ref(net)
        del optimizer
        assert optimizer_ref() is None
        del net, states
        assert net_ref() is None
    finally:
        gc.enable()
