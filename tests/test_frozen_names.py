"""Hyperparameters and masks may name frozen parameters and tied weights by any of their names."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_close
from torch import nn

import torchopt


def make(frozen=True):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    net[0].requires_grad_(not frozen)
    return net


def loss_of(net):
    x = torch.linspace(-1, 1, 18).double().view(6, 3)
    return (net(x) - x.sum(1, keepdim=True)).square().mean()


RATES = {"0.weight": 0.5, "0.bias": 0.4, "2.weight": 0.3, "2.bias": 0.2}
GIVEN = {
    "names": RATES,
    "parts": {"0": 0.5, "2.weight": 0.3, "2.bias": 0.2},
    "list": list(RATES.values()),
    "trainable": {"2.weight": 0.3, "2.bias": 0.2},
    "list-trainable": [0.3, 0.2],
    "pairs": RATES,
}


def moved(net, before):
    return {n: (before[n] - p).detach() for n, p in net.named_parameters()}


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("when", ["before", "later"])
def test_rates_of_frozen_parameters_are_ignored(given, when):
    net = make(frozen=when == "before")
    if when == "later" and "trainable" in given:
        pytest.skip("at first all are trainable")
    inner = torchopt.MetaSGD(net, lr=GIVEN[given])
    if when == "later":
        inner.step(loss_of(net))
        torchopt.stop_gradient(net)
        net[0].requires_grad_(False)
    before = dict(net.named_parameters())
    grads = torch.autograd.grad(loss_of(net), [before["2.weight"], before["2.bias"]])
    inner.step(loss_of(net))
    change = moved(net, before)
    assert_close(change["2.weight"], 0.3 * grads[0])
    assert_close(change["2.bias"], 0.2 * grads[1])
    assert not change["0.weight"].any()


def test_betas_by_name():
    net = make()
    betas = (dict.fromkeys(RATES, 0.5), dict.fromkeys(RATES, 0.9))
    inner = torchopt.MetaAdam(net, lr=0.1, betas=betas)
    inner.step(loss_of(net))
    assert set(torchopt.extract_state_dict(inner)[0].exp_avg) == {"2.weight", "2.bias"}


MASKS = {
    "names": {"0.weight": True, "0.bias": True, "2.weight": False, "2.bias": True},
    "parts": {"0": True, "2.weight": False, "2.bias": True},
    "list": [True, True, False, True],
    "function": lambda params: {"0": True, "2.weight": False, "2.bias": True},
}


@pytest.mark.parametrize("mask", MASKS)
def test_masks_of_frozen_parameters_are_ignored(mask):
    net = make()
    before = dict(net.named_parameters())
    tx = torchopt.chain(torchopt.sgd(0.1), torchopt.masked(torchopt.scale(0.0), MASKS[mask]))
    torchopt.MetaOptimizer(net, tx).step(loss_of(net))
    change = moved(net, before)
    assert change["2.weight"].any()
    assert not change["2.bias"].any()


@pytest.mark.parametrize("bad", ["1.weight", "3", "0.wait"])
def test_a_misspelt_name_is_still_refused(bad):
    net = make()
    inner = torchopt.MetaSGD(net, lr=0.1)
    inner.param_groups[0]["lr"] = {**RATES, bad: 1.0}
    for attempt in (
        lambda: inner.step(loss_of(net)),
        lambda: torchopt.MetaSGD(net, lr={**RATES, bad: 1.0}),
    ):
        with pytest.raises(ValueError, match=bad.replace(".", r"\.")):
            attempt()


def test_a_trainable_parameter_without_an_entry_is_still_refused():
    with pytest.raises(ValueError, match=r"no entry for parameter '2\.bias'"):
        torchopt.MetaSGD(make(), lr={"0.weight": 0.1, "2.weight": 0.2})
    with pytest.raises(ValueError, match="lr"):
        torchopt.MetaSGD(make(), lr=[0.1, 0.2, 0.3])


class Tied(nn.Module):
    """One weight under two names."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x).tanh())


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ({"a.weight": 0.1, "b.weight": 0.2}, 0.1),
        ({"b.weight": 0.2}, 0.2),
        ({"a": 0.1, "b": 0.2}, 0.1),
        ({"": 0.3, "b": 0.2}, 0.2),
    ],
)
def test_a_tied_weight_may_have_any_of_its_names(rates, expected):
    torch.manual_seed(0)
    net, x = Tied(), torch.randn(3, 2)
    before = net.a.weight
    loss = net(x).square().sum()
    (grad,) = torch.autograd.grad(loss, before, retain_graph=True)
    torchopt.MetaSGD(net, lr=rates).step(loss)
    assert net.a.weight is net.b.weight
    assert_close((before - net.a.weight).detach(), expected * grad, times=4)


def test_two_networks_each_with_its_own_names():
    first, second = make(), make()
    tx = torchopt.chain(torchopt.sgd(0.1), torchopt.masked(torchopt.scale(0.0), _both))
    inner = torchopt.MetaOptimizer([first, {"params": second, "lr": RATES}], tx)
    before = dict(second.named_parameters())
    inner.step(loss_of(first) + loss_of(second))
    change = moved(second, before)
    assert change["2.weight"].any()
    assert not change["2.bias"].any()


def _both(params):
    return {f"{k}.{n}": n == "2.bias" for k in range(2) for n in RATES}
