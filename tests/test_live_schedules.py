"""A schedule in the object-oriented face: groups hold numbers, and the schedule stands behind."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from conftest import nonzero
from tolerances import assert_close
from torch import nn
from torch.distributed.checkpoint import state_dict as distributed
from torch.optim import lr_scheduler

import torchopt


def rate(count: int) -> float:
    """A schedule that can be pickled, with another value at each count."""
    return 0.5 / (count + 2)


def other_rate(count: int) -> float:
    return 0.3 / (count + 1)


def make(**kwargs: Any) -> tuple[Any, nn.Parameter]:
    p = nn.Parameter(nonzero(3))
    return torchopt.SGD([p], **{"lr": rate, **kwargs}), p


def moved(optimizer: Any, p: nn.Parameter) -> float:
    """Take a step of gradient 1 without momentum, and return the rate that it took."""
    p.grad, before = torch.ones_like(p), p.detach().clone()
    optimizer.step()
    return float((before - p.detach()).mean())


def lr(optimizer: Any, group: int = 0) -> Any:
    return optimizer.param_groups[group]["lr"]


@pytest.mark.parametrize("setting", [None, False], ids=["fused", "rules"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_group_says_the_rate_of_the_next_step(setting: Any, momentum: float) -> None:
    optimizer, p = make(use_accelerated_op=setting, momentum=momentum)
    twin = nn.Parameter(p.detach().clone())
    theirs = torch.optim.SGD([twin], lr=1.0, momentum=momentum)
    for k in range(5):
        assert type(lr(optimizer)) is float
        assert lr(optimizer) == rate(k)
        theirs.param_groups[0]["lr"] = rate(k)
        twin.grad = p.grad = nonzero(3)
        optimizer.step()
        theirs.step()
        assert_close(p.detach(), twin.detach())


def test_pairs_and_trees_of_schedules() -> None:
    p = [nn.Parameter(nonzero(2)), nn.Parameter(nonzero(3))]
    optimizer = torchopt.Adam(p, lr=[rate, 0.1], betas=(lambda k: 0.5 + 0.1 * k, 0.99))
    for k in range(3):
        group = optimizer.param_groups[0]
        assert group["lr"] == [rate(k), 0.1]
        assert group["betas"] == (0.5 + 0.1 * k, 0.99)
        for x in p:
            x.grad = nonzero(*x.shape)
        optimizer.step()


def test_groups_have_their_own_schedules() -> None:
    a, b, c = (nn.Parameter(nonzero(2)) for _ in range(3))
    optimizer = torchopt.SGD([{"params": [a]}, {"params": [b], "lr": other_rate}], lr=rate)
    for x in (a, b):
        moved_by = moved(optimizer, x)
        x.grad = None
        assert moved_by == pytest.approx(rate(0) if x is a else other_rate(0))
    optimizer.add_param_group({"params": [c]})
    assert [lr(optimizer, k) for k in range(3)] == [rate(1), other_rate(1), rate(0)]
    optimizer.param_groups.pop(0)
    assert moved(optimizer, c) == pytest.approx(rate(0))


def test_a_schedule_put_into_a_group_later() -> None:
    optimizer, p = make(lr=0.1, momentum=0.9)
    moved(optimizer, p)
    optimizer.param_groups[0].update(lr=rate, momentum=0.0)
    assert moved(optimizer, p) == pytest.approx(rate(1))
    assert lr(optimizer) == rate(2)


def test_a_number_written_over_a_schedule_stands_until_it_is_taken_back() -> None:
    optimizer, p = make()
    moved(optimizer, p)
    scheduled = lr(optimizer)
    optimizer.param_groups[0]["lr"] = 0.125
    assert [moved(optimizer, p) for _ in range(2)] == pytest.approx([0.125, 0.125])
    assert lr(optimizer) == 0.125
    optimizer.param_groups[0]["lr"] = scheduled
    assert moved(optimizer, p) == pytest.approx(rate(3))


def test_a_scheduler_of_torch_takes_over() -> None:
    optimizer, p = make()
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    assert scheduler.get_last_lr() == [rate(0)]
    expected = rate(0)
    for k in range(4):
        assert moved(optimizer, p) == pytest.approx(expected)
        expected = 0.5 * (rate(1) if k == 0 else expected)
        scheduler.step()
        assert lr(optimizer) == pytest.approx(expected)


def test_a_schedule_that_ends_fails_when_it_is_needed() -> None:
    rates = [0.5, 0.25]
    optimizer, p = make(lr=lambda k: rates[k])
    assert [moved(optimizer, p) for _ in range(2)] == pytest.approx(rates)
    before = p.detach().clone()
    with pytest.raises(IndexError):
        moved(optimizer, p)
    assert torch.equal(p.detach(), before)


# Saving and loading -------------------------------------------------------------------------------


def through_file(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("how", ["state", "file", "pickle", "deepcopy"])
@pytest.mark.parametrize("replaced", [False, True])
def test_a_copy_goes_on_with_the_schedule(how: str, replaced: bool) -> None:
    optimizer, p = make()
    for _ in range(3):
        moved(optimizer, p)
    if replaced:
        optimizer.param_groups[0]["lr"] = 0.125
    if how in ("pickle", "deepcopy"):
        copied = copy.deepcopy if how == "deepcopy" else lambda x: pickle.loads(pickle.dumps(x))
        other, q = copied((optimizer, p))
    else:
        other, q = make()
        state = optimizer.state_dict()
        other.load_state_dict(through_file(state) if how == "file" else state)
    for k in (3, 4):
        expected = 0.125 if replaced else rate(k)
        assert lr(optimizer) == lr(other) == expected
        assert moved(optimizer, p) == pytest.approx(expected)
        assert moved(other, q) == pytest.approx(expected)


def test_the_schedule_of_the_optimizer_that_loads_is_kept() -> None:
    optimizer, p = make()
    for _ in range(3):
        moved(optimizer, p)
    other, q = make(lr=other_rate)
    other.load_state_dict(optimizer.state_dict())
    assert moved(other, q) == pytest.approx(other_rate(3))
    plain, r = make(lr=0.1)
    plain.load_state_dict(optimizer.state_dict())
    assert [moved(plain, r) for _ in range(2)] == pytest.approx([rate(3), rate(3)])


def test_rolled_back_over_a_number_that_was_written() -> None:
    optimizer, p = make()
    moved(optimizer, p)
    snapshot = optimizer.state_dict()
    optimizer.param_groups[0]["lr"] = 0.125
    moved(optimizer, p)
    optimizer.load_state_dict(snapshot)
    assert moved(optimizer, p) == pytest.approx(rate(1))


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flattened"])
def test_distributed_checkpoints(flat: bool) -> None:
    """Their first step, at rate 0, must neither move weights nor end the schedule."""
    options = distributed.StateDictOptions(flatten_optimizer_state_dict=flat)
    nets = [nn.Linear(2, 1).double() for _ in range(2)]
    optimizers = [torchopt.AdamW(net.parameters(), lr=rate) for net in nets]
    nets[1].load_state_dict(nets[0].state_dict())

    def step(net: nn.Module, optimizer: Any, x: torch.Tensor) -> None:
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()

    for _ in range(3):
        step(nets[0], optimizers[0], nonzero(4, 2))
    optimizers[0].zero_grad()
    saved = distributed.get_optimizer_state_dict(nets[0], optimizers[0], options=options)
    before = copy.deepcopy(nets[1].state_dict())
    distributed.set_optimizer_state_dict(nets[1], optimizers[1], saved, options=options)
    assert all(torch.equal(v, before[k]) for k, v in nets[1].state_dict().items())
    nets[1].load_state_dict(nets[0].state_dict())
    for k in (3, 4):
        x = nonzero(4, 2)
        assert lr(optimizers[0]) == lr(optimizers[1]) == rate(k)
        for net, optimizer in zip(nets, optimizers):
            step(net, optimizer, x)
        assert torch.equal(nets[0].weight, nets[1].weight)
