"""RAdam at the step where its second moment comes in: by rules, kernels and the compiler."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from cases import F64
from conftest import nonzero
from tolerances import META_GRADIENT, all_finite, assert_close
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import torchopt


BETAS = (0.8, 0.95)
#: The first step with a length of more than 5, for 0.66, 0.8, 0.95 and 0.999.
SWITCHES = {0.66: None, 0.8: 7, 0.95: 6, 0.999: 6}


def length(b2: float, t: int) -> float:
    return 2 / (1 - b2) - 1 - 2 * t * b2**t / (1 - b2**t)


def updates_of(tx: Any, grads: list[Tensor], params: Any = None) -> list[Tensor]:
    state, found = tx.init([grads[0]] if params is None else params), []
    for g in grads:
        updates, state = tx.update([g], state, params, inplace=False)
        found.append(updates[0])
    return found


@pytest.mark.parametrize("setting", [None, False], ids=["fused", "rules"])
@pytest.mark.parametrize("learned", [False, True], ids=["number", "learned"])
@pytest.mark.parametrize(("b2", "switch"), SWITCHES.items())
def test_the_step_of_the_switch(b2: float, switch: Any, learned: bool, setting: Any) -> None:
    """Before it updates are the corrected momentum, which for one gradient is that gradient."""
    assert [length(b2, t) > 5 for t in range(1, 31)] == [
        switch is not None and t >= switch for t in range(1, 31)
    ]
    beta = torch.tensor(b2, **F64, requires_grad=True) if learned else b2
    tx = torchopt.scale_by_radam((0.9, beta)).with_accelerated_op(setting)
    g = nonzero(3)
    for t, u in enumerate(updates_of(tx, [g] * 30), start=1):
        if switch is None or t < switch:
            assert_close(u.detach(), g)
        else:
            rho, limit = length(b2, t), 2 / (1 - b2) - 1
            r = ((rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho)) ** 0.5
            assert_close(u.detach(), r * g / (g.abs() + 1e-8 / (1 - b2**t) ** 0.5), times=10)


@pytest.mark.parametrize("b2", [0.5, 0.6, 2 / 3])
@pytest.mark.parametrize("shape", [(), (3,)], ids=["one", "per-entry"])
def test_where_the_rectification_has_no_value(b2: float, shape: tuple[int, ...]) -> None:
    """``rho_inf - 4`` is negative, zero, positive: never rectified, and no derivative is nan."""
    beta = torch.full(shape, b2, **F64, requires_grad=True)
    for setting in (None, False):
        tx = torchopt.scale_by_radam((0.9, beta)).with_accelerated_op(setting)
        grads = [nonzero(3).requires_grad_() for _ in range(9)]
        u, unused = (
            updates_of(tx, grads)[-1].sum(),
            {"allow_unused": True, "materialize_grads": True},
        )
        by_beta, by_g = torch.autograd.grad(u, [beta, grads[0]], **unused)
        assert (by_beta == 0).all()
        assert_close(by_g, torch.full((3,), 0.1 * 0.9**8 / (1 - 0.9**9), **F64))


@pytest.mark.parametrize("setting", [None, False], ids=["fused", "rules"])
def test_entries_on_both_sides_of_the_switch(setting: Any) -> None:
    """One second beta per entry: at step 6 that of 0.8 is not there yet, and 0.95 is."""
    values = torch.tensor([0.8, 0.95, 0.6], **F64)
    grads = [nonzero(3) for _ in range(6)]

    def last(b2: Any) -> Tensor:
        tx = torchopt.scale_by_radam((0.9, b2)).with_accelerated_op(setting)
        return updates_of(tx, grads)[-1]

    alone = torch.stack([last(b2.item())[k] for k, b2 in enumerate(values)])
    beta = values.clone().requires_grad_()
    together = last(beta)
    assert_close(together.detach(), alone)
    (slope,) = torch.autograd.grad(together.sum(), beta)
    h = 1e-6
    difference = (last(values + h) - last(values - h)) / (2 * h)
    assert slope[0] == slope[2] == 0
    assert abs(slope[1] - difference[1]) < META_GRADIENT * abs(slope[1])
    assert all_finite(slope)


def test_parameters_at_different_counts() -> None:
    """One is rectified and the other is not, in one step of the object-oriented API."""
    results = []
    for cls in (torchopt.RAdam, torch.optim.RAdam):
        torch.manual_seed(0)
        params = [nn.Parameter(nonzero(2)) for _ in range(2)]
        optimizer = cls(params, lr=0.1, betas=BETAS)
        for step in range(9):
            params[0].grad = nonzero(2)
            params[1].grad = nonzero(2) if step > 4 else None
            optimizer.step()
        results.append([p.detach() for p in params])
    assert_close(*results)


@pytest.mark.parametrize(
    "learned", [pytest.param(False, marks=pytest.mark.thorough), True], ids=["number", "learned"]
)
@pytest.mark.thorough
def test_compiled_over_the_switch(learned: bool) -> None:
    """Once for the first step, and once for all others with a count that is a symbol."""
    counter = CompileCounterWithBackend("aot_eager")
    p, grads = {"w": nonzero(3)}, [{"w": nonzero(3)} for _ in range(9)]
    b2 = torch.tensor(0.95, **F64, requires_grad=True) if learned else 0.95
    tx = torchopt.radam(0.1, betas=(0.8, b2), eps=1e-3)

    def step(params: Any, g: Any, state: Any) -> Any:
        updates, state = tx.update(g, state, params, inplace=False)
        return torchopt.apply_updates(params, updates, inplace=False), state

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    mine, expected, state, other = p, p, tx.init(p), tx.init(p)
    frames = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for g in grads:
            mine, state = compiled(mine, g, state)
            expected, other = step(expected, g, other)
            assert_close(mine["w"].detach(), expected["w"].detach())
            frames.append(counter.frame_count)
    assert frames[-1] <= frames[1] + 1, f"compiled again and again: {frames}"
    assert frames[2] == frames[4]
    if learned:
        found = [torch.autograd.grad(x["w"].sum(), b2)[0] for x in (mine, expected)]
        assert_close(*found)
        assert found[0] != 0
