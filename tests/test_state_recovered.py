"""``recover_state_dict``: what was extracted comes back, and nothing else is accepted."""

import copy

import pytest
import torch
from adapting import all_close, assert_unchanged, batch, mse, objects_of, snapshot
from extracting import Net, adapted, assert_same_tree, every_way
from torch import nn

import torchopt


pytestmark = pytest.mark.usefixtures("float64_by_default")


@every_way
def test_recovers_a_module_and_its_optimizer(by):
    net, optimizer, _ = adapted()
    data = batch()
    states = [torchopt.extract_state_dict(t, by=by, detach_buffers=t is net) for t in (net,)]
    states.append(torchopt.extract_state_dict(optimizer, by=by))
    optimizer.step(mse(net, data))
    expected = [p.detach().clone() for p in net.parameters()]
    for _ in range(2):
        for target, state in zip((net, optimizer), states):
            assert torchopt.recover_state_dict(target, state) is None
        assert torchopt.extract_state_dict(optimizer)[0].step == 2
        assert net.decode.weight is net.encode.weight
        assert net.decode.weight is states[0].params["encode.weight"]
        assert isinstance(net.head.weight, nn.Parameter)
        optimizer.step(mse(net, data))
        for p, e in zip(net.parameters(), expected):
            torch.testing.assert_close(p.data, e, rtol=1e-12, atol=1e-14)


def test_recovers_the_original_leaves():
    net, _, start = adapted()
    fresh = Net()
    state = torchopt.extract_state_dict(fresh)
    torchopt.MetaSGD(fresh, lr=0.1).step(mse(fresh, batch()))
    torchopt.recover_state_dict(fresh, state)
    assert all(p is state.params[n] for n, p in fresh.named_parameters())
    assert all(p.is_leaf for p in fresh.parameters())
    assert not fresh.head.bias.requires_grad
    assert len(start) == len(list(net.parameters()))


def test_recovers_into_another_module_of_the_same_structure():
    net, _, start = adapted()
    other, x = Net(), batch()[0]
    torchopt.recover_state_dict(other, torchopt.extract_state_dict(net, by="copy"))
    assert torch.equal(other.eval()(x), net.eval()(x))
    grads = torch.autograd.grad(other(x).square().sum(), [p for p in start if p.requires_grad])
    assert all(g.abs().max() > 0 for g in grads)


def test_recovers_a_recurrent_module():
    net, x = nn.LSTM(3, 4), torch.randn(5, 2, 3)
    output = net(x)[0].detach()
    state = torchopt.extract_state_dict(net, by="deepcopy")
    torchopt.MetaSGD(net, lr=1.0).step(net(x)[0].square().mean())
    torchopt.recover_state_dict(net, state)
    assert torch.equal(net(x)[0], output)


def test_recovers_an_optimizer_to_its_beginning():
    net, optimizer, _ = adapted()
    fresh = torchopt.extract_state_dict(torchopt.MetaAdam(Net(), lr=0.1))
    torchopt.recover_state_dict(optimizer, fresh)
    assert torchopt.extract_state_dict(optimizer)[0].step == 0
    twin = copy.deepcopy(net)
    data = batch()
    optimizer.step(mse(net, data))
    peer = torch.optim.Adam(twin.parameters(), lr=0.1)
    mse(twin, data).backward()
    peer.step()
    all_close(net.parameters(), twin.parameters())


def test_recovers_a_tree_in_place_and_returns_it():
    tree = {"a": [torch.ones(2), {"b": torch.zeros(3)}], "t": (torch.ones(1), [torch.ones(1)])}
    state = torchopt.extract_state_dict(tree, by="deepcopy")
    wanted = torchopt.extract_state_dict(tree, by="deepcopy")
    inner, listed = tree["a"][1], tree["t"][1]
    tree["a"][0].add_(1.0)
    inner["b"] = torch.full((3,), 7.0)
    listed[0] = torch.full((1,), 7.0)
    back = torchopt.recover_state_dict(tree, state)
    assert tree["a"][1] is inner
    assert tree["t"][1] is listed
    assert inner["b"] is state["a"][1]["b"]
    assert listed[0] is state["t"][1][0]
    for found in (back, {k: tree[k] for k in tree if k != "t"} | {"t": back["t"]}):
        assert_same_tree(found, wanted)


def test_recovers_a_functional_state():
    tx = torchopt.adam(0.1)
    params = {"w": torch.randn(3)}
    state = tx.init(params)
    _, state = tx.update({"w": torch.randn(3)}, state, params, inplace=False)
    kept = torchopt.extract_state_dict(state, by="deepcopy")
    wanted = kept.exp_avg["w"].clone()
    _, later = tx.update({"w": torch.randn(3)}, state, params, inplace=False)
    assert later.step == 2
    back = torchopt.recover_state_dict(later, kept)
    for s in (back, later):
        assert s.step == 1
        assert torch.equal(s.exp_avg["w"], wanted)


def test_states_inside_trees():
    tx = torchopt.adam(0.1)
    params = {"w": torch.randn(3, requires_grad=True)}
    everything = {"params": params, "opt": tx.init(params), "step": 4}
    kept = torchopt.extract_state_dict(everything, by="deepcopy")
    assert isinstance(kept["opt"], torchopt.OptState)
    assert kept["opt"].exp_avg["w"] is not everything["opt"].exp_avg["w"]
    for _ in range(2):
        grads = {"w": torch.randn(3)}
        updates, everything["opt"] = tx.update(grads, everything["opt"], params, inplace=False)
        everything["params"] = torchopt.apply_updates(everything["params"], updates, inplace=False)
    everything["step"] = 6
    torchopt.recover_state_dict(everything, kept)
    assert everything["opt"].step == 0
    assert everything["step"] == 4
    assert everything["params"]["w"] is kept["params"]["w"]
    assert torch.equal(everything["opt"].exp_avg["w"], torch.zeros(3))


class Pair(nn.Module):
    def __init__(self, first=3, second=2, bias=True, extra=False, norm=False):
        super().__init__()
        self.a = nn.Linear(3, first, bias=bias)
        self.b = nn.Linear(first, second)
        if extra:
            self.c = nn.Linear(2, 2)
        if norm:
            self.n = nn.BatchNorm1d(2)


STRANGERS = {
    "shape": ({"second": 5}, r"'b\.weight'.*\(5, 3\).*\(2, 3\)"),
    "missing": ({"bias": False}, r"'a\.bias' is missing"),
    "unexpected": ({"extra": True}, r"'c\.weight' was not expected"),
    "buffers": ({"norm": True}, r"'n\.(weight|running_mean)' was not expected"),
}


@every_way
@pytest.mark.parametrize("kind", STRANGERS)
def test_a_strangers_module_state_is_refused_and_nothing_changed(kind, by):
    options, message = STRANGERS[kind]
    net = Pair()
    before = snapshot(net)
    state = torchopt.extract_state_dict(Pair(**options), by=by)
    with pytest.raises(ValueError, match=message):
        torchopt.recover_state_dict(net, state)
    assert_unchanged(net, before)


def test_a_state_lacking_buffers_only_is_refused():
    net, other = nn.BatchNorm1d(2), nn.BatchNorm1d(2, track_running_stats=False)
    before = snapshot(other)
    with pytest.raises(ValueError, match="'running_mean' was not expected"):
        torchopt.recover_state_dict(other, torchopt.extract_state_dict(net))
    assert_unchanged(other, before)
    before = snapshot(net)
    with pytest.raises(ValueError, match="'running_mean' is missing"):
        torchopt.recover_state_dict(net, torchopt.extract_state_dict(other))
    assert_unchanged(net, before)


@pytest.mark.parametrize("kind", ["shape", "missing", "unexpected"])
def test_a_strangers_optimizer_state_is_refused_and_nothing_changed(kind):
    net, other, x = Pair(), Pair(**STRANGERS[kind][0]), torch.randn(4, 3)
    optimizer, stranger = torchopt.MetaAdam(net), torchopt.MetaAdam(other)
    for opt, module in ((optimizer, net), (stranger, other)):
        out = module.b(module.a(x))
        opt.step((module.c(out) if hasattr(module, "c") else out).square().mean())
    before, (own,) = snapshot(net), torchopt.extract_state_dict(optimizer)
    name = {"shape": r"b\.weight", "missing": r"a\.bias", "unexpected": r"c\.weight"}[kind]
    with pytest.raises(ValueError, match=name):
        torchopt.recover_state_dict(optimizer, torchopt.extract_state_dict(stranger))
    assert_unchanged(net, before)
    (after,) = torchopt.extract_state_dict(optimizer)
    assert after.step == own.step
    assert all(after.exp_avg[n] is t for n, t in own.exp_avg.items())


def test_the_state_of_another_rule_is_refused():
    net, optimizer, _ = adapted()
    fresh = torchopt.MetaRMSProp(Net())
    state = torchopt.extract_state_dict(optimizer)
    for target, other, message in (
        (torchopt.MetaSGD(net, momentum=0.9), state, r"another optimizer.*exp_avg"),
        (torchopt.MetaAdam(Net()), torchopt.extract_state_dict(fresh), "another optimizer"),
        (optimizer, state * 2, "groups"),
    ):
        with pytest.raises(ValueError, match=message):
            torchopt.recover_state_dict(target, other)


def test_a_truncated_optimizer_state_is_refused():
    _, optimizer, _ = adapted()
    (own,) = torchopt.extract_state_dict(optimizer)
    for slot in ("exp_avg", "exp_avg_sq"):
        for drop in ("encode.weight", "norm.bias"):
            slots = {s: dict(c) for s, c in own.slots.items()}
            del slots[slot][drop]
            with pytest.raises(ValueError, match=drop.replace(".", r"\.")):
                torchopt.recover_state_dict(optimizer, (torchopt.OptState(own.step, slots),))
    (after,) = torchopt.extract_state_dict(optimizer)
    assert after.exp_avg == own.exp_avg


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["a"].append(torch.ones(1)), r"'a\.1' was not expected"),
        (lambda s: s["a"].clear(), r"'a\.0' is missing"),
        (lambda s: s.pop("b"), r"'b\.c' is missing"),
        (lambda s: s.update(z=torch.ones(1)), "'z' was not expected"),
        (lambda s: s["b"].update(c=torch.ones(4)), r"'b\.c'.*\(4,\).*\(3,\)"),
        (lambda s: s["b"].update(c=1.0), r"'b\.c'.*float.*Tensor"),
        (lambda s: s["b"].update(c=None), r"'b\.c'.*NoneType.*Tensor"),
    ],
    ids=["longer", "shorter", "missing_key", "new_key", "shape", "number", "none"],
)
def test_a_tree_of_another_structure_is_refused_and_nothing_changed(change, message):
    target = {"a": [torch.ones(2)], "b": {"c": torch.zeros(3)}}
    objects = target["a"][0], target["b"]["c"]
    state = torchopt.extract_state_dict(target, by="deepcopy")
    change(state)
    with pytest.raises(ValueError, match=message):
        torchopt.recover_state_dict(target, state)
    assert target["a"][0] is objects[0]
    assert target["b"]["c"] is objects[1]
    assert len(target) == 2
    assert len(target["a"]) == 1


@pytest.mark.parametrize("state", [None, {}, [], (), 3, "state"], ids=repr)
def test_garbage_is_refused_by_modules_and_optimizers(state):
    net, optimizer, _ = adapted()
    before = snapshot(net)
    (own,) = torchopt.extract_state_dict(optimizer)
    for target in (net, optimizer):
        with pytest.raises((TypeError, ValueError)):
            torchopt.recover_state_dict(target, state)
    assert_unchanged(net, before)
    (after,) = torchopt.extract_state_dict(optimizer)
    assert after.step == own.step
    assert after.exp_avg == own.exp_avg


def test_a_state_of_before_a_conversion_comes_back():
    """Another dtype is no other structure: going back to before ``net.float()`` is legitimate."""
    net = Pair(norm=True)
    state = torchopt.extract_state_dict(net)
    own = dict(objects_of(net))
    kept = torchopt.extract_state_dict(net, by="deepcopy")
    torchopt.recover_state_dict(net, torchopt.extract_state_dict(copy.deepcopy(net).float()))
    assert all(p.dtype == torch.float32 for p in net.parameters())
    torchopt.recover_state_dict(net, state)
    for name, tensor in objects_of(net):
        assert tensor is own[name]
        assert torch.equal(tensor, {**kept.params, **kept.buffers}[name])
