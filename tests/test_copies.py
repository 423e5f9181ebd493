"""Copies of what holds tensors with history, and other things that users put together."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor, nn
from torch.nn.utils import spectral_norm, weight_norm

import torchopt


X = torch.linspace(-1.0, 1.0, 8).reshape(4, 2)


class Owner(nn.Module):
    """A network that owns its optimizer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(2, 2)
        self.optimizer = torchopt.MetaAdam(self, lr=0.1)

    def adapt(self) -> None:
        self.optimizer.step(self.body(X).square().sum())


@pytest.mark.parametrize("copied", [copy.deepcopy, torchopt.module_clone])
def test_a_network_that_owns_its_optimizer(copied: Any) -> None:
    owner = Owner()
    for _ in range(2):
        owner.adapt()
    twin = copied(owner)
    assert twin.optimizer.param_groups[0]["params"] is twin
    for each in (owner, twin):
        each.adapt()
    assert_close(list(twin.parameters()), list(owner.parameters()))
    states = [torchopt.extract_state_dict(each.optimizer)[0] for each in (owner, twin)]
    assert states[0].step == states[1].step == 3
    assert_close(states[1].exp_avg, states[0].exp_avg)
    assert states[1].exp_avg["body.weight"] is not states[0].exp_avg["body.weight"]


@pytest.mark.parametrize("by", ["reference", "copy", "deepcopy"])
@pytest.mark.parametrize("normed", [weight_norm, spectral_norm])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_clone_of_a_network_with_computed_attributes(normed: Any, by: str) -> None:
    torch.manual_seed(0)
    net = normed(nn.Linear(2, 2))
    net.eval()  # spectral_norm changes its buffers in training
    right = net(X)
    clone = torchopt.module_clone(net, by=by)
    assert_close(clone(X), right)


@pytest.mark.parametrize("by", ["reference", "copy", "deepcopy"])
def test_a_clone_of_a_network_that_stores_its_output(by: str) -> None:
    net: Any = nn.Linear(2, 2)
    net.outputs = {"last": [net(X)]}
    net.again = net.outputs["last"][0]
    clone = torchopt.module_clone(net, by=by)
    stored = clone.outputs["last"][0]
    assert_close(stored, net.again)
    assert clone.again is stored
    assert clone.outputs is not net.outputs
    assert (stored is net.again) == (by == "reference")
    assert (stored.grad_fn is None) == (by == "deepcopy")


def adapted() -> nn.Linear:
    torch.manual_seed(0)
    net = nn.Linear(2, 2)
    torchopt.MetaSGD(net, lr=0.1).step(net(X).sum())
    return net


@pytest.mark.parametrize("requires_grad", [True, False])
def test_a_parameter_of_a_fast_weight(requires_grad: bool) -> None:
    net = adapted()
    made = nn.Parameter(net.weight, requires_grad=requires_grad)
    assert type(made) is nn.Parameter
    assert (made.is_leaf, made.requires_grad) == (True, requires_grad)
    assert torch.equal(made, net.weight)
    assert type(net.weight.detach()) is Tensor
    assert not isinstance(net.weight.detach(), nn.Parameter)
    assert isinstance(net.weight, nn.Parameter)
    assert net.weight.grad_fn is not None


def test_fast_weights_can_be_assigned_to_another_network() -> None:
    net, other, start = adapted(), nn.Linear(2, 2), nn.Linear(2, 2)
    other.load_state_dict(net.state_dict(keep_vars=True), assign=True)
    assert all(type(p) is nn.Parameter and p.is_leaf for p in other.parameters())
    assert torch.equal(other.weight, net.weight)
    net.load_state_dict(start.state_dict(), assign=True)
    torchopt.MetaSGD(net, lr=0.1).step(net(X).sum())
    assert net.weight.grad_fn is not None


def test_func_optimizer_steps_without_a_graph() -> None:
    optimizer = torchopt.FuncOptimizer(torchopt.adam(0.1))
    params: Any = {"w": torch.tensor([1.0, -2.0], requires_grad=True), "n": None}
    other = torch.tensor([1.0, -2.0], requires_grad=True)
    twin = torch.optim.Adam([other], lr=0.1)
    for _ in range(3):
        loss = params["w"].square().sum()
        with torch.no_grad():
            params = optimizer.step(loss, params)
        assert params["w"].is_leaf
        assert params["w"].requires_grad
        twin.zero_grad()
        other.square().sum().backward()
        twin.step()
    assert_close(params["w"], other)


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("container", ["list", "dict"])
def test_a_parameter_container_as_learning_rates(container: str, live: bool) -> None:
    torch.manual_seed(0)
    net = nn.Linear(2, 1)
    rates: Any = nn.ParameterList([torch.tensor(0.1), torch.tensor(0.03)])
    if container == "dict":
        rates = nn.ParameterDict([("weight", rates[0]), ("bias", rates[1])])
    twin, learned = copy.deepcopy(net), [torch.tensor(0.1), torch.tensor(0.03)]
    for rate in learned:
        rate.requires_grad_()
    found = []
    for each, lr in ((net, rates), (twin, learned)):
        inner = torchopt.MetaSGD(each, lr=0.5 if live else lr)
        inner.param_groups[0]["lr"] = lr if live else inner.param_groups[0]["lr"]
        for _ in range(2):
            inner.step(each(X).square().sum())
        repr(inner)
        values = list(rates.parameters()) if each is net else learned
        found.append(torch.autograd.grad(each(X).square().sum(), values))
    assert_close(found[0], found[1])


def test_scripted_and_lazy_networks_get_a_clear_word() -> None:
    scripted = torch.jit.trace(nn.Linear(2, 2), X)
    for network in (scripted, nn.Sequential(nn.Linear(2, 2), scripted)):
        with pytest.raises(TypeError, match=r"before torch\.jit\.script"):
            torchopt.MetaSGD(network, lr=0.1)
        with pytest.raises(TypeError, match=r"before torch\.jit\.script"):
            torchopt.inner_loop(network, torchopt.sgd(0.1)).__enter__()
    with pytest.raises(ValueError, match="Run the network once"):
        torchopt.module_clone(nn.LazyLinear(2), by="copy")
