"""``stop_gradient`` cuts the graph, and nothing else."""

import pytest
import torch
from adapting import assert_unchanged, batch, mse, snapshot
from extracting import Net, adapted, leaves_of
from torch import nn

import torchopt


pytestmark = pytest.mark.usefixtures("float64_by_default")


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_stop_gradient_at_any_time(steps):
    net = Net()
    optimizer, data = torchopt.MetaAdam(net, lr=0.1), batch()
    for _ in range(steps):
        optimizer.step(mse(net, data))
    values = [p.detach().clone() for p in net.parameters()]
    flags = [p.requires_grad for p in net.parameters()]
    (state,) = torchopt.extract_state_dict(optimizer, by="deepcopy")
    for _ in range(2):
        assert torchopt.stop_gradient(net) is net
        assert torchopt.stop_gradient(optimizer) is optimizer
    assert all(torch.equal(p, v) for p, v in zip(net.parameters(), values))
    assert [p.requires_grad for p in net.parameters()] == flags
    assert all(p.is_leaf and type(p) is nn.Parameter for p in net.parameters())
    assert net.encode.weight is net.decode.weight
    (after,) = torchopt.extract_state_dict(optimizer)
    assert after.step == steps
    for slot, column in after.slots.items():
        for name, tensor in column.items():
            assert tensor.grad_fn is None
            assert torch.equal(tensor, state.slots[slot][name])
    optimizer.step(mse(net, data))
    outer = torch.optim.SGD(torchopt.stop_gradient(net).parameters(), lr=0.1)
    mse(net, data).backward()
    outer.step()
    assert not torch.equal(next(net.parameters()), values[0])


def test_an_outer_backward_leaves_no_gradients_in_the_optimizer_state():
    net, optimizer, _ = adapted()
    torchopt.stop_gradient(net)
    torchopt.stop_gradient(optimizer)
    (state,) = torchopt.extract_state_dict(optimizer)
    optimizer.step(mse(net, batch()))
    mse(net, batch()).backward()
    for column in state.slots.values():
        assert all(tensor.grad is None for tensor in column.values())


def test_stop_gradient_leaves_untouched_parameters_alone():
    net = Net()
    before = snapshot(net)
    torchopt.stop_gradient(net)
    assert_unchanged(net, before)


def test_stop_gradient_keeps_the_earlier_graph():
    """An outer loss computed before the cut can still be differentiated after it."""
    net, data = Net(), batch()
    start = [p for p in net.parameters() if p.requires_grad]
    torchopt.MetaSGD(net, lr=0.1).step(mse(net, data))
    loss, old = mse(net, data), net.encode.weight
    torchopt.stop_gradient(net)
    assert net.encode.weight is not old
    assert old.grad_fn is not None
    grads = torch.autograd.grad(loss, start)
    assert all(g.abs().max() > 0 for g in grads)


def test_stop_gradient_of_a_tree():
    leaf = torch.randn(3, requires_grad=True)
    tree = {"a": leaf * 2, "b": [leaf, None, 3], "c": torch.ones(2)}
    objects = tree["a"], tree["b"][0]
    assert torchopt.stop_gradient(tree) is tree
    assert tree["a"] is objects[0]
    assert tree["a"].is_leaf
    assert tree["a"].requires_grad
    assert tree["b"][0] is objects[1]
    assert not tree["c"].requires_grad


def test_stop_gradient_of_extracted_states():
    net, optimizer, _ = adapted()
    for target in (net, optimizer):
        state = torchopt.extract_state_dict(target, by="copy")
        assert any(t.grad_fn is not None for t in leaves_of(state))
        torchopt.stop_gradient(state)
        assert all(t.grad_fn is None for t in leaves_of(state))
    assert net.encode.weight.grad_fn is not None


def test_stop_gradient_of_an_extracted_state_by_reference():
    net, optimizer, _ = adapted()
    state = torchopt.extract_state_dict(net)
    torchopt.stop_gradient(state)
    assert all(t.grad_fn is None for t in leaves_of(state))
    torchopt.recover_state_dict(net, state)
    assert all(p.is_leaf for p in net.parameters())
    assert optimizer.step(mse(net, batch())) is None


def test_stop_gradient_refuses_a_view_and_changes_nothing():
    leaf = torch.randn(4, requires_grad=True)
    tree = {"a": leaf * 2, "v": (leaf * 3)[:2]}
    with pytest.raises(ValueError, match="'v' is a view"):
        torchopt.stop_gradient(tree)
    assert tree["a"].grad_fn is not None


def test_stop_gradient_of_a_buffer_with_history():
    net = Net()
    scale = torch.randn((), requires_grad=True)
    net.register_buffer("memory", scale * torch.randn(3))
    values = net.memory.detach().clone()
    torchopt.stop_gradient(net)
    assert net.memory.grad_fn is None
    assert torch.equal(net.memory, values)


def test_inner_optimization_goes_on_over_outer_steps():
    """Meta-gradient RL: a learned scalar changes the inner loss; the network is never reset."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    gamma = nn.Parameter(torch.tensor(0.3))
    inner, outer = torchopt.MetaAdam(net, lr=0.02), torchopt.Adam([gamma], lr=0.05)
    data = batch(32)
    history, gammas = [], []
    for _ in range(8):
        for _ in range(3):
            inner.step((net(data[0]) - gamma * data[1]).square().mean())
        loss = mse(net, data)
        outer.zero_grad()
        loss.backward()
        assert gamma.grad.abs() > 0
        outer.step()
        torchopt.stop_gradient(net)
        torchopt.stop_gradient(inner)
        history.append(loss.item())
        gammas.append(gamma.item())
    assert history[-1] < history[0]
    assert gammas[-1] > 0.3
    assert torchopt.extract_state_dict(inner)[0].step == 24


def test_without_stop_gradient_the_next_outer_backward_is_an_error():
    net = nn.Linear(3, 2)
    gamma = nn.Parameter(torch.tensor(0.3))
    inner, data = torchopt.MetaAdam(net, lr=0.02), batch()
    inner.step((net(data[0]) - gamma * data[1]).square().mean())
    mse(net, data).backward()
    inner.step((net(data[0]) - gamma * data[1]).square().mean())
    with pytest.raises(RuntimeError, match="second time"):
        mse(net, data).backward()
    torchopt.stop_gradient(net)
    torchopt.stop_gradient(inner)
    gamma.grad = None
    inner.step((net(data[0]) - gamma * data[1]).square().mean())
    mse(net, data).backward()
    assert gamma.grad.abs() > 0
