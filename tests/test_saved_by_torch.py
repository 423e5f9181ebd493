"""Differentiable optimizers start from what ``torch.optim`` saved, and give back what it reads."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import every_case, every_torch_case, named
from tolerances import META_GRADIENT, assert_close
from torch import nn

import torchopt


FACES = pytest.mark.parametrize("face", ["torch", "ours"])


def make(bias=True):
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2, bias=bias)).double()


def loss_of(net):
    x = torch.linspace(-1, 1, 24).double().view(8, 3)
    return (net(x) - x[:, :2].cos()).square().mean()


def trained(case, face, steps=3, net=None, named=False):
    """Return a network and its ordinary optimizer after some steps."""
    net = make() if net is None else net
    cls = case.torch_cls if face == "torch" else case.cls
    params = net.named_parameters() if named else net.parameters()
    optimizer = cls(params, **case.kwargs)
    train(net, optimizer, steps)
    return net, optimizer


def train(net, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(net).backward()
        optimizer.step()


def values(net):
    return [p.detach() for p in net.parameters()]


@every_torch_case
@FACES
def test_it_goes_on_where_the_other_stopped_and_back(case, face):
    net, optimizer = trained(case, face)
    twin, peer = copy.deepcopy((net, optimizer))
    inner = case.meta(net)  # its numbers come with the state
    inner.load_state_dict(optimizer.state_dict())
    for _ in range(2):
        inner.step(loss_of(net))
    train(twin, peer, 2)
    assert_close(values(net), values(twin), times=10)

    net = torchopt.stop_gradient(copy.deepcopy(net))
    back = type(optimizer)(net.parameters())
    back.load_state_dict(inner.state_dict())
    train(net, back)
    train(twin, peer)
    assert_close(values(net), values(twin), times=10)


@every_case
def test_its_own_state_goes_through_a_file(case, tmp_path):
    net = make()
    inner = case.meta(net, **case.kwargs)
    for _ in range(2):
        inner.step(loss_of(net))
    torch.save(inner.state_dict(), tmp_path / "state")
    again = case.meta(torchopt.stop_gradient(copy.deepcopy(net)))
    again.load_state_dict(torch.load(tmp_path / "state"))
    for optimizer in (inner, again):
        optimizer.step(loss_of(optimizer.param_groups[0]["params"]))
    assert_close(values(again.param_groups[0]["params"]), values(net))


def test_an_inner_loop_starts_from_the_momentum_of_an_optimizer():
    """The meta-gradient with respect to the weights, against central differences."""
    net, optimizer = trained(named("sgd-nesterov"), "torch")
    buffers = {n: optimizer.state[p]["momentum_buffer"].clone() for n, p in net.named_parameters()}

    def outer_loss():
        inner = torchopt.MetaSGD(net, momentum=0.5)
        inner.load_state_dict(optimizer.state_dict())
        with torchopt.inner_loop(net, inner):
            inner.step(loss_of(net))
            return loss_of(net)

    def by_hand():
        params = dict(net.named_parameters())
        grads = torch.autograd.grad(loss_of(net), list(params.values()), create_graph=True)
        new = {}
        for (n, p), g in zip(params.items(), grads):
            b = 0.8 * buffers[n] + g
            new[n] = p - 0.04 * (g + 0.8 * b)
        return new

    assert_close(outer_loss().detach(), _loss_at(net, by_hand()).detach(), times=10)
    grads = torch.autograd.grad(outer_loss(), list(net.parameters()))
    directions = [torch.randn_like(p) for p in net.parameters()]
    slope = sum((g * d).sum() for g, d in zip(grads, directions)).item()
    ends = []
    for sign in (1, -2):
        with torch.no_grad():
            for p, d in zip(net.parameters(), directions):
                p.add_(d, alpha=sign * 1e-6)
        ends.append(outer_loss().item())
    difference = (ends[0] - ends[1]) / 2e-6
    assert abs(slope - difference) < 10 * META_GRADIENT * abs(difference)


def _loss_at(net, params):
    x = torch.linspace(-1, 1, 24).double().view(8, 3)
    return (torch.func.functional_call(net, params, x) - x[:, :2].cos()).square().mean()


def test_parameters_are_found_by_name():
    case = named("adam")
    net = make()
    reordered = list(net.named_parameters())[::-1]
    optimizer = torch.optim.Adam(reordered, **case.kwargs)
    train(net, optimizer)
    saved = optimizer.state_dict()
    if "param_names" not in saved["param_groups"][0]:
        pytest.skip("this torch keeps no names")
    inner = torchopt.MetaAdam(net)
    inner.load_state_dict(saved)
    (state,) = torchopt.extract_state_dict(inner)
    for name, p in net.named_parameters():
        assert_close(state.exp_avg[name], optimizer.state[p]["exp_avg"])
    saved["param_groups"][0]["param_names"][0] = "module.2.bias"
    with pytest.raises(ValueError, match=r"2\.bias"):
        inner.load_state_dict(saved)


def test_groups_of_one_network_become_numbers_by_name():
    case = named("adam")
    net = make()
    params = dict(net.named_parameters())
    decayed = [(n, p) for n, p in params.items() if p.dim() > 1]
    rest = [(n, p) for n, p in params.items() if p.dim() <= 1]
    groups = [
        {"params": decayed, "weight_decay": 0.3, "betas": (0.5, 0.9)},
        {"params": rest, "lr": 0.2, "betas": (0.8, 0.9)},
    ]
    optimizer = torch.optim.Adam(groups, **case.kwargs)
    train(net, optimizer)
    saved = optimizer.state_dict()
    if "param_names" not in saved["param_groups"][0]:
        pytest.skip("this torch keeps no names")
    twin, peer = copy.deepcopy((net, optimizer))
    inner = torchopt.MetaAdam(net)
    inner.load_state_dict(saved)
    inner.step(loss_of(net))
    train(twin, peer, 1)
    assert_close(values(net), values(twin), times=10)
    for group in saved["param_groups"]:
        del group["param_names"]
    with pytest.raises(ValueError, match="named_parameters"):
        torchopt.MetaAdam(make()).load_state_dict(saved)


@pytest.mark.parametrize("given", ["all", "trainable"])
def test_frozen_parameters(given):
    net = make()
    net[0].requires_grad_(False)
    params = net.parameters() if given == "all" else net[2].parameters()
    optimizer = torch.optim.Adam(params, lr=0.1)
    train(net, optimizer)
    twin, peer = copy.deepcopy((net, optimizer))
    inner = torchopt.MetaAdam(net)
    inner.load_state_dict(optimizer.state_dict())
    inner.step(loss_of(net))
    train(twin, peer, 1)
    assert_close(values(net), values(twin), times=10)
    torchopt.MetaAdam(net).load_state_dict(inner.state_dict())


def test_two_networks_have_a_group_each():
    nets = make(), make(bias=False)
    inner = torchopt.MetaSGD([nets[0], {"params": nets[1], "lr": 0.5}], momentum=0.9)
    inner.step(sum(loss_of(net) for net in nets))
    saved = inner.state_dict()
    assert [group["params"] for group in saved["param_groups"]] == [[0, 1, 2, 3], [4, 5, 6]]
    fresh = [{"params": list(net.parameters())} for net in (make(), make(bias=False))]
    peer = torch.optim.SGD(fresh, lr=9.0)
    peer.load_state_dict(saved)
    assert [group["lr"] for group in peer.param_groups] == [1e-3, 0.5]
    with pytest.raises(ValueError, match="one per network"):
        torchopt.MetaSGD([make(), make(), make()], momentum=0.9).load_state_dict(saved)


def test_tensors_are_copied():
    net, optimizer = trained(named("adam"), "torch")
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    inner = torchopt.MetaAdam(net)
    inner.load_state_dict(optimizer.state_dict())
    (before,) = torchopt.extract_state_dict(inner, by="deepcopy")
    optimizer.param_groups[0]["lr"].fill_(7.0)
    train(net, optimizer)
    (after,) = torchopt.extract_state_dict(inner)
    assert_close(after.exp_avg, before.exp_avg)
    assert inner.param_groups[0]["lr"] == 0.1


def test_half_precision_is_widened():
    net = make().bfloat16()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    net(torch.ones(2, 3).bfloat16()).sum().backward()
    optimizer.step()
    inner = torchopt.MetaAdam(net)
    inner.load_state_dict(optimizer.state_dict())
    assert {x.dtype for x in torchopt.extract_state_dict(inner)[0].exp_avg.values()} == {
        torch.float32
    }


def test_notes_of_schedulers_are_no_hyperparameters():
    net, optimizer = trained(named("sgd-nesterov"), "torch")
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=5)
    torchopt.MetaSGD(net).load_state_dict(optimizer.state_dict())
