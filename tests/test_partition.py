"""Parts of a network with transformations of their own, on all faces."""

from __future__ import annotations

import pickle

import pytest
import torch
from tolerances import META_GRADIENT, assert_close
from two_parts import LABELS, TRANSFORMS, loss_of, make, train, two_optimizers

import torchopt


def values(net):
    return {n: p.detach() for n, p in net.named_parameters()}


LABELLED = {
    "parts": LABELS,
    "names": {"0.weight": "body", "0.bias": "body", "2.weight": "head", "2.bias": "head"},
    "list": ["body", "body", "head", "head"],
    "function": lambda params: LABELS,
}


@pytest.mark.parametrize("labels", LABELLED)
def test_each_part_moves_as_with_an_optimizer_of_its_own(labels):
    tx = torchopt.partition(TRANSFORMS, LABELLED[labels])
    expected = make()
    train(expected, *two_optimizers(expected))

    net = make()
    train(net, torchopt.Optimizer(net.named_parameters(), tx))
    assert_close(values(net), values(expected), times=10)

    net = make()
    inner = torchopt.MetaOptimizer(net, tx)
    for _ in range(3):
        inner.step(loss_of(net))
    assert_close(values(net), values(expected), times=10)

    net = make()
    params = values(net)
    state = tx.init(params)
    for _ in range(3):
        leaves = {n: p.requires_grad_() for n, p in params.items()}
        x = torch.linspace(-1, 1, 18).double().view(6, 3)
        loss = (torch.func.functional_call(net, leaves, x) - x.sum(1, keepdim=True)).square().mean()
        grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()))))
        params, state = tx.apply_gradients(grads, state, leaves, inplace=False)
        params = {n: p.detach() for n, p in params.items()}
    assert_close(params, values(expected), times=10)
    assert [n for n, x in state.exp_avg.items() if x is not None] == ["0.weight", "0.bias"]
    assert [n for n, x in state.momentum_buffer.items() if x is not None] == ["2.weight", "2.bias"]


def test_a_norm_is_that_of_the_part_alone():
    clip = torchopt.clip_grad_norm(1.0)
    tx = torchopt.partition({"a": clip, "b": torchopt.identity()}, {"x": "a", "y": "b", "z": "a"})
    g = {"x": torch.tensor([3.0]), "y": torch.tensor([100.0]), "z": torch.tensor([4.0])}
    updates, _ = tx.update(g, tx.init(g), inplace=False)
    expected = {"x": torch.tensor([0.6]), "y": g["y"], "z": torch.tensor([0.8])}
    assert_close(updates, expected, times=4)


def test_meta_gradients_with_respect_to_the_rates_of_parts():
    rates = {n: torch.tensor(0.1, dtype=torch.float64, requires_grad=True) for n in TRANSFORMS}
    net = make()
    start = torchopt.extract_state_dict(net)
    transforms = {
        "body": torchopt.adam(rates["body"]),
        "head": torchopt.sgd(rates["head"], momentum=0.9),
    }

    def outer_loss():
        torchopt.recover_state_dict(net, start)
        inner = torchopt.MetaOptimizer(net, torchopt.partition(transforms, LABELS))
        assert inner.param_groups[0]["body.lr"] is rates["body"]
        for _ in range(2):
            inner.step(loss_of(net))
        return loss_of(net)

    for rate, grad in zip(rates.values(), torch.autograd.grad(outer_loss(), list(rates.values()))):
        ends = []
        for sign in (1e-6, -1e-6):
            with torch.no_grad():
                rate.add_(sign)
            ends.append(outer_loss().item())
            with torch.no_grad():
                rate.sub_(sign)
        difference = (ends[0] - ends[1]) / 2e-6
        assert abs(difference) > 1e-4
        assert abs(grad.item() - difference) < 10 * META_GRADIENT * abs(difference)


# Misuse -------------------------------------------------------------------------------------------


def test_misuse():
    net = make()
    for given in ([torchopt.sgd(0.1)], {1: torchopt.sgd(0.1)}, torchopt.sgd(0.1)):
        with pytest.raises(TypeError, match="by label"):
            torchopt.partition(given, LABELS)
    with pytest.raises(TypeError, match=r"for 'a'.*gradient transformation"):
        torchopt.partition({"a": torch.optim.SGD}, LABELS)
    with pytest.raises(TypeError, match="labels"):
        torchopt.partition(TRANSFORMS, "body")
    for labels, message in (
        ({"0": "body", "2": "tail"}, r"'tail'.*'2\.\w+'"),
        ({"0": "body"}, r"2\.\w+"),
        ({"0": "body", "2": "head", "3": "head"}, "'3'"),
        ({"0": "body", "2": 7}, "7"),
    ):
        tx = torchopt.partition(TRANSFORMS, labels)
        with pytest.raises(ValueError, match=message):
            torchopt.Optimizer(net.named_parameters(), tx)
        with pytest.raises(ValueError, match=message):
            tx.init(values(net))
    with pytest.raises(ValueError, match="named_parameters"):
        torchopt.Optimizer(net.parameters(), torchopt.partition(TRANSFORMS, LABELS))
    two = torchopt.chain(
        torchopt.masked(torchopt.sgd(0.1), lambda ps: [p.dim() > 1 for p in ps]),
        torchopt.masked(torchopt.sgd(0.2), lambda ps: [p.dim() <= 1 for p in ps]),
    )
    with pytest.raises(ValueError, match="'lr_2'"):
        torchopt.Optimizer([{"params": net.parameters(), "lr_2": 0.1}], two)


def test_frozen_parameters_may_be_labelled():
    net = make()
    net[0].requires_grad_(False)
    inner = torchopt.MetaOptimizer(net, torchopt.partition(TRANSFORMS, LABELS))
    inner.step(loss_of(net))
    torchopt.stop_gradient(inner)
    inner.load_state_dict(inner.state_dict())


def test_it_prints_compares_and_reports():
    tx = torchopt.partition(TRANSFORMS, LABELS)
    assert tx == torchopt.partition(TRANSFORMS, LABELS)
    assert tx != torchopt.partition(TRANSFORMS, {"0": "head", "2": "body"})
    assert "body" in repr(tx)
    params = values(make())
    assert torchopt.kernels.why(tx, params, params=params) is not None
    assert pickle.loads(pickle.dumps(tx)) == tx


def test_pairs_of_functions_keep_their_state_for_each_part():
    def halve(updates, state, **_):
        return torchopt.pytree.tree_map(lambda u: u / 2, updates), {"calls": state["calls"] + 1}

    pair = torchopt.base.GradientTransformation(lambda params: {"calls": 0}, halve)
    transforms = {"body": torchopt.chain(pair, torchopt.sgd(0.1)), "head": torchopt.sgd(0.1)}
    net, twin = make(), make()
    tx = torchopt.partition({**transforms, "head": torchopt.chain(pair, torchopt.sgd(0.2))}, LABELS)
    peers = torch.optim.SGD(twin[0].parameters(), 0.05), torch.optim.SGD(twin[2].parameters(), 0.1)
    optimizer = torchopt.Optimizer(net.named_parameters(), tx)
    for _ in range(3):
        train(net, optimizer, steps=1)
        again = torchopt.Optimizer(net.named_parameters(), tx)
        again.load_state_dict(optimizer.state_dict())
        optimizer = again
    train(twin, *peers)
    assert_close(values(net), values(twin), times=10)
    state = tx.init(values(net))
    assert state.slots["body.state"] == state.slots["head.state"] == {"calls": 0}


def test_vmap():
    tx = torchopt.partition(TRANSFORMS, {"w": "body", "b": "head"})
    params = {"w": torch.randn(3, 4).double(), "b": torch.randn(3, 2).double()}
    grads = {n: torch.randn_like(p) for n, p in params.items()}

    def one(params, grads):
        new, _ = tx.apply_gradients(grads, tx.init(params), params, inplace=False)
        return new

    expected = [one(*({n: x[k] for n, x in t.items()} for t in (params, grads))) for k in range(3)]
    batched = torch.func.vmap(one)(params, grads)
    assert_close(batched, {n: torch.stack([e[n] for e in expected]) for n in params})
