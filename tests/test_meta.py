"""The differentiable face: MetaOptimizer and the named Meta classes."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.func import functional_call

import torchopt
from torchopt import schedules


OPTIMIZERS = {
    "sgd": (torchopt.MetaSGD, torchopt.sgd, torch.optim.SGD, {"lr": 0.1}),
    "momentum": (
        torchopt.MetaSGD,
        torchopt.sgd,
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.01},
    ),
    "adam": (torchopt.MetaAdam, torchopt.adam, torch.optim.Adam, {"lr": 0.05}),
    "adamw": (
        torchopt.MetaAdamW,
        torchopt.adamw,
        torch.optim.AdamW,
        {"lr": 0.05, "weight_decay": 0.1, "amsgrad": True},
    ),
    "rmsprop": (
        torchopt.MetaRMSProp,
        torchopt.rmsprop,
        torch.optim.RMSprop,
        {"lr": 0.01, "momentum": 0.5, "centered": True},
    ),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


@pytest.fixture(autouse=True)
def _double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


def mlp():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def batch(n=6):
    return torch.randn(n, 3), torch.randn(n, 2)


def mse(net, data):
    return (net(data[0]) - data[1]).square().mean()


def graph_size(*tensors):
    """Count the nodes of the graph behind tensors."""
    seen, todo = set(), [t.grad_fn for t in tensors if t.grad_fn is not None]
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions if parent is not None]
    return len(seen)


def close(a, b, rtol=1e-12):
    torch.testing.assert_close(a, b, rtol=rtol, atol=1e-14)


def assert_derivative(function, tensors, step=1e-5):
    """Compare the gradient of ``function()`` along a random direction with central differences.

    Of fourth order, so that neither their truncation nor rounding shows.
    """
    directions = [torch.randn_like(t) for t in tensors]
    grads = torch.autograd.grad(function(), tensors)
    slope = sum((g * d).sum() for g, d in zip(grads, directions))
    total, start = 0.0, [t.detach().clone() for t in tensors]
    for shift, weight in ((1, 8), (-1, -8), (2, -1), (-2, 1)):
        with torch.no_grad():
            for t, s, d in zip(tensors, start, directions):
                t.copy_(s + shift * step * d)
        total += weight * function().detach()
    with torch.no_grad():
        for t, s in zip(tensors, start):
            t.copy_(s)
    expected = total / (12 * step)
    assert slope.abs() > 1e-7, "a slope of zero would be right by accident"
    torch.testing.assert_close(slope, expected, rtol=1e-6, atol=1e-10)


def adapted_loss(net, tx, support, query, steps=3, loss=mse):
    """Return a function that adapts ``net`` anew and gives the outer loss."""

    def run():
        with torchopt.inner_loop(net, tx) as inner:
            for _ in range(steps):
                inner.step(loss(net, support))
            return loss(net, query)

    return run


# New tensors, connected to the graph ------------------------------------------------------------


@every_optimizer
def test_step_puts_new_connected_tensors_into_the_module(name):
    cls, _, _, options = OPTIMIZERS[name]
    net, data = mlp(), batch()
    before = dict(net.named_parameters())
    values = {n: p.detach().clone() for n, p in before.items()}
    optimizer = cls(net, **options)
    assert optimizer.step(mse(net, data)) is None
    after = dict(net.named_parameters())
    assert after.keys() == before.keys()
    for n in before:
        assert after[n] is not before[n]
        assert after[n].grad_fn is not None
        assert isinstance(after[n], nn.Parameter)
        assert torch.equal(before[n], values[n])
        assert not torch.equal(after[n], values[n])
    for g in torch.autograd.grad(mse(net, batch()), list(before.values())):
        assert torch.isfinite(g).all()
        assert g.abs().max() > 0


@every_optimizer
def test_equals_the_functional_face(name):
    cls, recipe, _, options = OPTIMIZERS[name]
    net, support, query = mlp(), [batch() for _ in range(4)], batch()
    start = dict(net.named_parameters())
    params, tx = dict(start), recipe(**options)
    state = tx.init(params)
    for x, y in support:
        loss = (functional_call(net, params, x) - y).square().mean()
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        updates, state = tx.update(dict(zip(params, grads)), state, params, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)
    outer = (functional_call(net, params, query[0]) - query[1]).square().mean()
    expected = torch.autograd.grad(outer, list(start.values()))

    optimizer = cls(net, **options)
    for data in support:
        optimizer.step(mse(net, data))
    for n, p in net.named_parameters():
        assert torch.equal(p, params[n])
    found = torch.autograd.grad(mse(net, query), list(start.values()))
    for g, e in zip(found, expected):
        close(g, e)
    (own,) = torchopt.extract_state_dict(optimizer)
    assert own.step == state.step == 4
    assert own.slots.keys() == state.slots.keys()
    for slot, column in state.slots.items():
        for n in params:
            assert torch.equal(own.slots[slot][n], column[n])


@every_optimizer
def test_values_of_torch_optim(name):
    cls, _, peer_cls, options = OPTIMIZERS[name]
    net = mlp()
    twin = copy.deepcopy(net)
    optimizer, peer = cls(net, **options), peer_cls(twin.parameters(), **options)
    for _ in range(10):
        data = batch()
        optimizer.step(mse(net, data))
        peer.zero_grad()
        mse(twin, data).backward()
        peer.step()
    for p, q in zip(net.parameters(), twin.parameters()):
        close(p, q.data)


@every_optimizer
def test_meta_gradient_against_central_differences(name):
    _, recipe, _, options = OPTIMIZERS[name]
    net = mlp()
    function = adapted_loss(net, recipe(**options), batch(), batch())
    assert_derivative(function, list(net.parameters()))


def test_outer_backward_accumulates_into_the_original_parameters():
    net, tasks = mlp(), [(batch(), batch()) for _ in range(2)]
    start = list(net.parameters())
    expected = [torch.zeros_like(p) for p in start]
    for support, query in tasks:
        loss = adapted_loss(net, torchopt.sgd(0.1), support, query)()
        expected = [e + g for e, g in zip(expected, torch.autograd.grad(loss, start))]
    for support, query in tasks:
        with torchopt.inner_loop(net, torchopt.sgd(0.1)) as inner:
            for _ in range(3):
                inner.step(mse(net, support))
            mse(net, query).backward()
    for p, e in zip(start, expected):
        close(p.grad, e)
    net.zero_grad()
    assert all(p.grad is None for p in start)


def test_step_leaves_grad_fields_alone():
    net, data = mlp(), batch()
    start = list(net.parameters())
    torchopt.MetaAdam(net).step(mse(net, data))
    assert all(p.grad is None for p in start)


# Tied, frozen and untouched parameters ----------------------------------------------------------


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(3, 3)
        self.decode = nn.Linear(3, 3)
        self.decode.weight = self.encode.weight
        self.again = self.encode
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.again(torch.tanh(self.decode(torch.tanh(self.encode(x))))))


@every_optimizer
def test_tied_weights_stay_tied_and_count_once(name):
    cls, _, peer_cls, options = OPTIMIZERS[name]
    net = Tied()
    twin = copy.deepcopy(net)
    optimizer, peer = cls(net, **options), peer_cls(twin.parameters(), **options)
    for _ in range(3):
        data = batch()
        optimizer.step(mse(net, data))
        peer.zero_grad()
        mse(twin, data).backward()
        peer.step()
        assert net.encode.weight is net.decode.weight
        assert net.again.bias is net.encode.bias
    for p, q in zip(net.parameters(), twin.parameters()):
        close(p, q.data)
    (state,) = torchopt.extract_state_dict(optimizer)
    for column in state.slots.values():
        assert set(column) == set(dict(net.named_parameters()))


def test_tied_weights_meta_gradient_against_central_differences():
    net = Tied()
    function = adapted_loss(net, torchopt.adam(0.05), batch(), batch())
    assert_derivative(function, list(net.parameters()))


@every_optimizer
def test_frozen_parameters_stay_the_same_objects(name):
    cls, _, _, options = OPTIMIZERS[name]
    net, data = mlp(), batch()
    net[0].weight.requires_grad_(False)
    frozen, bits = net[0].weight, net[0].weight.clone()
    bias = net[0].bias
    optimizer = cls(net, **options)
    for _ in range(2):
        optimizer.step(mse(net, data))
    assert net[0].weight is frozen
    assert torch.equal(frozen, bits)
    assert not frozen.requires_grad
    assert net[0].bias is not bias


@every_optimizer
def test_a_parameter_unfrozen_later_starts_its_own_count(name):
    cls, _, peer_cls, options = OPTIMIZERS[name]
    net = mlp()
    net[0].weight.requires_grad_(False)
    twin = copy.deepcopy(net)
    optimizer, peer = cls(net, **options), peer_cls(twin.parameters(), **options)
    for k in range(5):
        if k == 2:
            net[0].weight.requires_grad_(True)
            twin[0].weight.requires_grad_(True)
        data = batch()
        optimizer.step(mse(net, data))
        peer.zero_grad()
        mse(twin, data).backward()
        peer.step()
    for p, q in zip(net.parameters(), twin.parameters()):
        close(p, q.data)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.heads = nn.ModuleDict({"a": nn.Linear(4, 2), "b": nn.Linear(4, 2)})

    def forward(self, x, head):
        return self.heads[head](torch.tanh(self.body(x)))


@every_optimizer
def test_parameters_the_loss_does_not_touch_are_untouched_and_right_later(name):
    cls, _, peer_cls, options = OPTIMIZERS[name]
    net = TwoHeads()
    twin = copy.deepcopy(net)
    optimizer, peer = cls(net, **options), peer_cls(twin.parameters(), **options)
    for k, head in enumerate("aaabab"):
        idle = {"a": "b", "b": "a"}[head]
        objects = dict(net.heads[idle].named_parameters())
        bits = {n: p.detach().clone() for n, p in objects.items()}
        slots = _slots_of(optimizer, f"heads.{idle}.weight")
        x, y = batch()
        optimizer.step((net(x, head) - y).square().mean())
        peer.zero_grad()
        (twin(x, head) - y).square().mean().backward()
        peer.step()
        for n, p in net.heads[idle].named_parameters():
            assert p is objects[n]
            assert torch.equal(p, bits[n])
        if k:
            now = _slots_of(optimizer, f"heads.{idle}.weight")
            assert now.keys() == slots.keys()
            assert all(now[s] is slots[s] for s in slots)
    for (n, p), q in zip(net.named_parameters(), twin.parameters()):
        close(p, q.data)
        assert _count(optimizer, n) == {"a": 4, "b": 2}.get(n.split(".")[1], 6)


def _slots_of(optimizer, name):
    (state,) = torchopt.extract_state_dict(optimizer)
    return {slot: column.get(name) for slot, column in state.slots.items()}


def _count(optimizer, name):
    (state,) = torchopt.extract_state_dict(optimizer)
    return state.step[name] if isinstance(state.step, dict) else state.step


# Modules with a mind of their own ---------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.rnn = kind(3, 4, batch_first=True, **options)
        width = options.get("proj_size", 0) or 4
        self.head = nn.Linear(width * (2 if options.get("bidirectional") else 1), 2)

    def forward(self, x):
        return self.head(self.rnn(x.unsqueeze(1).expand(-1, 3, -1))[0][:, -1])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attend = nn.MultiheadAttention(3, 1, batch_first=True)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        x = x.unsqueeze(0)
        return self.head(self.attend(x, x, x, need_weights=True)[0][0])


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ParameterList([torch.randn(3, 3), torch.randn(3, 2)])
        self.shifts = nn.ParameterDict({"first": torch.randn(3), "last": torch.randn(2)})

    def forward(self, x):
        x = torch.tanh(x @ self.layers[0] + self.shifts["first"])
        return x @ self.layers[1] + self.shifts["last"]


class UnitRows(nn.Module):
    """Weight normalisation in plain operations.

    That of ``torch.nn.utils.parametrizations`` has a wrong second derivative in torch 2.13 (it
    takes the norm as a constant; ``gradgradcheck`` of ``torch._weight_norm`` fails).
    """

    def forward(self, direction, scale):
        return scale * direction / direction.square().sum(1, keepdim=True).sqrt()

    def right_inverse(self, weight):
        return weight, weight.square().sum(1, keepdim=True).sqrt()


def normalised():
    net = mlp()
    nn.utils.parametrize.register_parametrization(net[0], "weight", UnitRows())
    return net


MODULES = {
    "lstm": lambda: Recurrent(nn.LSTM),
    "lstm_two_layers_both_ways": lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True),
    "lstm_projected": lambda: Recurrent(nn.LSTM, proj_size=2),
    "gru": lambda: Recurrent(nn.GRU),
    "rnn": lambda: Recurrent(nn.RNN),
    "attention": Attention,
    "weight_norm": lambda: nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)
    ),
    "spectral_norm": lambda: nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)
    ),
    "parametrization": normalised,
    "parameter_list_and_dict": Listed,
    "layer_norm": lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)),
    "batch_norm": lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)),
}
every_module = pytest.mark.parametrize("kind", MODULES)


@every_module
def test_module_computes_with_the_new_weights(kind):
    net, data = MODULES[kind](), batch()
    twin = copy.deepcopy(net)
    if kind == "spectral_norm":  # its buffers move at every use in training
        net.eval()
        twin.eval()
    before = net(data[0]).detach()
    optimizer = torchopt.MetaAdam(net, lr=0.1)
    for _ in range(2):
        optimizer.step(mse(net, data))
    found = net(data[0])
    twin.load_state_dict(net.state_dict())
    close(found, twin(data[0]).data)
    assert (found - before).abs().max() > 1e-3


@every_module
def test_module_meta_gradient_against_central_differences(kind):
    net = MODULES[kind]()
    if kind == "spectral_norm":
        net.eval()
    # a bias before BatchNorm has gradient zero: Adam would only amplify its rounding errors
    function = adapted_loss(net, torchopt.sgd(0.1, momentum=0.5), batch(), batch(), steps=2)
    if kind == "weight_norm":  # see UnitRows: only its first derivative can be compared
        net[0].requires_grad_(False)
    assert_derivative(function, [p for p in net.parameters() if p.requires_grad])


def test_transformer_layer_in_eval_mode_uses_the_new_weights_without_grad():
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True).eval()
    twin = copy.deepcopy(layer)
    x = torch.randn(2, 5, 4)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        torchopt.MetaSGD(layer, lr=0.5).step(layer(x).square().mean())
    twin.load_state_dict(layer.state_dict())
    with torch.no_grad():  # the fused inference path reads the weights by itself
        close(layer(x), twin(x), rtol=1e-10)
        assert not torch.allclose(layer(x), x)


def test_batch_norm_buffers_move_as_with_torch_optim():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    twin, buffer = copy.deepcopy(net), net[1].running_mean
    optimizer, peer = torchopt.MetaSGD(net, lr=0.1), torch.optim.SGD(twin.parameters(), lr=0.1)
    for _ in range(3):
        data = batch()
        optimizer.step(mse(net, data))
        peer.zero_grad()
        mse(twin, data).backward()
        peer.step()
    assert net[1].running_mean is buffer
    assert net[1].num_batches_tracked == 3
    for b, c in zip(net.buffers(), twin.buffers()):
        close(b, c)
        assert not b.requires_grad
    x = torch.randn(5, 3)
    kept = [b.clone() for b in net.buffers()]
    close(net.eval()(x), twin.eval()(x).data)
    assert all(torch.equal(b, k) for b, k in zip(net.buffers(), kept))


def test_hooks_keep_firing():
    net, data, calls = mlp(), batch(), []
    net[0].register_forward_pre_hook(lambda *_: calls.append("pre"))
    net[0].register_forward_hook(lambda *_: calls.append("forward"))
    net[2].register_full_backward_hook(lambda *_: calls.append("backward"))
    optimizer = torchopt.MetaAdam(net)
    for k in range(1, 4):
        optimizer.step(mse(net, data))
        assert [calls.count(w) for w in ("pre", "forward", "backward")] == [k, k, k]


def test_submodules_work_on_their_own():
    net, data = mlp(), batch()
    torchopt.MetaSGD(net, lr=0.5).step(mse(net, data))
    close(net[0](data[0]), data[0] @ net[0].weight.T + net[0].bias)
    close(net[2](torch.tanh(net[0](data[0]))), net(data[0]))


def test_weights_behave_as_plain_tensors_in_operations():
    net = mlp()
    torchopt.MetaSGD(net).step(mse(net, batch()))
    weight = net[0].weight
    assert type(weight * 2) is torch.Tensor
    assert type(weight.detach()) is torch.Tensor
    assert type(torch.cat([weight, weight])) is torch.Tensor
    assert "grad_fn" in repr(weight)


def test_parametrization_of_an_adapted_module_after_stop_gradient():
    net, data = mlp(), batch()
    torchopt.MetaSGD(net).step(mse(net, data))
    expected = net(data[0]).detach()
    nn.utils.parametrizations.weight_norm(torchopt.stop_gradient(net)[0])
    close(net(data[0]).data, expected)
    torchopt.MetaSGD(net).step(mse(net, data))
    assert net[0].parametrizations.weight.original0.grad_fn is not None


# Copies, pickles, conversions -------------------------------------------------------------------


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
    for p, q in zip(net.parameters(), twin.parameters()):
        close(p, q)


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
    for p, q in zip(net.parameters(), twin.parameters()):
        close(p, q)


def test_saved_state_dict_of_an_adapted_module_loads_into_a_fresh_one():
    net, data = mlp(), batch()
    torchopt.MetaAdam(net, lr=0.1).step(mse(net, data))
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    fresh = mlp()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    close(fresh(data[0]), net(data[0]))


@pytest.mark.parametrize("name", ["momentum", "adam", "rmsprop"])
def test_saved_state_of_the_optimizer_goes_on(name):
    cls, _, _, options = OPTIMIZERS[name]
    net, data = mlp(), [batch() for _ in range(4)]
    optimizer = cls(net, **options)
    for d in data[:2]:
        optimizer.step(mse(net, d))
    file = io.BytesIO()
    torch.save((net.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    twin = mlp()
    twin.load_state_dict(weights)
    resumed = cls(twin, **{**options, "lr": 7.0})
    resumed.load_state_dict(state)
    assert resumed.param_groups[0]["lr"] == options["lr"]
    for d in data[2:]:
        optimizer.step(mse(net, d))
        resumed.step(mse(twin, d))
    for p, q in zip(net.parameters(), twin.parameters()):
        close(p, q)


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


def test_a_module_converted_before_the_first_step_trains():
    net = mlp().to(torch.float32)
    data = tuple(t.float() for t in batch())
    optimizer = torchopt.MetaAdam(net, lr=0.1)
    start = mse(net, data).item()
    for _ in range(10):
        optimizer.step(mse(net, data))
    assert mse(net, data) < start
    assert all(p.dtype == torch.float32 for p in net.parameters())


def test_torch_compile_of_the_network_inside_an_inner_loop():
    net, support, query = mlp(), batch(), batch()
    start = list(net.parameters())
    expected = torch.autograd.grad(adapted_loss(net, torchopt.sgd(0.1), support, query)(), start)
    compiled = torch.compile(net, backend="eager")
    with torchopt.inner_loop(net, torchopt.sgd(0.1)) as inner:
        for _ in range(3):
            inner.step(mse(compiled, support))
        found = torch.autograd.grad(mse(compiled, query), start)
    for g, e in zip(found, expected):
        close(g, e)


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


# First order and no gradient --------------------------------------------------------------------


@pytest.mark.parametrize("way", ["argument", "attribute", "inner_loop"])
@every_optimizer
def test_create_graph_false_is_first_order_maml(name, way):
    cls, recipe, _, options = OPTIMIZERS[name]
    net, support, query = mlp(), [batch() for _ in range(3)], batch()
    start = list(net.parameters())
    # By hand: the gradients are constants, what else the update reads (weight decay) is not.
    tx, params = recipe(**options), dict(net.named_parameters())
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
        with torchopt.inner_loop(net, recipe(**options), create_graph=False) as optimizer:
            for data in support:
                optimizer.step(mse(net, data))
            found = torch.autograd.grad(mse(net, query), start)
    else:
        optimizer = cls(net, **options)
        optimizer.create_graph = way != "attribute"
        switch = {"create_graph": False} if way == "argument" else {}
        for data in support:
            optimizer.step(mse(net, data), **switch)
        found = torch.autograd.grad(mse(net, query), start)
    for g, e in zip(found, expected):
        close(g, e)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_first_order_maml_is_the_gradient_at_the_adapted_weights(name):
    cls, _, peer_cls, options = OPTIMIZERS[name]
    net, support, query = mlp(), [batch() for _ in range(3)], batch()
    twin, start = copy.deepcopy(net), list(net.parameters())
    peer = peer_cls(twin.parameters(), **options)
    for data in support:
        peer.zero_grad()
        mse(twin, data).backward()
        peer.step()
    expected = torch.autograd.grad(mse(twin, query), list(twin.parameters()))
    optimizer = cls(net, **options)
    for data in support:
        optimizer.step(mse(net, data), create_graph=False)
    for g, e in zip(torch.autograd.grad(mse(net, query), start), expected):
        close(g, e)


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


@every_optimizer
def test_no_grad_steps_record_nothing_and_use_the_memory_of_one(name):
    cls, _, _, options = OPTIMIZERS[name]
    net = mlp()
    twin = copy.deepcopy(net)
    optimizer, recorded = cls(net, **options), cls(twin, **options)
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
        assert all(value.grad_fn is None and not value.requires_grad for value in column.values())


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


# Groups, live hyperparameters, schedules --------------------------------------------------------


@every_optimizer
def test_several_networks_with_their_own_hyperparameters(name):
    _, recipe, peer_cls, options = OPTIMIZERS[name]
    body, head = nn.Linear(3, 4), nn.Linear(4, 2)
    twins = copy.deepcopy((body, head))
    optimizer = torchopt.MetaOptimizer([body], recipe(**options))
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": head, "lr": 0.02})
    peer = peer_cls(
        [
            {"params": list(twins[0].parameters())},
            {"params": list(twins[1].parameters()), "lr": 0.02},
        ],
        **options,
    )
    for k in range(6):
        if k == 3:
            optimizer.param_groups[0]["lr"] = peer.param_groups[0]["lr"] = 0.2
        x, y = batch()
        optimizer.step((head(torch.tanh(body(x))) - y).square().mean())
        peer.zero_grad()
        (twins[1](torch.tanh(twins[0](x))) - y).square().mean().backward()
        peer.step()
    for p, q in zip(
        [*body.parameters(), *head.parameters()], [*twins[0].parameters(), *twins[1].parameters()]
    ):
        close(p, q.data)
    assert [g["lr"] for g in optimizer.param_groups] == [0.2, 0.02]
    assert [state.step for state in torchopt.extract_state_dict(optimizer)] == [6, 6]


def test_a_group_added_later_starts_its_own_count():
    body, head = nn.Linear(3, 4), nn.Linear(4, 2)
    twins = copy.deepcopy((body, head))
    optimizer = torchopt.MetaAdam(body, lr=0.1)
    peer = torch.optim.Adam(twins[0].parameters(), lr=0.1)
    for k in range(5):
        if k == 2:
            torchopt.stop_gradient(body)  # else the gradient of head also flows through body's past
            optimizer.add_param_group(head)
            peer.add_param_group({"params": list(twins[1].parameters())})
        x, y = batch()
        optimizer.step((head(torch.tanh(body(x))) - y).square().mean())
        for twin in twins:
            twin.zero_grad()
        (twins[1](torch.tanh(twins[0](x))) - y).square().mean().backward()
        peer.step()
    for p, q in zip(
        [*body.parameters(), *head.parameters()], [*twins[0].parameters(), *twins[1].parameters()]
    ):
        close(p, q.data)
    assert [state.step for state in torchopt.extract_state_dict(optimizer)] == [5, 3]


def test_the_gradient_is_total_through_recorded_steps_of_another_network():
    """What opponent shaping and unrolled GANs need: the other's step depends on mine."""
    mine, other, data = nn.Linear(3, 2), nn.Linear(3, 2), batch()
    start = list(mine.parameters())

    def play():
        state = torchopt.extract_state_dict(other)
        torchopt.MetaSGD(other, lr=0.3).step((other(data[0]) * mine(data[0])).square().mean())
        loss = (mine(data[0]) - other(data[0]) * data[1]).square().mean()
        torchopt.recover_state_dict(other, state)
        return loss

    assert_derivative(play, start)
    grads = torch.autograd.grad(play(), start)
    rate = 0.5
    loss = play()
    torchopt.MetaSGD(mine, lr=rate).step(loss)
    for p, s, g in zip(mine.parameters(), start, grads):
        close(p, s - rate * g)


def test_schedule_as_learning_rate():
    net = mlp()
    twin = copy.deepcopy(net)
    schedule = schedules.linear(0.2, 0.0, transition_steps=4)
    optimizer = torchopt.MetaSGD(net, lr=schedule, momentum=0.9)
    peer = torch.optim.SGD(twin.parameters(), lr=1.0, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.LambdaLR(peer, lambda k: 0.2 * max(0.0, 1 - k / 4))
    for _ in range(6):
        data = batch()
        optimizer.step(mse(net, data))
        peer.zero_grad()
        mse(twin, data).backward()
        peer.step()
        scheduler.step()
    for p, q in zip(net.parameters(), twin.parameters()):
        close(p, q.data)


def test_a_schedule_of_learned_rates_gives_each_its_gradient():
    net, support, query = mlp(), batch(), batch()
    rates = torch.tensor([0.3, 0.2, 0.1], requires_grad=True)
    function = adapted_loss(net, torchopt.sgd(lambda count: rates[count]), support, query)
    assert (torch.autograd.grad(function(), rates)[0] != 0).all()
    assert_derivative(function, [rates])


# Learned hyperparameters ------------------------------------------------------------------------


def _learned(value, *shape):
    return (value * (1 + 0.3 * torch.rand(shape))).requires_grad_(True)


def _kinds(net):
    names = dict(net.named_parameters())
    shared = _learned(0.1)
    per_part = {"0": _learned(0.1), "2": _learned(0.05)}
    per_parameter = {n: _learned(0.1) for n in names}
    per_element = {n: _learned(0.1, *p.shape) for n, p in names.items()}
    per_row = {"0": _learned(0.1, 1), "2": _learned(0.1, 1)}
    return {
        "one": (shared, [shared]),
        "one_of_one_element": (row := _learned(0.1, 1), [row]),
        "per_part": (per_part, list(per_part.values())),
        "per_parameter": (per_parameter, list(per_parameter.values())),
        "per_element": (per_element, list(per_element.values())),
        "per_part_of_one_element": (per_row, list(per_row.values())),
        "part_with_exception": (
            mixed := {"": _learned(0.1), "2.bias": _learned(0.3)},
            list(mixed.values()),
        ),
        "part_number_and_tensor": (
            half := {"0": 0.1, "2": _learned(0.05)},
            [half["2"]],
        ),
    }


KINDS = [
    "one",
    "one_of_one_element",
    "per_part",
    "per_parameter",
    "per_element",
    "per_part_of_one_element",
    "part_with_exception",
    "part_number_and_tensor",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recipe", [torchopt.sgd, torchopt.adam], ids=["sgd", "adam"])
def test_learned_learning_rate_of_every_kind(recipe, kind):
    net, support, query = mlp(), batch(), batch()
    lr, tensors = _kinds(net)[kind]
    function = adapted_loss(net, recipe(lr), support, query)
    assert_derivative(function, tensors)
    assert_derivative(function, [*tensors, *net.parameters()])
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(function(), tensors))


LEARNED = {
    "sgd_momentum": (torchopt.sgd, {"momentum": 0.6}),
    "sgd_dampening": (torchopt.sgd, {"momentum": 0.6, "dampening": 0.2}),
    "sgd_weight_decay": (torchopt.sgd, {"weight_decay": 0.1}),
    "adam_eps": (torchopt.adam, {"eps": 1e-2}),
    "adam_eps_root": (torchopt.adam, {"eps_root": 1e-2}),
    "adam_weight_decay": (torchopt.adam, {"weight_decay": 0.1}),
    "adamw_weight_decay": (torchopt.adamw, {"weight_decay": 0.1}),
    "rmsprop_alpha": (torchopt.rmsprop, {"alpha": 0.7}),
    "rmsprop_eps": (torchopt.rmsprop, {"eps": 1e-2}),
    "rmsprop_momentum": (torchopt.rmsprop, {"momentum": 0.5}),
}


@pytest.mark.parametrize("kind", ["one", "per_part", "per_element"])
@pytest.mark.parametrize("name", LEARNED)
def test_every_number_can_be_learned(name, kind):
    recipe, options = LEARNED[name]
    net, support, query = mlp(), batch(), batch()
    last = list(options)[-1]
    value = options[last]
    tensors = {
        "one": {"": _learned(value)},
        "per_part": {"0": _learned(value), "2": _learned(value)},
        "per_element": {n: _learned(value, *p.shape) for n, p in net.named_parameters()},
    }[kind]
    given = tensors[""] if kind == "one" else tensors
    function = adapted_loss(net, recipe(lr=0.05, **{**options, last: given}), support, query)
    assert_derivative(function, list(tensors.values()))


@pytest.mark.parametrize("kind", ["both", "first", "second", "per_part"])
def test_learned_betas(kind):
    net, support, query = mlp(), batch(), batch()
    b1, b2 = _learned(0.5), _learned(0.7)
    parts = {"0": _learned(0.5), "2": _learned(0.6)}
    betas, tensors = {
        "both": ((b1, b2), [b1, b2]),
        "first": ((b1, 0.99), [b1]),
        "second": ((0.5, b2), [b2]),
        "per_part": ((parts, b2), [*parts.values(), b2]),
    }[kind]
    function = adapted_loss(net, torchopt.adam(0.05, betas=betas), support, query)
    assert_derivative(function, tensors)


def test_learned_rates_of_two_groups_get_gradients_of_their_own():
    body, head = nn.Linear(3, 4), nn.Linear(4, 2)
    rates = [torch.tensor(v, requires_grad=True) for v in (0.1, 0.3)]
    (x, y), (u, v) = batch(), batch()

    def function():
        states = [torchopt.extract_state_dict(m) for m in (body, head)]
        optimizer = torchopt.MetaOptimizer(
            [{"params": body, "lr": rates[0]}, {"params": head, "lr": rates[1]}],
            torchopt.sgd(momentum=0.5),
        )
        for _ in range(3):
            optimizer.step((head(torch.tanh(body(x))) - y).square().mean())
        outer = (head(torch.tanh(body(u))) - v).square().mean()
        for m, state in zip((body, head), states):
            torchopt.recover_state_dict(m, state)
        return outer

    assert_derivative(function, rates[:1])
    assert_derivative(function, rates[1:])


def test_live_change_to_a_learned_rate():
    net, support, query = mlp(), batch(), batch()
    optimizer = torchopt.MetaSGD(net, lr=0.1)
    optimizer.step(mse(net, support))
    lr = torch.tensor(0.2, requires_grad=True)
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step(mse(net, support))
    assert torch.autograd.grad(mse(net, query), lr)[0].abs() > 0


def test_live_change_out_of_bounds_is_refused():
    net = mlp()
    optimizer = torchopt.MetaSGD(net, lr=0.1)
    optimizer.param_groups[0]["lr"] = -1.0
    objects = list(net.parameters())
    with pytest.raises(ValueError, match="lr"):
        optimizer.step(mse(net, batch()))
    assert all(p is q for p, q in zip(net.parameters(), objects))


# Chains -----------------------------------------------------------------------------------------


def test_hook_that_blocks_the_gradient_gives_first_order():
    net, support, query = mlp(), batch(), batch()
    start = list(net.parameters())
    seen = []
    hook = lambda g: seen.append(g.shape) or torch.zeros_like(g)  # noqa: E731
    tx = torchopt.chain(torchopt.register_hook(hook), torchopt.sgd(0.1))
    blocked = torch.autograd.grad(adapted_loss(net, tx, support, query)(), start)
    with torchopt.inner_loop(net, torchopt.sgd(0.1), create_graph=False) as inner:
        for _ in range(3):
            inner.step(mse(net, support))
        expected = torch.autograd.grad(mse(net, query), start)
    for g, e in zip(blocked, expected):
        close(g, e)
    assert len(seen) == 3 * len(start)


@pytest.mark.parametrize(
    "first",
    [
        torchopt.clip_grad_norm(0.05),
        torchopt.clip_grad_norm(0.05, norm_type=1.0),
        torchopt.clip_grad_value(0.05),
        torchopt.nan_to_num(),
        torchopt.masked(torchopt.scale(3.0), {"0": True, "2": False}),
        torchopt.register_hook(lambda g: g),
    ],
    ids=["clip_norm", "clip_norm_1", "clip_value", "nan_to_num", "masked", "register_hook"],
)
def test_chains_against_central_differences(first):
    net = mlp()
    tx = torchopt.chain(first, torchopt.adam(0.05, eps=1e-3))
    assert_derivative(adapted_loss(net, tx, batch(), batch()), list(net.parameters()))


def test_nan_to_num_saves_a_step():
    net, data = mlp(), batch()
    plain, repaired = copy.deepcopy(net), copy.deepcopy(net)

    def broken(module):
        return mse(module, data) + (module[0].bias * 0.0).sum() * torch.inf

    torchopt.MetaOptimizer(plain, torchopt.sgd(0.1)).step(broken(plain))
    assert plain[0].bias.isnan().all()
    tx = torchopt.chain(torchopt.nan_to_num(), torchopt.sgd(0.1))
    torchopt.MetaOptimizer(repaired, tx).step(broken(repaired))
    assert all(p.isfinite().all() for p in repaired.parameters())
    assert not torch.equal(repaired[2].bias, net[2].bias)


def test_mask_function_sees_parameter_names():
    net, data, seen = mlp(), batch(), []

    def mask(params):
        seen.append(list(params))
        return {n: n.endswith("bias") for n in params}

    tx = torchopt.chain(torchopt.masked(torchopt.scale(0.0), mask), torchopt.sgd(0.1))
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    torchopt.MetaOptimizer(net, tx).step(mse(net, data))
    for n, p in net.named_parameters():
        assert torch.equal(p, before[n]) == n.endswith("bias")
    assert seen[-1] == list(before)


# Outer loops, graph size and memory -------------------------------------------------------------


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
@every_optimizer
def test_no_reference_cycle_keeps_a_graph_alive(name, backward):
    cls, _, _, options = OPTIMIZERS[name]
    net, support, query = mlp(), batch(), batch()
    tokens, weights = weakref.WeakSet(), []

    def loss_of(net, data):
        return _Watched.apply(mse(net, data), tokens)

    gc.collect()
    gc.disable()
    try:
        optimizer = cls(net, **options)
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


def test_data_loader_loop_lowers_the_loss():
    data = torch.utils.data.TensorDataset(*batch(32))
    loader = torch.utils.data.DataLoader(data, batch_size=8, shuffle=True)
    net = mlp()
    optimizer = torchopt.MetaAdam(net, lr=0.05)
    start = mse(net, data.tensors).item()
    for _ in range(20):
        for x, y in loader:
            optimizer.step(mse(net, (x, y)), create_graph=False)
            torchopt.stop_gradient(net)
            torchopt.stop_gradient(optimizer)
    assert mse(net, data.tensors) < 0.9 * start
