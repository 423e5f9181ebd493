"""The differentiable face, whose slots go from step to step in one piece, whoever looks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Case, every_fused_case
from conftest import nonzero
from fusing import kernel_calls_fixture, needs_library  # noqa: F401
from tolerances import assert_close
from torch import Tensor, nn

import torchopt


pytestmark = needs_library


class Net(nn.Module):
    """Parameters of several shapes and layouts, one of them empty."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.a = nn.Parameter(nonzero(4, 3).to(dtype))
        self.b = nn.Parameter(nonzero().to(dtype))
        self.empty = nn.Parameter(torch.zeros(0, 2, dtype=dtype))
        self.sub = nn.Linear(3, 2, dtype=dtype)
        conv = nonzero(2, 3, 2, 2).to(dtype)
        self.conv = nn.Parameter(conv.contiguous(memory_format=torch.channels_last))

    def loss(self, factor: float = 1.0) -> Tensor:
        total = (self.sub(self.a).square().sum() + self.conv.pow(3).sum()) * factor
        return total + self.b * self.conv.mean() + self.empty.sum()


Drive = Callable[[Net, torchopt.MetaOptimizer], Any]


def outcome(case: Case, setting: bool | None, drive: Drive) -> list[Tensor]:
    """Values at the end, and the derivative of a function of all of them by where it began."""
    torch.manual_seed(8)
    net = Net()
    start = [p for p in net.parameters() if p.numel()]
    optimizer = torchopt.MetaOptimizer(net, case.tx().with_accelerated_op(setting))
    kept = drive(net, optimizer)
    (state,) = optimizer.extract_state()
    names = [name for name, _ in Net().named_parameters()]
    slots = [slot[n] for slot in state.slots.values() for n in names if slot.get(n) is not None]
    weights = [dict(net.named_parameters())[name] for name in names]
    values = [*weights, *slots, *(kept or ())]
    total = sum((x.sin() * (k + 1)).sum() for k, x in enumerate(values))
    grads = []
    if isinstance(total, Tensor) and total.requires_grad:
        grads = list(torch.autograd.grad(total, start, allow_unused=True, materialize_grads=True))
    return [x.detach() for x in (*values, *grads)]


def plain(net: Net, optimizer: torchopt.MetaOptimizer) -> None:
    for k in range(3):
        optimizer.step(net.loss(1.0 + k))


def looked_at_between(net: Net, optimizer: torchopt.MetaOptimizer) -> list[Tensor]:
    seen = []
    for k in range(3):
        optimizer.step(net.loss(1.0 + k))
        (state,) = optimizer.extract_state()
        seen += [x for slot in state.slots.values() for x in slot.values() if x is not None][:3]
    return seen


def saved_and_recovered(net: Net, optimizer: torchopt.MetaOptimizer) -> None:
    optimizer.step(net.loss())
    states = [torchopt.extract_state_dict(x) for x in (net, optimizer)]
    optimizer.step(net.loss(7.0))
    for x, state in zip((net, optimizer), states):
        torchopt.recover_state_dict(x, state)
    optimizer.step(net.loss(2.0))
    optimizer.step(net.loss(3.0))


def loaded(net: Net, optimizer: torchopt.MetaOptimizer) -> None:
    optimizer.step(net.loss())
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.step(net.loss(2.0))
    optimizer.step(net.loss(2.0))


def copied(net: Net, optimizer: torchopt.MetaOptimizer) -> None:
    optimizer.step(net.loss())
    optimizer.step(net.loss(2.0))
    other = copy.deepcopy(optimizer)
    other.step(other.param_groups[0]["params"].loss(5.0))
    optimizer.step(net.loss(2.0))


def without_derivatives_first(net: Net, optimizer: torchopt.MetaOptimizer) -> None:
    with torch.no_grad():
        for _ in range(2):
            with torch.enable_grad():
                loss = net.loss()
            optimizer.step(loss)
    optimizer.step(net.loss())
    optimizer.step(net.loss(2.0))


def first_order(net: Net, optimizer: torchopt.MetaOptimizer) -> None:
    for k in range(3):
        optimizer.step(net.loss(1.0 + k), create_graph=False)


def some_gradients_missing(net: Net, optimizer: torchopt.MetaOptimizer) -> None:
    optimizer.step(net.loss())
    optimizer.step(net.a.square().sum() + net.b**2)
    optimizer.step(net.loss(2.0))
    optimizer.step(net.conv.square().sum())
    optimizer.step(net.loss(2.0))


def frozen_for_a_while(net: Net, optimizer: torchopt.MetaOptimizer) -> None:
    net.a.requires_grad_(False)
    optimizer.step(net.loss())
    optimizer.step(net.loss(2.0))
    net.a.requires_grad_(True)
    optimizer.step(net.loss())
    optimizer.step(net.loss())


def numbers_by_name(net: Net, optimizer: torchopt.MetaOptimizer) -> None:
    optimizer.step(net.loss())
    group = optimizer.param_groups[0]
    group["lr"] = {"a": 0.1, "b": 0.2, "empty": 0.3, "sub": 0.01, "conv": 0.05}
    optimizer.step(net.loss())
    optimizer.step(net.loss())


def learned_number(net: Net, optimizer: torchopt.MetaOptimizer) -> list[Tensor]:
    optimizer.step(net.loss())
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step(net.loss())
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step(net.loss())
    unused = {"allow_unused": True, "materialize_grads": True}  # a rate that is read once
    return list(torch.autograd.grad(net.loss(), lr, retain_graph=True, **unused))


def detached_between(net: Net, optimizer: torchopt.MetaOptimizer) -> None:
    optimizer.step(net.loss())
    torchopt.stop_gradient(net)
    torchopt.stop_gradient(optimizer)
    optimizer.step(net.loss())
    optimizer.step(net.loss())


DRIVES = (
    plain,
    looked_at_between,
    saved_and_recovered,
    loaded,
    copied,
    without_derivatives_first,
    first_order,
    some_gradients_missing,
    frozen_for_a_while,
    numbers_by_name,
    learned_number,
    detached_between,
)


@pytest.mark.sampled(2, each=2)
@pytest.mark.parametrize("drive", DRIVES, ids=lambda f: f.__name__)
@every_fused_case
def test_values_and_meta_gradients(case: Case, drive: Drive, kernel_calls: list[int]) -> None:
    expected = outcome(case, False, drive)
    assert not kernel_calls
    actual = outcome(case, None, drive)
    assert len(kernel_calls) >= 3
    assert_close(actual, expected, times=100)


@every_fused_case
def test_second_derivative_of_a_meta_objective(case: Case) -> None:
    found = []
    for setting in (None, False):
        torch.manual_seed(8)
        net = Net()
        start = net.a
        optimizer = torchopt.MetaOptimizer(net, case.tx().with_accelerated_op(setting))
        plain(net, optimizer)
        (first,) = torch.autograd.grad(net.loss(), start, create_graph=True)
        (second,) = torch.autograd.grad(first.sin().sum(), start)
        found.append([first.detach(), second])
    assert_close(found[0], found[1], times=1000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_other_dtypes(dtype: torch.dtype) -> None:
    results = []
    for setting in (None, False):
        torch.manual_seed(8)
        net = Net(dtype)
        optimizer = torchopt.MetaAdam(net, lr=0.01, use_accelerated_op=setting)
        plain(net, optimizer)
        slots = optimizer.extract_state()[0].slots
        assert all(x.dtype == torch.float32 for x in slots["exp_avg"].values())
        results.append([p.detach() for p in net.parameters()])
    assert_close(results[0], results[1], dtype, times=4)


def test_networks_of_two_dtypes_and_groups() -> None:
    for groups in (1, 2):
        results = []
        for setting in (None, False):
            torch.manual_seed(8)
            nets = nn.ModuleList([Net(torch.float64), Net(torch.float32)])
            given: Any = nets if groups == 1 else [{"params": n, "lr": 0.01} for n in nets]
            tx = torchopt.adam(0.02, use_accelerated_op=setting)
            optimizer = torchopt.MetaOptimizer(given, tx)
            for _ in range(3):
                optimizer.step(nets[0].loss() + nets[1].loss().double())  # pyright: ignore
            results.append([p.detach().double() for p in nets.parameters()])
        assert_close(results[0], results[1], torch.float32, times=4)


def test_slots_that_were_looked_at_are_tensors_of_their_own() -> None:
    """Changing or keeping one slot touches no other, nor what the optimizer goes on with."""
    torch.manual_seed(8)
    net = Net()
    optimizer = torchopt.MetaAdam(net, lr=0.01)
    plain(net, optimizer)
    (state,) = optimizer.extract_state()
    kept = [x for x in state.slots["exp_avg"].values() if x.numel()]
    assert len({x.untyped_storage().data_ptr() for x in kept}) == len(kept)
    for name, p in net.named_parameters():
        assert state.slots["exp_avg"][name].shape == p.shape


def test_memory_kept_between_steps() -> None:
    """For each step backward keeps nothing but gradients, parameters and slots."""
    net = nn.ParameterList(nonzero(50) for _ in range(4))
    optimizer = torchopt.MetaAdam(net, lr=0.01)
    optimizer.step(sum((p**2).sum() for p in net))
    sizes: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    grads = [nonzero(50).requires_grad_() for _ in net]
    loss = sum((p * g).sum() for p, g in zip(net, grads))
    known = {g.untyped_storage().data_ptr() for g in (*grads, *net)}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        optimizer.step(loss)
    new = sum(size for place, size in sizes.items() if place not in known)
    # old moments (two, in one piece each) and gradients, all of which exist, and a number
    assert new <= 3 * 4 * 50 * 8 + 8, new
