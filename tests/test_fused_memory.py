"""Parameters, slots and gradients that share memory, and parameters that cannot be written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import nonzero
from fusing import needs_library
from test_fused_inplace import assert_same, steps
from tolerances import assert_close
from torch import Tensor, nn

import torchopt


pytestmark = needs_library


def test_one_gradient_for_two_parameters() -> None:
    def drive(optimizer: Any, params: list[nn.Parameter]) -> None:
        for _ in range(4):
            params[0].grad = params[1].grad = nonzero(6)
            optimizer.step()

    assert_same(drive, lambda: [nonzero(6), nonzero(6)])


def test_two_optimizers_over_one_parameter() -> None:
    results = []
    for setting in (None, False):
        torch.manual_seed(11)
        p = nn.Parameter(nonzero(8))
        first = torchopt.Adam([p], lr=0.1, use_accelerated_op=setting)
        second = torchopt.SGD([p], lr=0.1, momentum=0.9, use_accelerated_op=setting)
        for _ in range(4):
            steps(first, [p], 2)
            steps(second, [p], 1)
        results.append(p.detach())
    assert_close(results[0], results[1])


def gradient_is_parameter(params: list[nn.Parameter], optimizer: Any) -> None:
    for p in params:
        p.grad = p.detach()


def gradients_are_the_other_parameter(params: list[nn.Parameter], optimizer: Any) -> None:
    params[0].grad, params[1].grad = params[1].detach(), params[0].detach()


def gradient_is_slot(params: list[nn.Parameter], optimizer: Any) -> None:
    for p in params:
        p.grad = optimizer.state[p]["exp_avg"]


def gradients_are_the_other_slot(params: list[nn.Parameter], optimizer: Any) -> None:
    a, b = params
    a.grad, b.grad = optimizer.state[b]["exp_avg"], optimizer.state[a]["exp_avg_sq"]


def gradient_beside_parameter(params: list[nn.Parameter], optimizer: Any) -> None:
    base = nonzero(601)
    params[0].data, params[0].grad = base[1:], base[:-1]
    params[1].grad = nonzero(600)


def gradient_beside_slot(params: list[nn.Parameter], optimizer: Any) -> None:
    base = nonzero(601).abs()
    optimizer.state[params[0]]["exp_avg_sq"], params[0].grad = base[1:], base[:-1]
    params[1].grad = nonzero(600)


ALIASES = (
    gradient_is_parameter,
    gradients_are_the_other_parameter,
    gradient_is_slot,
    gradients_are_the_other_slot,
    gradient_beside_parameter,
    gradient_beside_slot,
)


@pytest.mark.parametrize("alias", ALIASES, ids=lambda f: f.__name__)
def test_gradients_in_memory_that_is_overwritten(alias: Any) -> None:
    """All gradients are read before anything is written."""

    def drive(optimizer: Any, params: list[nn.Parameter]) -> None:
        steps(optimizer, params, 3)
        alias(params, optimizer)
        optimizer.step()

    assert_same(drive, lambda: [nonzero(600), nonzero(600)])


@pytest.mark.parametrize("shift", [0, 1, 100])
def test_parameters_that_overlap(shift: int) -> None:
    """Each update is computed from what the parameters were before the step."""

    def make() -> list[Tensor]:
        base = nonzero(700)
        return [base[:600], base[shift : shift + 600]]

    assert_same(lambda optimizer, params: steps(optimizer, params, 4), make)


@pytest.mark.parametrize("alias", ALIASES, ids=lambda f: f.__name__)
def test_gradients_in_memory_of_another_group(alias: Any) -> None:
    """All groups are read before any of them is written."""
    results = []
    for setting in (None, False):
        torch.manual_seed(11)
        params = [nn.Parameter(nonzero(600)) for _ in range(2)]
        groups = [{"params": [p], "weight_decay": 0.1} for p in params]
        optimizer = torchopt.Adam(groups, lr=0.05, use_accelerated_op=setting)
        steps(optimizer, params, 3)
        alias(params, optimizer)
        optimizer.step()
        results.append([p.detach() for p in params])
    assert_close(results[0], results[1])


@pytest.mark.parametrize("setting", [None, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("groups", [1, 2], ids=["one-group", "two-groups"])
@pytest.mark.parametrize("shift", [0, 7])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_parameters_that_share_memory_get_both_updates(
    momentum: float, shift: int, groups: int, setting: bool | None
) -> None:
    """Each adds its update to what is there, as in ``torch.optim``: none overwrites the other's."""

    def run(cls: Any, **options: Any) -> Tensor:
        torch.manual_seed(3)
        base = nonzero(70)
        params = [nn.Parameter(base[:60]), nn.Parameter(base[shift : shift + 60])]
        own = [{"params": params[k::groups]} for k in range(groups)]
        steps(cls(own, lr=0.1, momentum=momentum, **options), params, 4)
        return base

    expected = run(torch.optim.SGD)
    assert_close(run(torchopt.SGD, use_accelerated_op=setting), expected, times=4)


@pytest.mark.parametrize("setting", [None, False], ids=["fused", "unfused"])
def test_a_parameter_that_cannot_be_written_is_refused(setting: bool | None) -> None:
    """An expanded parameter is an error of torch's; nothing has changed then."""
    good, bad = nn.Parameter(nonzero(3)), nn.Parameter(nonzero(1).expand(3))
    optimizer = torchopt.Adam([good, bad], use_accelerated_op=setting)
    good.grad, bad.grad = nonzero(3), nonzero(3)
    before = good.detach().clone()
    with pytest.raises(RuntimeError, match="single memory location"):
        optimizer.step()
    assert torch.equal(good, before)
    assert not optimizer.state.get(good)
    assert not optimizer.state.get(bad)


@pytest.mark.parametrize("shift", [0, 7])
def test_parameters_of_two_groups_that_overlap(shift: int) -> None:
    """Fused or not, what is read has the same age."""
    results = []
    for setting in (None, False):
        torch.manual_seed(3)
        base = nonzero(70)
        params = [nn.Parameter(base[:60]), nn.Parameter(base[shift : shift + 60])]
        groups = [{"params": [p], "weight_decay": 0.5} for p in params]
        steps(torchopt.Adam(groups, lr=0.1, use_accelerated_op=setting), params, 4)
        results.append(base)
    assert_close(results[0], results[1])


def test_parameters_made_in_inference_mode() -> None:
    """They have no version to count, and are updated all the same."""
    with torch.inference_mode():
        for setting in (None, False):
            p = nn.Parameter(torch.ones(3))
            optimizer = torchopt.SGD([p], 0.1, momentum=0.5, use_accelerated_op=setting)
            for _ in range(3):
                p.grad = torch.ones(3)
                optimizer.step()
            assert_close(p, torch.full((3,), 1 - 0.1 * (1 + 1.5 + 1.75)), times=4)
