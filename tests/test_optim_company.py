"""Scaling, clipping, averaging, saving and profiling of torch work with our optimizers."""

from __future__ import annotations

import math

import torch
from cases import Case, every_case, every_torch_case
from conftest import nonzero
from stepping import data, pair, parameters, set_grads, twins
from tolerances import assert_close
from torch import nn

import torchopt


@every_torch_case
def test_grad_scaler(case: Case) -> None:
    """An overflowing step is skipped; the others are those of unscaled training."""
    ours, theirs, p, q = pair(case)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for k in range(4):
        weight = nonzero(2, 3)
        if k == 1:
            weight[0, 0] = math.inf
        ours.zero_grad()
        scaler.scale((p[0] * weight).sum() + (p[1] ** 2).sum()).backward()
        before = [x.clone() for x in data(p)]
        scaler.step(ours)
        scaler.update()
        if k == 1:
            assert all(torch.equal(x, y) for x, y in zip(data(p), before))
            continue
        theirs.zero_grad()
        ((q[0] * weight).sum() + (q[1] ** 2).sum()).backward()
        theirs.step()
        assert_close(data(p), data(q), times=10)
    assert scaler.get_scale() == 2.0**7


@every_torch_case
def test_clip_grad_norm_before_step(case: Case) -> None:
    """Clipping by torch's utility and clipping in the chain are one and the same."""
    p = parameters()
    q = twins(p)
    ours = torchopt.Optimizer(p, torchopt.chain(torchopt.clip_grad_norm(0.5), case.tx()))
    theirs = case.cls(q, **case.kwargs)
    for _ in range(3):
        set_grads(p, q)
        assert torch.nn.utils.clip_grad_norm_(q, 0.5) > 0.5
        ours.step()
        theirs.step()
        assert_close(data(p), data(q), times=10)


def test_averaged_model() -> None:
    net = nn.Linear(3, 1).double()
    average = torch.optim.swa_utils.AveragedModel(net)
    optimizer = torchopt.SGD(net.parameters(), lr=0.1, momentum=0.9)
    path = []
    for _ in range(4):
        set_grads(list(net.parameters()))
        optimizer.step()
        average.update_parameters(net)
        path.append(net.weight.detach().clone())
    assert not torch.equal(path[0], path[1])
    assert_close(average.module.weight.detach(), torch.stack(path).mean(0), times=10)


@every_case
def test_training_lowers_the_loss_of_a_network(case: Case) -> None:
    torch.manual_seed(1)
    x, y = nonzero(32, 3), nonzero(32, 1)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    decays = {n: 0.0 for n in case.algorithm.decays if n in case.algorithm.defaults()}
    optimizer = case.cls(net.parameters(), **{**case.kwargs, **decays})
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(net(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_profiler_names_the_step_after_the_class() -> None:
    params = parameters()
    optimizer = torchopt.AdamW(params)
    set_grads(params)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    assert "Optimizer.step#AdamW.step" in {event.key for event in profile.key_averages()}
