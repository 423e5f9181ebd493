"""Slots that somebody gives are used, also at count 0, and can be learned."""

from __future__ import annotations

import pytest
import torch
from cases import every_meta_case
from tolerances import META_GRADIENT, assert_close
from torch import nn

import torchopt


STEPS_BEFORE = pytest.mark.parametrize("before", [0, 1], ids=["new", "stepped"])


def slots_of(case, params):
    """Return a state with random slots above zero, at count 0 if they matter then."""
    state = case.tx().init(params)
    state.step = 3 if case.algorithm.forgets_start else 0
    for key, slot in state.slots.items():
        for name, value in slot.items():
            slot[name] = value if value is None else 0.3 + torch.rand_like(value)
            if value is not None and key in case.algorithm.definite:
                slot[name] = slot[name] @ slot[name].mT
    return state


def loss_of(net, data):
    return (net(data[0]) - data[1]).square().mean()


@every_meta_case
@STEPS_BEFORE
def test_meta_learned_initial_slots_get_their_gradient(case, before):
    torch.manual_seed(0)
    net = nn.Linear(3, 2).double()
    data = torch.randn(6, 3).double(), torch.randn(6, 2).double()
    inner = case.meta(net, **case.kwargs)
    start = torchopt.extract_state_dict(net)
    for _ in range(before):
        inner.step(loss_of(net, data))
    state = slots_of(case, {n: p.detach() for n, p in start.params.items()})
    if not state.slots:
        pytest.skip("keeps no slots")
    given = [x for column in state.slots.values() for x in column.values() if x is not None]
    leaves = [x.requires_grad_() for x in given]

    def outer_loss():
        torchopt.recover_state_dict(net, start)
        torchopt.recover_state_dict(inner, (state,))
        for _ in range(2):
            inner.step(loss_of(net, data))
        return loss_of(net, data)

    grads = torch.autograd.grad(outer_loss(), leaves, materialize_grads=True)
    directions = [torch.randn_like(x) for x in leaves]
    slope = sum((g * d).sum() for g, d in zip(grads, directions)).item()
    values = []
    for sign in (1.0, -1.0):
        with torch.no_grad():
            for x, d in zip(leaves, directions):
                x.add_(d, alpha=sign * 1e-6)
        values.append(outer_loss().item())
        with torch.no_grad():
            for x, d in zip(leaves, directions):
                x.sub_(d, alpha=sign * 1e-6)
    difference = (values[0] - values[1]) / 2e-6
    if case.flat("slots"):
        assert slope == difference == 0
        return
    assert abs(difference) > 1e-4, "the slots have no influence: nothing would be tested"
    assert abs(slope - difference) < 10 * META_GRADIENT * abs(difference)


def expected_momentum(b, g, momentum, nesterov):
    b = momentum * b + g
    return (g + momentum * b if nesterov else b), b


@pytest.mark.parametrize("use", [None, False], ids=["fused", "rules"])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_given_momentum_buffer_at_count_0_on_all_faces(use, nesterov, dtype):
    g, p, b = (torch.randn(4, dtype=dtype) for _ in range(3))
    step, buffer = expected_momentum(b, g, 0.9, nesterov)
    expected = p - 0.1 * step
    arguments = {"lr": 0.1, "momentum": 0.9, "nesterov": nesterov, "use_accelerated_op": use}
    tx = torchopt.sgd(**arguments)
    given = torchopt.OptState(0, {"momentum_buffer": {"w": b}})
    new, state = tx.apply_gradients({"w": g}, given, {"w": p}, inplace=False)
    assert_close(new["w"], expected)
    assert_close(state.momentum_buffer["w"], buffer)

    param = nn.Parameter(p.clone())
    optimizer = torchopt.SGD([param], **arguments)
    optimizer.state[param] = {"momentum_buffer": b.clone(), "step": 0}
    param.grad = g
    optimizer.step()
    assert_close(param.detach(), expected)

    net = nn.ParameterDict({"w": p.clone()})
    inner = torchopt.MetaSGD(net, **arguments)
    torchopt.recover_state_dict(inner, (given,))
    inner.step((net["w"] * g).sum())
    assert_close(net["w"].detach(), expected)


@pytest.mark.parametrize("use", [None, False], ids=["fused", "rules"])
def test_a_fresh_buffer_becomes_the_gradient_whatever_the_dampening(use):
    w, grads = torch.randn(5).double(), torch.randn(4, 5).double()
    ours, theirs = (nn.Parameter(w.clone()) for _ in range(2))
    arguments = {"lr": 0.1, "momentum": 0.8, "dampening": 0.6}
    optimizers = (
        torchopt.SGD([ours], **arguments, use_accelerated_op=use),
        torch.optim.SGD([theirs], **arguments),
    )
    tx = torchopt.sgd(**arguments, use_accelerated_op=use)
    params = {"w": w}
    state = tx.init(params)
    for g in grads:
        for optimizer, p in zip(optimizers, (ours, theirs)):
            p.grad = g.clone()
            optimizer.step()
        params, state = tx.apply_gradients({"w": g}, state, params, inplace=False)
        assert_close(ours.detach(), theirs.detach())
        assert_close(params["w"], theirs.detach())


def test_a_count_in_a_tensor_applies_the_same_rule():
    g, b = torch.randn(3), torch.randn(3)
    tx = torchopt.trace(0.9, dampening=0.4)
    for count, factor in ((0, 1.0), (1, 0.6)):
        state = torchopt.OptState(torch.tensor(count), {"momentum_buffer": [b]})
        (u,), _ = tx.update([g], state, inplace=False)
        assert_close(u, 0.9 * b + factor * g)
