"""Copies, pickles, files and conversions of adapted networks and of their optimizers."""

import copy
import io
import pickle

import pytest
import torch
from adapting import adapted_loss, all_close, batch, close, mlp, mse
from cases import every_meta_case
from odd_modules import MODULES, Tied, every_module
from torch import nn

import torchopt


pytestmark = pytest.mark.usefixtures("float64_by_default")


@every_module
def test_deepcopy_of_an_adapted_module(kind):
    net, data = MODULES[kind]().eval(), batch()
    torchopt.MetaAdam(net, lr=0.1).step(mse(net, data))
    copied = copy.deepcopy(net)
    bits = [p.detach().clone() for p in net.parameters()]
    for p, q in zip(net.parameters(), copied.parameters()):
        assert type(q) is nn.Parameter
        assert q.is_leaf
        assert q.requires_grad
        assert torch.equal(p, q)
    close(copied(data[0]), net(data[0]))
    peer = torch.optim.SGD(copied.parameters(), lr=0.1)
    start = mse(copied, data).detach()
    for _ in range(20):
        peer.zero_grad()
        mse(copied, data).backward()
        peer.step()
    assert mse(copied, data) < start
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), bits))


def test_deepcopy_keeps_ties_and_frozen_flags():
    net = Tied()
    net.head.weight.requires_grad_(False)
    torchopt.MetaSGD(net).step(mse(net, batch()))
    copied = copy.deepcopy(net)
    assert copied.encode.weight is copied.decode.weight
    assert copied.encode.weight is not net.encode.weight
    assert not copied.head.weight.requires_grad


def test_deepcopy_of_the_optimizer_goes_on_by_itself():
    net, data = mlp(), batch()
    optimizer = torchopt.MetaAdam(net, lr=0.1)
    optimizer.create_graph = False
    optimizer.step(mse(net, data))
    copied = copy.deepcopy(optimizer)
    assert type(copied) is torchopt.MetaAdam
    assert copied.create_graph is False
    twin = copied.param_groups[0]["params"]
    assert twin is not net
    bits = [p.detach().clone() for p in net.parameters()]
    objects = list(net.parameters())
    state = torchopt.extract_state_dict(optimizer)
    copied.step(mse(twin, data))
    assert all(p is q for p, q in zip(net.parameters(), objects))
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), bits))
    assert torchopt.extract_state_dict(optimizer)[0].step == state[0].step == 1
    optimizer.step(mse(net, data))
    all_close(net.parameters(), twin.parameters())


def test_deepcopy_of_module_and_optimizer_together_keeps_them_together():
    net, data = mlp(), batch()
    optimizer = torchopt.MetaSGD(net, lr=0.1)
    optimizer.step(mse(net, data))
    pair = copy.deepcopy({"net": net, "optimizer": optimizer})
    assert pair["optimizer"].param_groups[0]["params"] is pair["net"]
    old = pair["net"][0].weight
    pair["optimizer"].step(mse(pair["net"], data))
    assert pair["net"][0].weight is not old


class Learner(nn.Module):
    """What users write: the learned rates and the inner optimizer live in a module."""

    def __init__(self):
        super().__init__()
        self.net = mlp()
        self.rates = nn.ParameterDict({n: torch.tensor(0.1) for n in ("first", "last")})
        self.inner = torchopt.MetaSGD(self.net, lr={"0": self.rates["first"], "2": 0.1})
        self.inner.param_groups[0]["momentum"] = self.rates["last"]

    def forward(self, support, query):
        state = torchopt.extract_state_dict(self.net), torchopt.extract_state_dict(self.inner)
        for _ in range(2):
            self.inner.step(mse(self.net, support))
        loss = mse(self.net, query)
        torchopt.recover_state_dict(self.net, state[0])
        torchopt.recover_state_dict(self.inner, state[1])
        return loss


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copied_learner_learns_rates_of_its_own(way):
    learner, data = Learner(), (batch(), batch())
    copied = copy.deepcopy(learner) if way == "deepcopy" else pickle.loads(pickle.dumps(learner))
    loss = copied(*data)
    close(loss, learner(*data))
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in copied.parameters())
    assert all(p.grad is None for p in learner.parameters())


def test_pickle_of_an_adapted_module_holds_leaf_parameters():
    net, data = mlp(), batch()
    torchopt.MetaAdam(net, lr=0.1).step(mse(net, data))
    loaded = pickle.loads(pickle.dumps(net))
    for p, q in zip(net.parameters(), loaded.parameters()):
        assert type(q) is nn.Parameter
        assert q.is_leaf
        assert torch.equal(p, q)
    mse(loaded, data).backward()
    assert loaded[0].weight.grad is not None


def test_pickle_of_module_and_optimizer_goes_on():
    net, data = mlp(), batch()
    optimizer = torchopt.MetaAdam(net, lr=0.1)
    optimizer.step(mse(net, data))
    twin, copied = pickle.loads(pickle.dumps((net, optimizer)))
    assert copied.param_groups[0]["params"] is twin
    copied.step(mse(twin, data))
    optimizer.step(mse(net, data))
    all_close(net.parameters(), twin.parameters())


def test_saved_state_dict_of_an_adapted_module_loads_into_a_fresh_one():
    net, data = mlp(), batch()
    torchopt.MetaAdam(net, lr=0.1).step(mse(net, data))
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    fresh = mlp()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    close(fresh(data[0]), net(data[0]))


@every_meta_case
def test_saved_state_of_the_optimizer_goes_on(case):
    net, data = mlp(), [batch() for _ in range(4)]
    optimizer = case.meta(net, **case.kwargs)
    for d in data[:2]:
        optimizer.step(mse(net, d))
    file = io.BytesIO()
    torch.save((net.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    twin = mlp()
    twin.load_state_dict(weights)
    resumed = case.meta(twin, **{**case.kwargs, "lr": 7.0})
    resumed.load_state_dict(state)
    assert resumed.param_groups[0]["lr"] == case.kwargs["lr"]
    for d in data[2:]:
        optimizer.step(mse(net, d))
        resumed.step(mse(twin, d))
    all_close(net.parameters(), twin.parameters())


def test_conversion_of_an_adapted_module_keeps_the_meta_gradient():
    net, support, query = mlp(), batch(), batch()
    start = list(net.parameters())
    expected = torch.autograd.grad(adapted_loss(net, torchopt.sgd(0.1), support, query)(), start)
    optimizer = torchopt.MetaSGD(net, lr=0.1)
    for _ in range(3):
        optimizer.step(mse(net, support))
    net.float()
    assert all(p.dtype == torch.float32 for p in net.parameters())
    found = torch.autograd.grad(mse(net, tuple(t.float() for t in query)), start)
    for g, e in zip(found, expected):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-5)


def test_conversion_after_stop_gradient_goes_on():
    net, data = mlp(), batch()
    optimizer = torchopt.MetaAdam(net, lr=0.1)
    optimizer.step(mse(net, data))
    torchopt.stop_gradient(net).float()
    single = tuple(t.float() for t in data)
    start = mse(net, single).item()
    optimizer = torchopt.MetaAdam(net, lr=0.02)
    for _ in range(5):
        optimizer.step(mse(net, single))
    assert mse(net, single) < start
    assert all(p.dtype == torch.float32 for p in net.parameters())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_of_an_adapted_module_is_silent(set_to_none):
    net, data = mlp(), batch()
    start = list(net.parameters())
    torchopt.MetaSGD(net, lr=0.1).step(mse(net, data))
    net.zero_grad(set_to_none)
    mse(net, data).backward()
    assert all(p.grad is not None for p in start)


def test_torch_compile_of_the_network_inside_an_inner_loop():
    net, support, query = mlp(), batch(), batch()
    start = list(net.parameters())
    expected = torch.autograd.grad(adapted_loss(net, torchopt.sgd(0.1), support, query)(), start)
    compiled = torch.compile(net, backend="eager")
    with torchopt.inner_loop(net, torchopt.sgd(0.1)) as inner:
        for _ in range(3):
            inner.step(mse(compiled, support))
        found = torch.autograd.grad(mse(compiled, query), start)
    all_close(found, expected)


def test_prints_say_what_it_is():
    net = mlp()
    optimizer = torchopt.MetaAdam(net, lr=0.25)
    text = repr(optimizer)
    assert text.startswith("MetaAdam(")
    assert "lr=0.25" in text
    optimizer.step(mse(net, batch()))
    (state,) = torchopt.extract_state_dict(optimizer)
    assert "step=1" in repr(state)
    assert "float64[4, 3] with graph" in repr(state)
    assert "\n" not in repr(state)


def test_print_shows_the_live_learning_rate():
    optimizer = torchopt.MetaSGD(mlp(), lr=0.25)
    optimizer.param_groups[0]["lr"] = 0.125
    assert "0.125" in repr(optimizer)
