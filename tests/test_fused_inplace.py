"""Steps in place: they follow every change of memory and state, and say what they have written."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Case, every_fused_case
from conftest import nonzero
from fusing import (
    kernel_calls_fixture,  # noqa: F401
    needs_library,
)
from tolerances import assert_close
from torch import Tensor, nn

import torchopt
from torchopt.kernels import inplace


pytestmark = needs_library
Drive = Callable[[torchopt.Optimizer, list[nn.Parameter]], None]


@pytest.fixture(name="in_place")
def in_place_fixture(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A list with one entry for each step that was offered: whether it was taken in place."""
    taken: list[bool] = []
    original = inplace.Stepper.step

    def step(self: Any, *args: Any) -> bool:
        taken.append(original(self, *args))
        return taken[-1]

    monkeypatch.setattr(inplace.Stepper, "step", step)
    return taken


def steps(optimizer: torchopt.Optimizer, params: list[nn.Parameter], count: int) -> None:
    """Some steps with new gradients of the parameters' present shapes."""
    for _ in range(count):
        for p in params:
            p.grad = nonzero(*p.shape, dtype=p.dtype)
        optimizer.step()


def outcome(drive: Drive, setting: bool | None, make: Callable[[], list[Tensor]]) -> list[Tensor]:
    torch.manual_seed(11)
    params = [nn.Parameter(p) for p in make()]
    optimizer = torchopt.Adam(params, 0.05, weight_decay=0.1, use_accelerated_op=setting)
    drive(optimizer, params)
    states = [optimizer.state[p] for p in params]
    slots = [x for s in states for x in s.values() if isinstance(x, Tensor)]
    counts = [torch.tensor(float(s.get("step", 0))) for s in states]
    return [*(p.detach() for p in params), *slots, *counts]


def make_two() -> list[Tensor]:
    return [nonzero(12), nonzero(3, 4)]


def assert_same(drive: Drive, make: Callable[[], list[Tensor]] = make_two) -> None:
    """Assert that a drive ends in the same values, slots and counts, fused and unfused."""
    assert_close(outcome(drive, None, make), outcome(drive, False, make), times=4)


# The usual ----------------------------------------------------------------------------------------


@every_fused_case
def test_from_the_second_step_on(case: Case, in_place: list[bool]) -> None:
    params = [nn.Parameter(p) for p in make_two()]
    optimizer = torchopt.Optimizer(params, case.tx())
    steps(optimizer, params, 4)
    assert in_place == [not optimizer.state, True, True, True]  # new slots are new tensors


def test_a_slot_that_only_some_parameters_have() -> None:
    def drive(optimizer: Any, params: list[nn.Parameter]) -> None:
        steps(optimizer, params, 3)
        optimizer.state[params[1]]["max_exp_avg_sq"] = nonzero(*params[1].shape).abs()
        steps(optimizer, params, 2)

    assert_same(drive)


def test_momentum_buffer_taken_away_from_one_parameter() -> None:
    results = []
    for setting in (None, False):
        torch.manual_seed(2)
        params = [nn.Parameter(p) for p in make_two()]
        optimizer = torchopt.SGD(params, 0.1, momentum=0.9, use_accelerated_op=setting)
        steps(optimizer, params, 2)
        del optimizer.state[params[1]]["momentum_buffer"]
        steps(optimizer, params, 2)
        results.append([p.detach() for p in params])
    assert_close(results[0], results[1], times=4)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_new_gradients_each_step(set_to_none: bool) -> None:
    def drive(optimizer: Any, params: list[nn.Parameter]) -> None:
        keep = []
        for k in range(6):
            optimizer.zero_grad(set_to_none=set_to_none)
            keep.append([p.grad for p in params])  # so that memory is not used again
            sum((p**2).sum() * (k + 1) for p in params).backward()
            optimizer.step()

    assert_same(drive)


def test_slots_and_parameters_stay_where_they_are(in_place: list[bool]) -> None:
    params = [nn.Parameter(p) for p in make_two()]
    optimizer = torchopt.Adam(params)
    steps(optimizer, params, 2)
    places = [x.data_ptr() for p in params for x in (p, optimizer.state[p]["exp_avg"])]
    steps(optimizer, params, 2)
    assert places == [x.data_ptr() for p in params for x in (p, optimizer.state[p]["exp_avg"])]
    assert in_place[-1]


# What others have to know -------------------------------------------------------------------------


def test_a_step_is_a_change_in_place_for_autograd() -> None:
    """A graph that has saved a parameter must not be used after the parameter has changed."""
    for cls in (torchopt.Adam, torch.optim.Adam):
        p = nn.Parameter(nonzero(5))
        optimizer = cls([p])
        steps(optimizer, [p], 3)
        loss, version = (p**2).sum(), p._version
        optimizer.step()
        assert p._version > version, cls
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_slots_are_changed_in_place_for_autograd() -> None:
    p = nn.Parameter(nonzero(5))
    optimizer = torchopt.Adam([p])
    steps(optimizer, [p], 3)
    slot, scale = optimizer.state[p]["exp_avg"], torch.ones(5, dtype=p.dtype, requires_grad=True)
    value, version = (slot * scale).sum(), slot._version
    optimizer.step()
    assert slot is not optimizer.state[p]["exp_avg"] or slot._version > version
    if slot is optimizer.state[p]["exp_avg"]:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            value.backward()


def test_inference_mode() -> None:
    def drive(optimizer: Any, params: list[nn.Parameter]) -> None:
        steps(optimizer, params, 2)
        with torch.inference_mode():
            steps(optimizer, params, 2)
        steps(optimizer, params, 2)

    assert_same(drive)


def test_gradients_are_not_changed() -> None:
    p = nn.Parameter(nonzero(6))
    optimizer = torchopt.SGD([p], lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        p.grad = nonzero(6)
        before = p.grad.clone()
        optimizer.step()
        assert torch.equal(p.grad, before)


# Memory that others change ------------------------------------------------------------------------


def swapped(optimizer: Any, params: list[nn.Parameter]) -> None:
    old = params[0].data
    params[0].data = nonzero(*old.shape)
    old.fill_(7.0)


def exchanged(optimizer: Any, params: list[nn.Parameter]) -> None:
    a, b = nn.Parameter(nonzero(4)), nn.Parameter(nonzero(4))
    optimizer.add_param_group({"params": [a, b]})
    params += [a, b]
    steps(optimizer, params, 2)
    a.data, b.data = b.data, a.data


def transposed(optimizer: Any, params: list[nn.Parameter]) -> None:
    params[1].data = params[1].data.t().contiguous().t()


def transposed_at_the_same_place(optimizer: Any, params: list[nn.Parameter]) -> None:
    p = params[1]
    p.data = p.data.view(-1).as_strided(p.shape, (1, p.shape[0]))


def negated_view(optimizer: Any, params: list[nn.Parameter]) -> None:
    params[1].data = torch._neg_view(params[1].data)


def negated_slot(optimizer: Any, params: list[nn.Parameter]) -> None:
    state = optimizer.state[params[0]]
    state["exp_avg"] = torch._neg_view(state["exp_avg"])


def new_slot(optimizer: Any, params: list[nn.Parameter]) -> None:
    optimizer.state[params[0]]["exp_avg"] = nonzero(*params[0].shape)


def slot_data(optimizer: Any, params: list[nn.Parameter]) -> None:
    optimizer.state[params[0]]["exp_avg"].data = nonzero(*params[0].shape)


def one_slot_for_two(optimizer: Any, params: list[nn.Parameter]) -> None:
    a, b = nn.Parameter(nonzero(4)), nn.Parameter(nonzero(4))
    optimizer.add_param_group({"params": [a, b]})
    params += [a, b]
    steps(optimizer, params, 2)
    optimizer.state[a]["exp_avg"] = optimizer.state[b]["exp_avg"]


def loaded(optimizer: Any, params: list[nn.Parameter]) -> None:
    saved = copy.deepcopy(optimizer.state_dict())
    steps(optimizer, params, 2)
    optimizer.load_state_dict(saved)


def cleared(optimizer: Any, params: list[nn.Parameter]) -> None:
    del optimizer.state[params[0]]


def counted(optimizer: Any, params: list[nn.Parameter]) -> None:
    optimizer.state[params[0]]["step"] = 100


def count_as_tensor(optimizer: Any, params: list[nn.Parameter]) -> None:
    for p in params:
        optimizer.state[p]["step"] = torch.tensor(9.0)


def group_later(optimizer: Any, params: list[nn.Parameter]) -> None:
    params.append(nn.Parameter(nonzero(5)))
    optimizer.add_param_group({"params": params[-1:], "lr": 0.5, "weight_decay": 0.0})


def parameter_gone(optimizer: Any, params: list[nn.Parameter]) -> None:
    gone = optimizer.param_groups[0]["params"].pop(0)
    gone.grad = None


def parameter_replaced(optimizer: Any, params: list[nn.Parameter]) -> None:
    params[0] = nn.Parameter(nonzero(12))
    optimizer.param_groups[0]["params"][0] = params[0]


def frozen(optimizer: Any, params: list[nn.Parameter]) -> None:
    params[0].grad = None
    params[1].grad = nonzero(3, 4)
    optimizer.step()


def copied(optimizer: Any, params: list[nn.Parameter]) -> None:
    other = copy.deepcopy(optimizer)
    theirs = [p for group in other.param_groups for p in group["params"]]
    steps(other, theirs, 3)


CHANGES = (
    swapped,
    exchanged,
    transposed,
    transposed_at_the_same_place,
    negated_view,
    negated_slot,
    new_slot,
    slot_data,
    one_slot_for_two,
    loaded,
    cleared,
    counted,
    count_as_tensor,
    group_later,
    parameter_gone,
    parameter_replaced,
    frozen,
    copied,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_changes_between_steps(change: Drive, in_place: list[bool]) -> None:
    def drive(optimizer: Any, params: list[nn.Parameter]) -> None:
        steps(optimizer, params, 3)
        change(optimizer, params)
        steps(optimizer, params, 3)

    assert_same(drive)
    assert in_place.count(True) >= 2


def test_other_shape_of_as_many_entries_is_refused() -> None:
    """A parameter that has another shape than its slots and gradient is an error, fused or not."""
    for setting in (None, False):
        p = nn.Parameter(nonzero(3, 4))
        optimizer = torchopt.Adam([p], use_accelerated_op=setting)
        steps(optimizer, [p], 3)
        p.data = p.data.view(4, 3)
        before = p.detach().clone()
        with pytest.raises((RuntimeError, ValueError)):
            optimizer.step()
        assert torch.equal(p, before)


def test_other_dtype_at_the_same_place_is_refused() -> None:
    """What was looked at once, the kernel must not take for granted: it would read too far."""
    for setting in (None, False):
        p = nn.Parameter(nonzero(1000))
        optimizer = torchopt.Adam([p], use_accelerated_op=setting)
        steps(optimizer, [p], 3)
        p.data = p.data.view(torch.float32)[:1000]
        p.grad = None
        p.grad = torch.ones(1000)
        before = p.detach().clone()
        with pytest.raises((RuntimeError, TypeError)):
            optimizer.step()
        assert torch.equal(p.nan_to_num(), before.nan_to_num())
