"""ASGD: the numbers and the average that ``torch.optim`` keeps, and rates that act a step late."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import nonzero
from fusing import needs_library
from refusing import refused
from tolerances import assert_close
from torch import nn

import torchopt
from torchopt import kernels


NUMBERS = {"lr": 0.3, "lambd": 0.2, "alpha": 0.6, "t0": 2.5, "weight_decay": 0.1}
RATES = [0.3, 0.3, 0.1, 0.7, 0.7, 0.0, 0.2]


@pytest.mark.usefixtures("float64_by_default")
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("use", [None, False], ids=["fused", "rules"])
def test_state_and_average_are_those_of_torch(use: bool | None, maximize: bool) -> None:
    ours, theirs = (nn.Parameter(torch.ones(3)) for _ in range(2))
    net = nn.ParameterDict({"p": torch.ones(3)})
    k = {**NUMBERS, "maximize": maximize}
    optimizer = torchopt.ASGD([ours], **k, use_accelerated_op=use)
    peer = torch.optim.ASGD([theirs], **k)
    inner = torchopt.MetaASGD(net, **k, use_accelerated_op=use)
    tx = torchopt.asgd(**{**k, "lr": lambda t: RATES[min(int(t), 6)]}, use_accelerated_op=use)
    params = [torch.ones(3)]
    state = tx.init(params)
    for rate in RATES:
        g = nonzero(3)
        for p, one in ((ours, optimizer), (theirs, peer)):
            one.param_groups[0]["lr"] = rate
            p.grad = g.clone()
            one.step()
        inner.param_groups[0]["lr"] = rate
        inner.step((net["p"] * g).sum())
        params, state = tx.apply_gradients([g], state, params, inplace=False)
        expected = peer.state[theirs]
        (own,) = inner.extract_state()
        for found in (ours, net["p"], params[0]):
            assert_close(found.detach(), theirs.detach())
        for ax in (optimizer.state[ours]["ax"], own.ax["p"], state.ax[0]):
            assert_close(ax.detach(), expected["ax"])
        for name in ("eta", "mu"):
            kept = [optimizer.state[ours][name], getattr(own, name), getattr(state, name)]
            assert kept == [pytest.approx(float(expected[name]), rel=1e-14)] * 3
    assert (expected["ax"] - theirs).abs().min() > 1e-3  # the average has begun
    assert_close(tx.eval_params(state, params)[0], expected["ax"])
    assert_close(inner.eval_params()["p"].detach(), expected["ax"])
    optimizer.eval()
    assert_close(ours.detach(), expected["ax"])
    optimizer.train()
    assert_close(ours.detach(), theirs.detach())


def test_another_rate_acts_one_step_late() -> None:
    """Steps with rates 1, 0.1, 0.01 and 0.001 move by 1, 1, 0.1 and 0.01, as in torch."""
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer, moves = torchopt.ASGD([p], lambd=0.0), []
    for rate in (1.0, 0.1, 0.01, 0.001):
        optimizer.param_groups[0]["lr"] = rate
        before = p.item()
        p.grad = torch.ones_like(p)
        optimizer.step()
        moves.append(before - p.item())
    assert moves == pytest.approx([1.0, 1.0, 0.1, 0.01], rel=1e-12)


@pytest.mark.usefixtures("float64_by_default")
def test_the_average_is_a_mean_and_shares_its_gradient_so() -> None:
    """Without decay, from the step after t0: each weight has the same part in it."""
    net = nn.ParameterDict({"p": nonzero(2)})
    inner, weights = torchopt.MetaASGD(net, lr=0.1, lambd=0.0, t0=2), []
    for _ in range(6):
        inner.step((net["p"] ** 3).sum())
        weights.append(net["p"])
    average = inner.eval_params()["p"]
    assert_close(average.detach(), torch.stack(weights[3:]).mean(0).detach())
    mean = torch.stack(weights[3:]).mean(0)
    (expected,) = torch.autograd.grad(mean.sum(), weights[0], retain_graph=True)
    (found,) = torch.autograd.grad(average.sum(), weights[0])
    assert_close(found, expected)


def test_a_state_for_evaluation_without_the_trained_weights_is_refused() -> None:
    p = nn.Parameter(nonzero(2))
    optimizer = torchopt.ASGD([p])
    p.grad = nonzero(2)
    optimizer.step()
    optimizer.eval()
    optimizer.state[p].pop("trained")
    with refused(RuntimeError, r"no 'trained' weights.*optimizer\.train\(\)", p, optimizer):
        optimizer.train()


@needs_library
@pytest.mark.parametrize("given", ["number", "learned"])
def test_it_is_fused_as_a_whole(given: str) -> None:
    lr: Any = 0.1 if given == "number" else torch.tensor(0.1, requires_grad=True)
    tx = torchopt.asgd(lr, lambd=0.3, t0=0.0, weight_decay=0.1)
    assert not kernels.why(tx, [torch.ones(2)], params=[torch.ones(2)])
