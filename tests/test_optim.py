"""The object-oriented face: what it is, its groups, its parameters, its keywords."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import pytest
import torch
from cases import Case, every_case, every_torch_case
from conftest import nonzero
from stepping import assert_same_path, data, pair, parameters, set_grads, twins
from tolerances import assert_close
from torch import nn

import torchopt


@every_case
def test_it_is_a_torch_optimizer(case: Case) -> None:
    params = parameters()
    optimizer = case.cls(params, **case.kwargs)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert isinstance(optimizer, torchopt.Optimizer)
    assert optimizer.transformation == case.tx()
    (group,) = optimizer.param_groups
    assert group["params"] == params
    assert {k: v for k, v in group.items() if k in case.kwargs} == case.kwargs
    assert optimizer.defaults.items() >= case.kwargs.items()
    assert repr(optimizer).startswith(f"{case.cls.__name__} (\nParameter Group 0")


@every_case
def test_it_is_the_functional_face(case: Case) -> None:
    p = parameters()
    q = data(twins(p))
    for optimizer in (case.cls(p, **case.kwargs), torchopt.Optimizer(twins(p), case.tx())):
        own = optimizer.param_groups[0]["params"]
        tx, expected = case.tx(), [x.clone() for x in q]
        state = tx.init(expected)
        for _ in range(4):
            set_grads(own)
            updates, state = tx.update([x.grad for x in own], state, expected, inplace=False)
            expected = torchopt.apply_updates(expected, updates, inplace=False)
            optimizer.step()
            assert_close(data(own), expected)


@every_torch_case
def test_signature_takes_the_arguments_of_torch(case: Case) -> None:
    """Positional arguments in torch's order, and every keyword of torch's class."""
    ours = list(inspect.signature(case.cls).parameters.values())
    theirs = list(inspect.signature(case.torch_cls).parameters.values())
    positional = [p.name for p in theirs if p.kind is p.POSITIONAL_OR_KEYWORD]
    switches = {"foreach", "fused", "capturable", "differentiable"}
    shared = list(itertools.takewhile(lambda name: name not in switches, positional))
    assert len(shared) > 3
    assert [p.name for p in ours][: len(shared)] == shared
    theirs = [p for p in theirs if p.name != "decoupled_weight_decay"]  # that is AdamW
    assert {p.name for p in theirs} <= {p.name for p in ours}
    defaults = {p.name: p.default for p in ours}
    for p in theirs:
        if p.name not in ("params", *switches):
            assert defaults[p.name] == p.default, p.name


# Groups and live hyperparameters ------------------------------------------------------------------


@every_torch_case
def test_hyperparameters_are_read_at_every_step(case: Case) -> None:
    ours, theirs, p, q = pair(case)

    def change(optimizer: Any, k: int) -> None:
        group = optimizer.param_groups[0]
        group["lr"] *= 0.7
        group["weight_decay"] = 0.05 * k
        if "betas" in group:
            group["betas"] = (0.5 + 0.05 * k, 0.9)
        if group.get("momentum"):
            group["momentum"] = 0.5 + 0.05 * k

    assert_same_path(ours, theirs, p, q, change)


@every_torch_case
def test_tensor_lr(case: Case) -> None:
    lr = torch.tensor(case.kwargs["lr"], dtype=torch.float64)
    ours, theirs, p, q = pair(case, lr=lr)
    theirs.param_groups[0]["lr"] = lr.item()
    assert_same_path(ours, theirs, p, q, steps=3)
    lr.fill_(0.5)
    ours.param_groups[0]["lr"].fill_(0.5)
    theirs.param_groups[0]["lr"] = 0.5
    assert_same_path(ours, theirs, p, q, steps=3)


def test_a_learned_lr_is_used_but_not_recorded() -> None:
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    params = parameters()
    optimizer = torchopt.SGD(params, lr=lr, momentum=0.9)
    before = [x.clone() for x in data(params)]
    set_grads(params)
    optimizer.step()
    assert_close(data(params), [x - 0.1 * p.grad for x, p in zip(before, params)])
    assert all(p.is_leaf and p.grad_fn is None for p in params)
    assert not optimizer.state[params[0]]["momentum_buffer"].requires_grad


def test_lr_per_parameter_by_name() -> None:
    net = nn.Linear(2, 1).double()
    lr = {"weight": 0.5, "bias": torch.tensor([0.25], dtype=torch.float64)}
    optimizer = torchopt.SGD(net.named_parameters(), lr=lr)
    before = [x.clone() for x in data(list(net.parameters()))]
    set_grads(list(net.parameters()))
    optimizer.step()
    assert_close(net.weight.detach(), before[0] - 0.5 * net.weight.grad)
    assert_close(net.bias.detach(), before[1] - 0.25 * net.bias.grad)


def test_lr_per_parameter_by_name_over_two_groups() -> None:
    a, b = parameters()
    groups = [{"params": [("a", a)]}, {"params": [("b", b)], "momentum": 0.5}]
    optimizer = torchopt.SGD(groups, lr={"a": 0.5, "b": 0.25})
    before = [x.clone() for x in data([a, b])]
    set_grads([a, b])
    optimizer.step()
    assert_close(data([a, b]), [before[0] - 0.5 * a.grad, before[1] - 0.25 * b.grad])


# Parameters ---------------------------------------------------------------------------------------


@every_torch_case
def test_unused_and_frozen_parameters_stay(case: Case) -> None:
    p = [*parameters(), nn.Parameter(nonzero(2)), nn.Parameter(nonzero(2), requires_grad=False)]
    q = twins(p[:2])
    ours, theirs = case.cls(p, **case.kwargs), case.torch_cls(q, **case.kwargs)
    still = [x.clone() for x in data(p[2:])]
    for _ in range(3):
        set_grads(p[:2], q)
        ours.step()
        theirs.step()
    assert_close(data(p[:2]), data(q), times=10)
    assert all(torch.equal(x, y) for x, y in zip(data(p[2:]), still))
    assert not ours.state.get(p[2])
    assert not ours.state.get(p[3])
    p[2].grad = nonzero(2)  # it joins late and counts its own steps
    alone = [nn.Parameter(still[0].clone())]
    alone[0].grad = p[2].grad.clone()
    p[0].grad = p[1].grad = None
    ours.step()
    case.torch_cls(alone, **case.kwargs).step()
    assert_close(p[2].detach(), alone[0].detach(), times=10)


@every_torch_case
def test_parameters_that_get_no_gradient_now_and_then(case: Case) -> None:
    ours, theirs, p, q = pair(case)
    for k in range(6):
        set_grads(p, q)
        if k % 2:
            p[0].grad = q[0].grad = None
        ours.step()
        theirs.step()
        assert_close(data(p), data(q), times=10)


def test_a_step_without_any_gradient_does_nothing() -> None:
    params = parameters()
    optimizer = torchopt.AdamW(params, weight_decay=0.1)
    before = [x.clone() for x in data(params)]
    assert optimizer.step() is None
    assert all(torch.equal(x, y) for x, y in zip(data(params), before))
    assert not optimizer.state


@every_torch_case
def test_step_does_not_change_the_gradients(case: Case) -> None:
    for maximize in (False, True):
        optimizer, _, params, _ = pair(case, maximize=maximize)
        for _ in range(3):
            set_grads(params)
            grads = [p.grad for p in params]
            values, versions = [g.clone() for g in grads], [g._version for g in grads]
            optimizer.step()
            assert all(p.grad is g for p, g in zip(params, grads))
            assert all(torch.equal(g, v) for g, v in zip(grads, values))
            assert [g._version for g in grads] == versions


@every_torch_case
@pytest.mark.parametrize("set_to_none", [True, False], ids=["none", "zeros"])
def test_zero_grad(case: Case, set_to_none: bool) -> None:
    """Gradient buffers that are zeroed and reused must not change what the state remembers."""
    ours, theirs, p, q = pair(case)
    for _ in range(4):
        weight = nonzero(2, 3)
        for x, optimizer in ((p, ours), (q, theirs)):
            optimizer.zero_grad(set_to_none=set_to_none)
            assert all((y.grad is None) if set_to_none else True for y in x)
            ((x[0] * weight).sum() ** 2 + (x[1] ** 3).sum()).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
        assert_close(data(p), data(q), times=10)
    for y in p:
        assert y.grad is None if set_to_none else torch.equal(y.grad, torch.zeros_like(y))


@every_torch_case
def test_add_param_group(case: Case) -> None:
    p = [*parameters(), nn.Parameter(nonzero(4))]
    q = twins(p)
    ours, theirs = case.cls(p[:1], **case.kwargs), case.torch_cls(q[:1], **case.kwargs)
    assert_same_path(ours, theirs, p[:1], q[:1], steps=2)
    ours.add_param_group({"params": p[1:], "lr": 0.3})
    theirs.add_param_group({"params": q[1:], "lr": 0.3})
    assert ours.param_groups[1].items() >= {**case.kwargs, "lr": 0.3}.items()
    assert_same_path(ours, theirs, p, q, steps=3)


def test_add_param_group_with_names() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)).double()
    optimizer = torchopt.Adam(net[0].named_parameters())
    optimizer.add_param_group({"params": list(net[1].named_parameters("1"))})
    assert optimizer.param_groups[1]["param_names"] == ["1.weight", "1.bias"]
    net[1].weight.grad = nonzero(1, 2).to_sparse()
    with pytest.raises(TypeError, match=r"gradient of '1\.weight' is sparse"):
        optimizer.step()


def test_add_param_group_refuses_what_torch_refuses() -> None:
    params = parameters()
    optimizer = torchopt.SGD(params, lr=0.1)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": params[:1]})
    with pytest.raises(TypeError, match="must be a dict"):
        optimizer.add_param_group(torch.nn.Linear(2, 1))
    with pytest.raises(ValueError, match="lr must be >= 0"):
        optimizer.add_param_group({"params": parameters(), "lr": -0.1})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match="empty parameter list"):
        torchopt.SGD([])
    with pytest.raises(ValueError, match="lr must be >= 0"):
        torchopt.SGD([{"params": params, "lr": -1.0}])
    with pytest.raises(TypeError, match="expects a gradient transformation"):
        torchopt.Optimizer(params, torchopt.adam)


# Keywords of torch.optim --------------------------------------------------------------------------


@every_torch_case
def test_foreach_and_fused_false_change_nothing(case: Case) -> None:
    for foreach in (None, True, False):
        p = parameters()
        q = twins(p)
        ours = case.cls(p, **case.kwargs, foreach=foreach, fused=False, capturable=False)
        assert_same_path(ours, case.torch_cls(q, **case.kwargs), p, q, steps=3)


@every_torch_case
def test_switches_that_cannot_be_met_say_what_to_do(case: Case) -> None:
    params = parameters()
    with pytest.raises(ValueError, match=rf"Meta{case.cls.__name__}.*inplace=False"):
        case.cls(params, differentiable=True)
    with pytest.raises(ValueError, match="capturable=False"):
        case.cls(params, capturable=True)
    with pytest.raises(TypeError, match=r"has no argument 'nonsense'\. It takes lr, "):
        case.cls(params, nonsense=1)


@every_case
def test_use_accelerated_op(case: Case) -> None:
    params = parameters()
    for value in (None, False):
        optimizer = case.cls(params, **case.kwargs, use_accelerated_op=value)
        assert optimizer.transformation == case.tx()
    for keywords in ({"use_accelerated_op": True}, {"fused": True}):
        if torchopt.accelerated_op_available():
            parts = case.cls(params, **keywords).transformation.parts
            assert all(part.use_accelerated_op for part in parts)
        else:
            with pytest.raises(RuntimeError, match=r"use_accelerated_op=True.*fused"):
                case.cls(params, **keywords)
    with pytest.raises(TypeError, match="use_accelerated_op must be None, True or False"):
        case.recipe(use_accelerated_op="yes")
