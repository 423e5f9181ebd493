"""After an ``inner_loop`` block a network is what it was: structure, values, flags and modes."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import torchopt


X = torch.linspace(-2.0, 2.0, 18, dtype=torch.float64).sin().reshape(6, 3)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.body = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 2)
        self.register_buffer("cache", None, persistent=False)
        self.extra = None
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.norm(self.body(x)))
        if self.cache is not None:
            h = h * self.cache
        h = self.head(h)
        return h if self.extra is None else self.extra(h)


def loss(net: nn.Module) -> Tensor:
    return (net(X) - 0.5).square().mean()


def everything(net: nn.Module) -> list[Any]:
    """Return all that a network is: objects, and values by their bits."""
    found: list[Any] = []
    for name, m in net.named_modules():
        found.append((name, m, type(m), m.training, sorted(set(vars(m)))))
        found.append([(n, id(c)) for n, c in m._modules.items()])
        found.append(sorted(m._non_persistent_buffers_set))
        for held in (m._parameters, m._buffers):
            for n, t in held.items():
                bits = None if t is None else t.detach().cpu().numpy().tobytes()
                kind = None if t is None else (t.dtype, t.shape, t.requires_grad, type(t))
                found.append((n, id(t), kind, bits))
    return found


def fresh_head(net: Any) -> None:
    net.head = nn.Linear(4, 5).double()


def fresh_parameter(net: Any) -> None:
    net.head.weight = nn.Parameter(torch.randn(7, 4, dtype=torch.float64))
    net.head.bias = None


def added(net: Any) -> None:
    net.extra = nn.Sequential(nn.Linear(2, 2).double())
    net.body.scale = nn.Parameter(torch.ones(1, dtype=torch.float64))
    net.body.register_buffer("count", torch.zeros(1))


def lazy_head(net: Any) -> None:
    net.head = nn.LazyLinear(3, dtype=torch.float64)


def deleted(net: Any) -> None:
    del net.norm, net.cache
    net.norm, net.cache = nn.Identity(), None


def parametrized(net: Any) -> None:
    parametrizations.orthogonal(net.body)
    parametrizations.weight_norm(net.head)


def load(net: Any) -> None:
    net.load_state_dict({n: t + 1 for n, t in net.state_dict().items()})


def assign(net: Any) -> None:
    net.load_state_dict({n: t + 1 for n, t in net.state_dict().items()}, assign=True)


def zero_data(net: Any) -> None:
    net.head.weight.data.zero_()
    net.body.bias.data = torch.ones(4, dtype=torch.float64)


def half(net: Any) -> None:
    net.float().double()


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a fresh head": fresh_head,
    "a fresh parameter": fresh_parameter,
    "added": added,
    "a lazy head": lazy_head,
    "deleted": deleted,
    "parametrized": parametrized,
    "a buffer": lambda net: setattr(net, "cache", torch.arange(1.0, 5.0).double()),
    "reset_parameters": lambda net: net.head.reset_parameters(),
    "nn.init": lambda net: nn.init.ones_(net.body.weight),
    "load_state_dict": load,
    "assign": assign,
    "requires_grad_": lambda net: net.body.requires_grad_(False),
    "eval": lambda net: net.eval(),
    "data": zero_data,
    "another dtype": half,
}


#: What PyTorch refuses of weights with history.
LEAVES_ONLY = {"parametrized", "load_state_dict", "requires_grad_"}


@pytest.mark.parametrize("when", ["before", "after", "raising"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_it_comes_back(change: str, when: str) -> None:
    if when == "after" and change in LEAVES_ONLY:
        pytest.skip("PyTorch refuses it of weights with history")
    net = Net()
    state = torchopt.extract_state_dict(net)
    inner = torchopt.MetaAdam(net, lr=0.05)
    inner.step(loss(net))
    torchopt.stop_gradient(inner)
    torchopt.recover_state_dict(net, state)
    before, states, start = everything(net), inner.extract_state(), list(net.parameters())

    def block() -> None:
        with torchopt.inner_loop(net, inner):
            if when != "after":
                CHANGES[change](net)
            if when == "raising":
                raise KeyError("mine")
            inner.step(loss(net))
            if when == "after":
                CHANGES[change](net)
            inner.step(loss(net))
            loss(net).backward()

    if when == "raising":
        with pytest.raises(KeyError, match="mine"):
            block()
    else:
        block()
        assert any(p.grad is not None for p in start) or change == "assign"
    assert everything(net) == before
    for now, then in zip(inner.extract_state(), states):
        assert now.step == then.step
        assert_close(now.slots, then.slots)
    inner.step(loss(net))


def test_a_second_block_sees_nothing_of_the_first() -> None:
    """The same meta-gradient comes out, whatever an earlier block changed."""
    net = Net()
    start = list(net.parameters())

    def meta_gradient() -> Any:
        with torchopt.inner_loop(net, torchopt.adam(0.05)) as inner:
            for _ in range(2):
                inner.step(loss(net))
            return torch.autograd.grad(loss(net), start)

    right = meta_gradient()
    for change in CHANGES.values():
        with torchopt.inner_loop(net, torchopt.sgd(0.05)):
            change(net)
    assert all(map(torch.equal, meta_gradient(), right))


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
def test_an_embedding_with_max_norm(kind: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(6, 3, max_norm=1.0), nn.Linear(3, 1)).double()
    with torch.no_grad():
        net[0].weight.mul_(3.0)  # pyright: ignore[reportArgumentType, reportCallIssue]
    before = everything(net)
    ids = torch.tensor([0, 1, 2, 3])
    with torchopt.inner_loop(net, getattr(torchopt, kind)(0.1)) as inner:
        for _ in range(3):
            inner.step((net(ids) - 1).square().mean())
        (net(ids) - 1).square().mean().backward()
    assert everything(net) == before


def test_nothing_is_written_where_nothing_changed() -> None:
    """A write would count as a change, and autograd would refuse the graph of the block."""
    net = Net()
    with torch.no_grad():
        net.head.bias[0] = float("nan")
    versions = [p._version for p in net.parameters()]
    with torchopt.inner_loop(net, torchopt.sgd(0.1)) as inner:
        inner.step(loss(net))
        outer = loss(net)
    assert [p._version for p in net.parameters()] == versions
    outer.backward()


def test_a_value_that_went_back_in_place_is_not_differentiated_silently() -> None:
    net = Net()
    with torchopt.inner_loop(net, torchopt.sgd(0.1)) as inner:
        net.head.weight.data.mul_(2.0)
        inner.step(loss(net))
        outer = loss(net)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        outer.backward()


def test_a_lazy_network_keeps_its_shapes_and_first_values() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d(), nn.Linear(3, 1)).double()
    start = list(net.parameters())
    with torchopt.inner_loop(net, torchopt.sgd(0.1)) as inner:
        net(X)
        first = net[0].weight.detach().clone()
        inner.step(net(X).square().mean())
        net(X).square().mean().backward()
    assert all(a is b for a, b in zip(start, net.parameters()))
    assert type(net[0]) is nn.Linear
    assert torch.equal(net[0].weight, first)  # pyright: ignore[reportArgumentType]
    assert all(p.grad is not None for p in start)
    net(X)


def test_a_removed_parametrization_comes_back() -> None:
    net = parametrizations.weight_norm(nn.Linear(3, 2).double())
    right = net(X)
    with torchopt.inner_loop(net, torchopt.sgd(0.1)) as inner:
        inner.step(net(X).square().mean())
        torchopt.stop_gradient(net)
        parametrize.remove_parametrizations(net, "weight")
        inner.step(net(X).square().mean())
    assert parametrize.is_parametrized(net, "weight")
    assert torch.equal(net(X), right)


def test_without_buffers_what_the_block_made_of_them_stays() -> None:
    net = Net()
    with torchopt.inner_loop(net, torchopt.sgd(0.1), restore_buffers=False) as inner:
        net.cache = torch.ones(4, dtype=torch.float64)
        inner.step(loss(net))
    assert int(net.norm.num_batches_tracked) == 1
    assert net.cache is not None


def test_param_groups_are_the_same_dicts() -> None:
    net = Net()
    inner = torchopt.MetaSGD(net, lr=0.1)
    group = inner.param_groups[0]
    before = dict(group)
    with torchopt.inner_loop(net, inner):
        group["lr"] = 0.5
        inner.add_param_group(nn.Linear(2, 2))
    assert inner.param_groups[0] is group
    assert len(inner.param_groups) == 1
    assert group == before


def test_a_fresh_parameter_under_an_old_name_begins_anew() -> None:
    """Its count and slots are those of a new parameter, the others go on; as in torch.optim."""
    net, twin = Net(), Net()
    fresh, names = nn.Linear(4, 5).double(), ["head.weight", "head.bias"]
    inner = torchopt.MetaSGD(net, lr=0.1, momentum=0.9)
    other = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    for k in range(4):
        if k == 2:
            net.head, twin.head = nn.Linear(4, 5).double(), fresh
            net.head.load_state_dict(fresh.state_dict())
            other.add_param_group({"params": list(fresh.parameters())})
        inner.step(loss(net))
        other.zero_grad()
        loss(twin).backward()
        other.step()
    for (name, a), b in zip(net.named_parameters(), twin.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13, msg=name)
    steps = torchopt.extract_state_dict(inner)[0].step
    assert [steps[name] for name in names] == [2, 2]
    assert steps["body.weight"] == 4


@pytest.mark.parametrize("needed", [False, True], ids=["", "moment"])
def test_nothing_is_kept(needed: bool) -> None:
    """Nor does a graph whose checkpointed part may run again keep modules that came later."""
    net = Net()
    kept = checkpoint(net, torch.ones(2, 3, dtype=torch.float64), use_reentrant=False)
    if not needed:
        del kept
    counts = []
    for _ in range(4):
        with torchopt.inner_loop(net, torchopt.sgd(0.1)) as inner:
            net.extra = nn.Linear(2, 2).double()
            inner.step(loss(net))
        gc.collect()
        counts.append(sum(isinstance(o, nn.Linear) for o in gc.get_objects()))
    assert counts[1:] == counts[1:2] * 3, counts
