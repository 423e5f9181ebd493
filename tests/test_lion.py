"""Lion: against algorithm 2 of the paper and Optax, and what its meta-gradients reach."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import ALGORITHMS, Case
from conftest import nonzero, nonzero_like
from tolerances import assert_close
from torch import Tensor, nn

import torchopt


(ROWS,) = [list(row.cases()) for row in ALGORITHMS if row.recipe is torchopt.lion]
every_row = pytest.mark.parametrize("case", ROWS, ids=lambda case: case.name)


def by_the_paper(k: dict[str, Any], p: Tensor, grads: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Algorithm 2, written out."""
    (b1, b2), m = k["betas"], torch.zeros_like(p)
    for g in grads:
        u = torch.sign(b1 * m + (1 - b1) * g)
        p = p - k["lr"] * (u + k.get("weight_decay", 0.0) * p)
        m = b2 * m + (1 - b2) * g
    return p, m


# Values -------------------------------------------------------------------------------------------


@every_row
def test_every_face_follows_the_paper(case: Case) -> None:
    params = {"w": nonzero(20, 3), "b": nonzero(3)}
    grads = [nonzero_like(params) for _ in range(6)]
    expected = {n: by_the_paper(case.kwargs, p, [g[n] for g in grads]) for n, p in params.items()}
    last, m = ({n: values[i] for n, values in expected.items()} for i in range(2))
    tx = case.tx()
    state, now = tx.init(params), params
    own = {n: nn.Parameter(p.clone()) for n, p in params.items()}
    optimizer = case.cls(own.items(), **case.kwargs)
    net = nn.ParameterDict({n: p.clone() for n, p in params.items()})
    inner = case.meta(net, **case.kwargs)
    for g in grads:
        now, state = tx.apply_gradients(g, state, now, inplace=False)
        for n, p in own.items():
            p.grad = g[n].clone()
        optimizer.step()
        inner.step(sum((net[n] * g[n]).sum() for n in params))
    for found in (now, own, dict(net.items())):
        assert_close({n: p.detach() for n, p in found.items()}, last)
    assert_close(state.exp_avg, m)
    assert_close({n: optimizer.state[p]["exp_avg"] for n, p in own.items()}, m)
    # signs differ from those of exchanged betas, so the comparison tells them apart
    other = by_the_paper(
        {**case.kwargs, "betas": case.kwargs["betas"][::-1]}, params["w"], [g["w"] for g in grads]
    )
    assert not torch.equal(other[0], last["w"])


def test_values_of_optax() -> None:
    """``optax.lion(0.03, b1=0.7, b2=0.9, weight_decay=0.2)`` of Optax 0.2.8, in float64."""
    p = torch.tensor([0.5, -1.0, 2.0, 0.1], dtype=torch.float64)
    grads = [
        [0.3, -0.2, 1.0, -0.5],
        [-0.6, 0.1, -0.2, 0.9],
        [0.02, 0.3, -0.05, -0.1],
        [-0.1, -0.02, -0.3, -0.2],
    ]
    tx = torchopt.lion(0.03, (0.7, 0.9), 0.2)
    state = tx.init(p)
    for g in grads:
        p, state = tx.apply_gradients(torch.tensor(g, dtype=torch.float64), state, p, inplace=False)
    expected = [0.5481054151279999, -1.0362129837760001, 1.893505961072, 0.09762366724960002]
    assert_close(p, torch.tensor(expected, dtype=torch.float64))
    expected = [-0.03492999999999999, 0.018519999999999995, 0.022199999999999998, 0.00745]
    assert_close(state.exp_avg, torch.tensor(expected, dtype=torch.float64))


def test_defaults_are_those_of_the_paper() -> None:
    row = next(row for row in ALGORITHMS if row.recipe is torchopt.lion)
    assert row.defaults() == {
        "lr": 1e-4,
        "betas": (0.9, 0.99),
        "weight_decay": 0.0,
        "maximize": False,
    }


# Meta-gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", [None, False], ids=["fused", "rules"])
def test_meta_gradients_are_those_of_steps_whose_signs_are_constants(setting: bool | None) -> None:
    """In ``p_t = (1 - lr wd) p_{t-1} - lr u_t`` the signs ``u_t`` do not depend on anything."""
    net, x, y = nn.Linear(3, 2, bias=False, dtype=torch.float64), nonzero(8, 3), nonzero(8, 2)
    start, steps, weights = net.weight, 3, nonzero(2, 3)
    lr, wd, b1, b2, factor = (
        torch.tensor(v, requires_grad=True, dtype=torch.float64) for v in (0.03, 0.2, 0.7, 0.9, 1.0)
    )
    inner = torchopt.MetaLion(net, lr, (b1, b2), wd, use_accelerated_op=setting)
    signs = []
    for _ in range(steps):
        before = net.weight.detach()
        inner.step((factor * net(x) - y).square().mean())
        with torch.no_grad():
            signs.append((before - net.weight) / lr - wd * before)
    found = torch.autograd.grad((weights * net.weight).sum(), [start, lr, wd, b1, b2, factor])

    p = start
    for u in signs:
        p = p - lr * (u + wd * p)
    assert_close(torch.stack(signs).abs(), torch.ones(steps, 2, 3, dtype=torch.float64))
    expected = torch.autograd.grad((weights * p).sum(), [start, lr, wd])
    assert_close(found[:3], expected)
    assert_close(found[0], weights * (1 - lr * wd) ** steps)
    assert all(derivative == 0 for derivative in found[3:])


def test_the_momentum_that_is_kept_is_differentiable() -> None:
    g, b2 = nonzero(3).requires_grad_(), torch.tensor(0.9, requires_grad=True, dtype=torch.float64)
    tx = torchopt.scale_by_lion((0.8, b2))
    _, state = tx.update(g, tx.init(g), inplace=False)
    by_g, by_b2 = torch.autograd.grad(state.exp_avg.sum(), [g, b2])
    assert_close(by_g, torch.full((3,), 0.1, dtype=torch.float64))
    assert_close(by_b2, -g.detach().sum())
