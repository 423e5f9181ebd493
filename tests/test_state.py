"""State at hand: extract_state_dict, recover_state_dict, stop_gradient, module_clone."""

import copy
from collections import OrderedDict, namedtuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils import _pytree

import torchopt


@pytest.fixture(autouse=True)
def _double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(2)
    yield
    torch.set_default_dtype(before)


class Net(nn.Module):
    """Tied weights, a frozen bias, BatchNorm buffers, a buffer that is ``None``."""

    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(3, 3)
        self.decode = nn.Linear(3, 3)
        self.decode.weight = self.encode.weight
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 2)
        self.head.bias.requires_grad_(False)
        self.register_buffer("nothing", None)

    def forward(self, x):
        x = torch.tanh(self.decode(torch.tanh(self.encode(x))))
        return self.head(self.norm(x))


def batch(n=6):
    return torch.randn(n, 3), torch.randn(n, 2)


def mse(net, data):
    return (net(data[0]) - data[1]).square().mean()


def objects_of(net):
    return [*net.named_parameters(remove_duplicate=False), *net.named_buffers()]


def snapshot(net):
    return [(n, t, t.detach().clone()) for n, t in objects_of(net)]


def assert_unchanged(net, before):
    now = objects_of(net)
    assert [n for n, _ in now] == [n for n, _, _ in before]
    for (_, t), (name, original, bits) in zip(now, before):
        assert t is original, name
        assert torch.equal(t, bits), name


def adapted(recipe=torchopt.MetaAdam):
    """Return a network after two steps, its optimizer and its initial parameters."""
    net = Net()
    start = list(net.parameters())
    optimizer = recipe(net, lr=0.1)
    data = batch()
    for _ in range(2):
        optimizer.step(mse(net, data))
    return net, optimizer, start


def leaves_of(state):
    return [t for t in _pytree.tree_leaves(state) if isinstance(t, torch.Tensor)]


SPELLINGS = {
    "reference": ["reference", "ref"],
    "copy": ["copy", "clone"],
    "deepcopy": ["deepcopy", "deepclone"],
}
every_spelling = pytest.mark.parametrize(
    ("by", "spelling"), [(by, s) for by, all_ in SPELLINGS.items() for s in all_]
)
every_way = pytest.mark.parametrize("by", SPELLINGS)


# Extracting -------------------------------------------------------------------------------------


@every_spelling
def test_extracts_a_module(by, spelling):
    net, _, start = adapted()
    own = dict(objects_of(net))
    state = torchopt.extract_state_dict(net, by=spelling)
    assert isinstance(state, torchopt.ModuleState)
    assert {**state.params, **state.buffers}.keys() == own.keys()
    assert state.params["decode.weight"] is state.params["encode.weight"]
    for name, tensor in {**state.params, **state.buffers}.items():
        assert torch.equal(tensor, own[name])
        assert tensor.requires_grad == own[name].requires_grad
        assert (tensor is own[name]) == (by == "reference")
    weight = state.params["encode.weight"]
    if by == "deepcopy":
        assert weight.is_leaf
        assert isinstance(weight, nn.Parameter)
    else:
        (grad,) = torch.autograd.grad(weight.square().sum(), start[0])
        assert grad.abs().max() > 0


@every_spelling
def test_extracts_an_optimizer(by, spelling):
    _, optimizer, start = adapted()
    (own,) = torchopt.extract_state_dict(optimizer)
    (state,) = torchopt.extract_state_dict(optimizer, by=spelling)
    assert isinstance(state, torchopt.OptState)
    assert state.step == own.step == 2
    assert set(state.exp_avg) == {n for n, p in Net().named_parameters() if p.requires_grad}
    for slot, column in own.slots.items():
        for name, tensor in column.items():
            other = state.slots[slot][name]
            assert torch.equal(other, tensor)
            assert (other is tensor) == (by == "reference")
    moment = state.exp_avg["encode.weight"]
    if by == "deepcopy":
        assert moment.is_leaf
    else:
        (grad,) = torch.autograd.grad(moment.square().sum(), start[0])
        assert grad.abs().max() > 0


@every_spelling
def test_extracts_a_tree(by, spelling):
    leaf = torch.randn(3, requires_grad=True)
    tree = {"a": [leaf, leaf * 2], "b": (leaf, None, 3)}
    state = torchopt.extract_state_dict(tree, by=spelling)
    assert type(state["b"]) is tuple
    assert state["b"][1:] == (None, 3)
    assert state["a"][0] is state["b"][0]
    assert (state["a"][0] is leaf) == (by == "reference")
    assert torch.equal(state["a"][1], tree["a"][1])
    assert state["a"][0].requires_grad
    if by == "deepcopy":
        assert state["a"][1].is_leaf
    else:
        assert torch.autograd.grad(state["a"][1].sum() + state["a"][0].sum(), leaf)[0].eq(3).all()


def test_copies_are_independent_in_memory():
    net = Net()
    for by in ("copy", "deepcopy"):
        state = torchopt.extract_state_dict(net, by=by)
        own = dict(objects_of(net))
        for name, tensor in {**state.params, **state.buffers}.items():
            assert tensor.data_ptr() != own[name].data_ptr()


@every_way
def test_device(by):
    net, optimizer, _ = adapted()
    for target in (net, optimizer, dict(net.named_parameters())):
        here = torchopt.extract_state_dict(target, by=by, device="cpu")
        there = torchopt.extract_state_dict(target, by=by, device="meta")
        assert leaves_of(here)
        assert all(t.device.type == "cpu" for t in leaves_of(here))
        assert all(t.device.type == "meta" for t in leaves_of(there))
    there = torchopt.extract_state_dict(net, by=by, device=torch.device("meta"))
    assert there.params["decode.weight"] is there.params["encode.weight"]
    assert [p.requires_grad for p in there.params.values()] == [
        p.requires_grad for _, p in net.named_parameters(remove_duplicate=False)
    ]
    if by == "reference":
        same = torchopt.extract_state_dict(net, device="cpu")
        assert same.params["head.weight"] is net.head.weight


def test_device_of_module_clone():
    net = Net()
    clone = torchopt.module_clone(net, by="deepcopy", device="meta")
    assert all(t.device.type == "meta" for _, t in objects_of(clone))
    assert all(isinstance(p, nn.Parameter) for p in clone.parameters())
    assert all(t.device.type == "cpu" for _, t in objects_of(net))


@every_way
def test_without_buffers(by):
    net = Net()
    state = torchopt.extract_state_dict(net, by=by, with_buffers=False)
    assert not state.buffers
    buffers = list(net.buffers())
    net(batch()[0])
    moved = [b.clone() for b in buffers]
    torchopt.recover_state_dict(net, state)
    assert all(b is c for b, c in zip(net.buffers(), buffers))
    assert all(torch.equal(b, m) for b, m in zip(net.buffers(), moved))


@every_way
def test_detached_buffers_stay_pristine_at_every_recovery(by):
    net = Net()
    pristine = {n: b.clone() for n, b in net.named_buffers()}
    state = torchopt.extract_state_dict(net, by=by, detach_buffers=True)
    for _ in range(3):
        net(batch()[0])
        assert net.norm.num_batches_tracked == 1
        assert not torch.equal(net.norm.running_mean, pristine["norm.running_mean"])
        torchopt.recover_state_dict(net, state)
        for name, buffer in net.named_buffers():
            assert torch.equal(buffer, pristine[name])
            assert buffer is not state.buffers[name]


def test_buffers_by_reference_follow_the_module():
    """Documented: only the tensors are kept, and BatchNorm updates them in place."""
    net = Net()
    state = torchopt.extract_state_dict(net)
    net(batch()[0])
    torchopt.recover_state_dict(net, state)
    assert net.norm.num_batches_tracked == 1


def test_a_copied_state_recovers_more_than_once():
    """What a recovered module does in place must not reach a state that was copied."""
    net = Net()
    for by in ("copy", "deepcopy"):
        state = torchopt.extract_state_dict(net, by=by, detach_buffers=True)
        wanted = {n: t.detach().clone() for n, t in {**state.params, **state.buffers}.items()}
        for _ in range(2):
            torchopt.recover_state_dict(net, state)
            optimizer = torchopt.MetaSGD(net, lr=0.1)
            optimizer.step(mse(net, batch()))
        torchopt.recover_state_dict(net, state)
        for name, tensor in objects_of(net):
            assert torch.equal(tensor, wanted[name])


@pytest.mark.parametrize("by", ["shallow", "", "Reference", None, 1])
@pytest.mark.parametrize("function", [torchopt.extract_state_dict, torchopt.module_clone])
def test_another_word_is_refused(function, by):
    for target in (Net(), torchopt.MetaSGD(Net()), {"a": torch.ones(2)}):
        with pytest.raises(ValueError, match="'reference', 'copy' or 'deepcopy'"):
            function(target, by=by)


# Recovering -------------------------------------------------------------------------------------


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
    for p, q in zip(net.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


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
    _, stranger, _ = adapted(torchopt.MetaRMSProp)
    with pytest.raises(ValueError, match=r"another optimizer.*square_avg"):
        torchopt.recover_state_dict(optimizer, torchopt.extract_state_dict(stranger))
    with pytest.raises(ValueError, match=r"another optimizer.*exp_avg"):
        torchopt.recover_state_dict(
            torchopt.MetaSGD(net, momentum=0.9), torchopt.extract_state_dict(optimizer)
        )
    with pytest.raises(ValueError, match="groups"):
        torchopt.recover_state_dict(optimizer, torchopt.extract_state_dict(optimizer) * 2)


def test_a_fresh_state_of_another_rule_is_refused():
    with pytest.raises(ValueError, match="another optimizer"):
        torchopt.recover_state_dict(
            torchopt.MetaAdam(Net()), torchopt.extract_state_dict(torchopt.MetaRMSProp(Net()))
        )


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


# Cutting the graph ------------------------------------------------------------------------------


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


# Clones -----------------------------------------------------------------------------------------


@every_spelling
@pytest.mark.parametrize("when", ["fresh", "adapted"])
def test_module_clone(when, by, spelling):
    net, start = Net(), None
    if when == "adapted":
        net, _, start = adapted()
    net.eval()
    clone, x = torchopt.module_clone(net, by=spelling), batch()[0]
    assert type(clone) is Net
    assert clone is not net
    assert not clone.training
    assert clone.decode.weight is clone.encode.weight
    for (_, t), (_, c) in zip(objects_of(net), objects_of(clone)):
        assert torch.equal(t, c)
        assert t.requires_grad == c.requires_grad
        assert (t is c) == (by == "reference")
    assert torch.equal(clone(x), net(x))
    if by == "deepcopy":
        assert all(p.is_leaf for p in clone.parameters())
    elif when == "adapted":
        trainable = [p for p in start if p.requires_grad]
        grads = torch.autograd.grad(clone(x).square().sum(), trainable)
        assert all(g.abs().max() > 0 for g in grads)
    before = snapshot(net)
    torchopt.MetaSGD(clone, lr=0.1).step(mse(clone, batch()))
    assert_unchanged(net, before)
    assert clone.encode.weight is not net.encode.weight


def test_module_clone_with_buffers_of_its_own():
    net = Net()
    clone = torchopt.module_clone(net, detach_buffers=True)
    assert clone.encode.weight is net.encode.weight
    clone(batch()[0])
    assert clone.norm.num_batches_tracked == 1
    assert net.norm.num_batches_tracked == 0


@every_way
def test_clone_of_an_optimizer_goes_on_by_itself(by):
    net, optimizer, start = adapted()
    clone, data = torchopt.module_clone(optimizer, by=by), batch()
    assert type(clone) is torchopt.MetaAdam
    twin = clone.param_groups[0]["params"]
    assert twin is not net
    before = snapshot(net)
    (own,) = torchopt.extract_state_dict(optimizer)
    net.eval()
    twin.eval()
    clone.step(mse(twin, data))
    assert_unchanged(net, before)
    assert torchopt.extract_state_dict(optimizer)[0].step == own.step == 2
    assert torchopt.extract_state_dict(clone)[0].step == 3
    optimizer.step(mse(net, data))
    for p, q in zip(net.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
    trainable = [p for p in start if p.requires_grad]
    if by != "deepcopy":
        grads = torch.autograd.grad(mse(twin, data), trainable)
        assert all(g.abs().max() > 0 for g in grads)


def test_clone_of_an_optimizer_has_groups_of_its_own():
    optimizer = torchopt.MetaAdam(Net(), lr=0.1)
    clone = torchopt.module_clone(optimizer)
    clone.param_groups[0]["lr"] = 0.5
    clone.add_param_group(nn.Linear(2, 2))
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert len(optimizer.param_groups) == 1


@every_way
def test_clone_of_a_tree(by):
    leaf = torch.randn(3, requires_grad=True)
    tree = {"a": leaf, "b": [leaf * 2]}
    clone = torchopt.module_clone(tree, by=by)
    assert clone is not tree
    assert torch.equal(clone["b"][0], tree["b"][0])
    assert (clone["a"] is leaf) == (by == "reference")


# Properties over random trees -------------------------------------------------------------------


Point = namedtuple("Point", "x y")


def tensors():
    shapes = st.sampled_from([(), (1,), (3,), (2, 2)])
    dtypes = st.sampled_from([torch.float64, torch.float32, torch.int64])

    @st.composite
    def build(draw):
        shape, dtype = draw(shapes), draw(dtypes)
        values = torch.tensor(
            [draw(st.integers(1, 9)) for _ in range(int(torch.Size(shape).numel()))]
        )
        tensor = values.reshape(shape).to(dtype)
        if dtype.is_floating_point:
            tensor.requires_grad_(draw(st.booleans()))
        return tensor

    return build()


def containers(children):
    keys = st.sampled_from(["a", "b", "weight", "0"])
    return st.one_of(
        st.lists(children, max_size=3),
        st.lists(children, max_size=3).map(tuple),
        st.dictionaries(keys, children, max_size=3),
        st.dictionaries(keys, children, max_size=3).map(OrderedDict),
        st.builds(Point, children, children),
        st.builds(
            lambda step, slots: torchopt.OptState(step, slots),
            st.integers(0, 9),
            st.dictionaries(st.sampled_from(["exp_avg", "buffer"]), children, max_size=2),
        ),
    )


trees = st.recursive(
    st.one_of(tensors(), tensors(), st.none(), st.integers(0, 9)), containers, max_leaves=8
)
quick = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def assert_same_tree(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert a.requires_grad == b.requires_grad
        assert torch.equal(a, b)
    elif isinstance(a, torchopt.OptState):
        assert a.step == b.step
        assert_same_tree(a.slots, b.slots)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_tree(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same_tree(x, y)
    else:
        assert a == b


def change(tree):
    """Replace what is in mutable containers and change every tensor in place."""
    if isinstance(tree, torch.Tensor):
        with torch.no_grad():
            tree.add_(1)
    elif isinstance(tree, torchopt.OptState):
        tree.step = tree.step + 1
        change(tree.slots)
    elif isinstance(tree, dict):
        for value in tree.values():
            change(value)
        for key, value in tree.items():
            if isinstance(value, torch.Tensor):
                tree[key] = value.detach() * 3
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            change(value)


@quick
@given(tree=trees, by=st.sampled_from(["copy", "deepcopy", "clone", "deepclone"]))
def test_round_trip_of_random_trees(tree, by):
    wanted = torchopt.extract_state_dict(tree, by="deepcopy")
    state = torchopt.extract_state_dict(tree, by=by)
    assert_same_tree(state, wanted)
    change(tree)
    assert_same_tree(state, wanted)
    back = torchopt.recover_state_dict(tree, state)
    assert_same_tree(back, wanted)
    assert_same_tree(torchopt.extract_state_dict(back), wanted)


@quick
@given(tree=trees)
def test_by_reference_keeps_every_object(tree):
    found = torchopt.extract_state_dict(tree)
    ours, theirs = leaves_of(tree), leaves_of(found)
    assert len(ours) == len(theirs)
    assert all(a is b for a, b in zip(ours, theirs))
    assert_same_tree(found, tree)


@quick
@given(tree=trees)
def test_stop_gradient_of_random_trees_keeps_values(tree):
    moved = torchopt.extract_state_dict(tree, by="copy")
    wanted = torchopt.extract_state_dict(tree, by="deepcopy")
    assert torchopt.stop_gradient(moved) is moved
    assert all(t.grad_fn is None for t in leaves_of(moved))
    assert_same_tree(moved, wanted)


@quick
@given(tree=trees, other=trees)
def test_a_random_tree_of_another_structure_is_refused(tree, other):
    def outline(value):
        if isinstance(value, torch.Tensor):
            return tuple(value.shape)
        if isinstance(value, torchopt.OptState):
            return {slot: outline(v) for slot, v in value.slots.items()}
        if isinstance(value, dict):
            return {key: outline(v) for key, v in value.items()}
        if isinstance(value, Point):
            return {"x": outline(value.x), "y": outline(value.y)}
        if isinstance(value, (list, tuple)):
            return {str(k): outline(v) for k, v in enumerate(value)}
        return "value"

    def paths(value):
        if not isinstance(value, dict):
            return {(): value}
        return {(k, *p): leaf for k, v in value.items() for p, leaf in paths(v).items()}

    if paths(outline(tree)) == paths(outline(other)):
        return
    wanted = torchopt.extract_state_dict(tree, by="deepcopy")
    with pytest.raises((ValueError, TypeError)):
        torchopt.recover_state_dict(tree, other)
    assert_same_tree(tree, wanted)
