"""Clipping, training and profiling of torch work with our optimizers."""

from __future__ import annotations

import torch
from cases import Case, every_case, every_torch_case
from conftest import nonzero
from stepping import data, parameters, set_grads, twins
from tolerances import assert_close
from torch import nn

import torchopt


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
