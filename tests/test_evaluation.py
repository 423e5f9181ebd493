"""Weights to evaluate with, of every optimizer that has others than it trains: nothing is lost."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from cases import CASES, Case
from conftest import nonzero
from tolerances import assert_close
from torch import Tensor, nn

import torchopt
from torchopt.core.evaluation import evaluates


every_row = pytest.mark.parametrize(
    "case", [case for case in CASES if evaluates(case.tx())], ids=lambda case: case.name
)
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str
)


def made(case: Case, dtype: torch.dtype, steps: int = 4) -> tuple[list[nn.Parameter], Any]:
    params = [nn.Parameter(nonzero(2, 3, dtype=dtype)), nn.Parameter(nonzero(3, dtype=dtype))]
    optimizer = case.cls(params, **case.kwargs)
    go_on(params, optimizer, steps)
    return params, optimizer


def go_on(params: list[nn.Parameter], optimizer: Any, steps: int) -> None:
    for _ in range(steps):
        for p in params:
            p.grad = p.detach() ** 2 - p.detach()
        optimizer.step()


def values(params: list[nn.Parameter]) -> list[Tensor]:
    return [p.detach().clone() for p in params]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(map(torch.equal, a, b))


@every_dtype
@every_row
def test_an_evaluation_changes_no_bit_of_the_training(case: Case, dtype: torch.dtype) -> None:
    params, optimizer = made(case, dtype)
    twins, peer = copy.deepcopy((params, optimizer))
    for _ in range(3):
        before = values(params)
        optimizer.eval()
        assert not same(values(params), before)
        optimizer.train()
        go_on(params, optimizer, 1)
        go_on(twins, peer, 1)
    assert same(values(params), values(twins))
    assert all(optimizer.state[p].keys() == peer.state[q].keys() for p, q in zip(params, twins))


@every_dtype
@every_row
def test_nor_does_a_checkpoint_or_a_copy_in_between(case: Case, dtype: torch.dtype) -> None:
    params, optimizer = made(case, dtype)
    trained = values(params)
    optimizer.eval()
    evaluated = values(params)
    file = io.BytesIO()
    torch.save((evaluated, optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    others = [nn.Parameter(x) for x in weights]
    resumed: Any = case.cls(others)  # pyright: ignore[reportCallIssue]
    resumed.load_state_dict(state)
    copied = copy.deepcopy((params, optimizer))
    for own, its in ((params, optimizer), (others, resumed), copied):
        assert same(values(own), evaluated)
        its.train()
        assert same(values(own), trained)
    go_on(params, optimizer, 2)
    go_on(others, resumed, 2)
    assert same(values(others), values(params))
    # and those that were saved are not overwritten meanwhile
    resumed.load_state_dict(state)
    assert same([resumed.state[p]["trained"] for p in others], trained)


@every_row
def test_a_differentiable_optimizer_takes_a_state_of_training_only(case: Case) -> None:
    p = nn.Parameter(nonzero(3))
    optimizer = case.cls([p], **case.kwargs)
    go_on([p], optimizer, 3)
    net = nn.ParameterList([p.detach().clone()])
    inner = case.meta(net, **case.kwargs)
    optimizer.eval()
    with pytest.raises(ValueError, match=r"optimizer\.train\(\) before optimizer\.state_dict"):
        inner.load_state_dict(optimizer.state_dict())
    assert inner.extract_state()[0].step == 0
    expected = p.detach().clone()
    optimizer.train()
    inner.load_state_dict(optimizer.state_dict())
    assert_close(inner.eval_params()["0"].detach(), expected)


def test_a_trained_weight_of_another_shape_is_refused_by_name() -> None:
    p = nn.Parameter(nonzero(3))
    optimizer = torchopt.SGDScheduleFree([p], lr=0.1)
    go_on([p], optimizer, 2)
    optimizer.eval()
    state = optimizer.state_dict()
    state["state"][0]["trained"] = torch.ones(2)
    with pytest.raises(ValueError, match=r"'trained' of parameter 0 is a tensor of shape \(2,\)"):
        optimizer.load_state_dict(state)


def test_a_state_without_the_trained_weights_goes_the_way_back() -> None:
    """States of other libraries and of earlier versions have none."""
    p = nn.Parameter(nonzero(3))
    optimizer = torchopt.SGDScheduleFree([p], lr=0.1)
    go_on([p], optimizer, 3)
    before = p.detach().clone()
    optimizer.eval()
    optimizer.state[p].pop("trained")
    optimizer.train()
    assert_close(p.detach(), before, times=20)
