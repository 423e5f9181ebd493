"""What ``state_dict`` returns belongs together, whatever the optimizer does afterwards."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Case, every_case
from conftest import nonzero
from torch import Tensor, nn

import torchopt


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(nonzero(2, 3)), nn.Parameter(nonzero(4))]


def train(optimizer: Any, params: list[nn.Parameter], grads: list[Any]) -> None:
    for row in grads:
        for p, g in zip(params, row):
            p.grad = None if g is None else g.clone()
        optimizer.step()


def gradients(params: list[nn.Parameter], steps: int) -> list[Any]:
    return [[nonzero(*p.shape) for p in params] for _ in range(steps)]


def assert_goes_back(
    make: Callable[[list[nn.Parameter]], Any],
    between: Callable[[Any, list[nn.Parameter]], Any],
    copied: Callable[[Any], Any] = lambda state: state,
) -> None:
    """Assert that a path taken again from a snapshot is the same one, bit by bit."""
    params = parameters()
    optimizer = make(params)
    train(optimizer, params, gradients(params, 3))
    snapshot = copied(optimizer.state_dict())
    weights = [p.detach().clone() for p in params]
    deep = copy.deepcopy(snapshot)
    ahead = gradients(params, 4)
    train(optimizer, params, ahead)
    expected = [p.detach().clone() for p in params]
    between(optimizer, params)
    assert_equal(snapshot, deep)
    optimizer.load_state_dict(snapshot)
    with torch.no_grad():
        for p, w in zip(params, weights):
            p.copy_(w)
    train(optimizer, params, ahead)
    assert all(torch.equal(p, e) for p, e in zip(params, expected))
    assert_equal(snapshot, deep)


def assert_equal(a: Any, b: Any) -> None:
    if isinstance(a, Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b


def many_steps(optimizer: Any, params: list[nn.Parameter]) -> None:
    train(optimizer, params, gradients(params, 5))


def now_and_then(optimizer: Any, params: list[nn.Parameter]) -> None:
    """A parameter without gradient keeps the slots that the snapshot holds, then moves again."""
    optimizer.state_dict()
    train(optimizer, params, [[nonzero(2, 3), None], [None, nonzero(4)]])
    many_steps(optimizer, params)


def by_rules_and_kernels(optimizer: Any, params: list[nn.Parameter]) -> None:
    own = optimizer.transformation
    for setting in (False, None):
        optimizer.transformation = own.with_accelerated_op(setting)
        many_steps(optimizer, params)
        optimizer.state_dict()
    optimizer.transformation = own


def nothing(optimizer: Any, params: list[nn.Parameter]) -> None:
    train(optimizer, params, [[None, None]])


def into_another(optimizer: Any, params: list[nn.Parameter]) -> None:
    other, theirs = copy.deepcopy((optimizer, params))
    many_steps(other, theirs)
    other.load_state_dict(optimizer.state_dict())
    many_steps(other, theirs)


BETWEEN = (many_steps, now_and_then, by_rules_and_kernels, nothing, into_another)


@pytest.mark.sampled(3)
@every_case
@pytest.mark.parametrize("setting", [None, False], ids=["fused", "rules"])
@pytest.mark.parametrize("between", BETWEEN, ids=lambda f: f.__name__)
def test_a_snapshot_stays_as_it_was(case: Case, setting: Any, between: Any) -> None:
    tx = case.tx().with_accelerated_op(setting)
    assert_goes_back(lambda p: torchopt.Optimizer(p, tx), between)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_of_a_snapshot(copied: Any) -> None:
    assert_goes_back(lambda p: torchopt.Adam(p, 0.1), many_steps, copied)


def test_the_first_step_after_going_back_moves_by_the_rate() -> None:
    """Constant gradients: bias correction and moments of one step give the rate exactly."""
    p = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = torchopt.Adam([p], lr=0.1, eps=0.0)
    train(optimizer, [p], [[torch.full((3,), 2.0, dtype=torch.float64)]])
    snapshot = optimizer.state_dict()
    train(optimizer, [p], [[torch.full((3,), -0.01 * k, dtype=torch.float64)] for k in range(1, 9)])
    optimizer.load_state_dict(snapshot)
    before = p.detach().clone()
    train(optimizer, [p], [[torch.full((3,), 2.0, dtype=torch.float64)]])
    assert torch.allclose(before - p.detach(), torch.full_like(before, 0.1), rtol=1e-12, atol=0)


def test_a_rate_that_is_changed_in_place_does_not_change_the_snapshot() -> None:
    params = parameters()
    optimizer = torchopt.Adam(params, lr=torch.tensor(0.1))
    snapshot = optimizer.state_dict()
    optimizer.param_groups[0]["lr"].fill_(0.7)
    assert snapshot["param_groups"][0]["lr"] == torch.tensor(0.1)


def test_optimizer_and_snapshot_copied_together_do_not_share() -> None:
    params = parameters()
    optimizer = torchopt.Adam(params, lr=0.1)
    train(optimizer, params, gradients(params, 3))
    for way in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        other, theirs, snapshot = way((optimizer, params, optimizer.state_dict()))
        before = copy.deepcopy(snapshot)
        train(other, theirs, gradients(theirs, 3))
        assert_equal(snapshot, before)


def test_a_slot_that_the_rule_leaves_alone_is_not_overwritten_later() -> None:
    params = parameters()
    optimizer = torchopt.SGD(params, lr=0.1, momentum=0.9)
    train(optimizer, params, gradients(params, 3))
    snapshot = optimizer.state_dict()
    before = copy.deepcopy(snapshot)
    for momentum in (0.0, 0.9):
        optimizer.param_groups[0]["momentum"] = momentum
        train(optimizer, params, gradients(params, 3))
    assert_equal(snapshot, before)


def test_only_one_step_after_a_snapshot_makes_new_slots() -> None:
    params = parameters()
    optimizer = torchopt.Adam(params)
    train(optimizer, params, gradients(params, 2))
    old = optimizer.state[params[0]]["exp_avg"]
    optimizer.state_dict()
    train(optimizer, params, gradients(params, 1))
    new = optimizer.state[params[0]]["exp_avg"]
    assert new is not old
    train(optimizer, params, gradients(params, 2))
    if torchopt.accelerated_op_available():
        assert optimizer.state[params[0]]["exp_avg"] is new


def test_a_checkpoint_of_gradient_scaling_goes_back() -> None:
    params = parameters()
    optimizer = torchopt.Adam(params, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    def scaled(row: Any) -> None:
        optimizer.zero_grad()
        loss = torch.stack([(p * g).sum() for p, g in zip(params, row)]).sum()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    for row in gradients(params, 3):
        scaled(row)
    snapshot, weights = optimizer.state_dict(), [p.detach().clone() for p in params]
    ahead = gradients(params, 3)
    results = []
    for _ in range(2):
        optimizer.load_state_dict(snapshot)
        with torch.no_grad():
            for p, w in zip(params, weights):
                p.copy_(w)
        for row in ahead:
            scaled(row)
        results.append([p.detach().clone() for p in params])
    assert all(torch.equal(a, b) for a, b in zip(*results))
