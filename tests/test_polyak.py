"""Polyak-SGD: beside its formula, in all APIs; where the value of the loss comes from."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from conftest import nonzero
from tolerances import META_GRADIENT, all_finite, assert_close
from torch import Tensor, nn

import torchopt
from torchopt.kernels import why


NUMBERS: dict[str, Any] = {"lr": 0.7, "max_learning_rate": 0.4, "f_min": -0.3, "eps": 0.2}


def loss_of(weights: dict[str, Tensor], scale: Any = 1.0) -> Tensor:
    a, b = weights["a"], weights["b"]
    return scale * (a**2).sum() * 0.1 + (a.sum() * b - 1).square().sum() * 0.05


def unrolled(weights: dict[str, Tensor], k: dict[str, Any], scale: Any, steps: int = 3) -> Tensor:
    """The paper's formula, and the loss after some steps."""
    for _ in range(steps):
        loss = loss_of(weights, scale)
        grads = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        total = sum((g * g).sum() for g in grads)
        size = ((loss - k["f_min"]) / (total + k["eps"])).clamp(max=k["max_learning_rate"])
        weights = {n: w - k["lr"] * size * g for (n, w), g in zip(weights.items(), grads)}
    return loss_of(weights)


def start() -> dict[str, Tensor]:
    return {"a": nonzero(3), "b": nonzero(2)}


@pytest.mark.parametrize("max_learning_rate", [0.4, 50.0])
def test_meta_gradients(max_learning_rate: float) -> None:
    """By first weights, every number, and what the loss itself depends on: its value passes it."""
    numbers = {**NUMBERS, "max_learning_rate": max_learning_rate}
    k: dict[str, Any] = {
        n: torch.tensor(v, dtype=torch.float64, requires_grad=True) for n, v in numbers.items()
    }
    scale = torch.tensor(1.2, dtype=torch.float64, requires_grad=True)
    net = nn.ParameterDict(start())
    first = dict(net.items())
    inner = torchopt.MetaPolyakSGD(net, **k)
    for _ in range(3):
        inner.step(loss_of(dict(net.items()), scale))
    inputs = [*first.values(), *k.values(), scale]
    found = torch.autograd.grad(loss_of(dict(net.items())), inputs, allow_unused=True)
    wanted = torch.autograd.grad(unrolled(first, k, scale), inputs, allow_unused=True)
    unused = [n for n, d in zip([*first, *k, "scale"], wanted) if d is None or not d.any()]
    assert unused == (["f_min", "eps"] if max_learning_rate < 1 else ["max_learning_rate"])
    for ours, theirs in zip(found, wanted):
        zero = torch.zeros((), dtype=torch.float64)
        assert_close(zero if ours is None else ours, zero if theirs is None else theirs, times=100)

    with torch.no_grad():
        values = []
        for sign in (1, -1):
            moved = scale + sign * 1e-5
            with torch.enable_grad():
                values.append(
                    unrolled(
                        {n: w.detach().requires_grad_() for n, w in first.items()}, k, moved
                    ).item()
                )
    difference = (values[0] - values[1]) / 2e-5
    assert abs(found[-1].item() - difference) < 100 * META_GRADIENT * abs(difference)


def test_first_order_meta_gradients_take_the_value_as_a_constant() -> None:
    net = nn.ParameterDict(start())
    first, inner = dict(net.items()), torchopt.MetaPolyakSGD(net, **NUMBERS)
    inner.step(loss_of(first), create_graph=False)
    total = torch.stack([w.sum() for w in net.values()]).sum()
    found = torch.autograd.grad(total, list(first.values()))
    assert_close(found, tuple(torch.ones_like(w) for w in first.values()))


def test_all_apis_agree() -> None:
    weights = start()
    ends = []
    tx, now = torchopt.polyak_sgd(**NUMBERS), {n: w.clone() for n, w in weights.items()}
    state = tx.init(now)
    for _ in range(3):
        leaves = {n: w.detach().requires_grad_() for n, w in now.items()}
        loss = loss_of(leaves)
        grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()))))
        now, state = tx.apply_gradients(grads, state, now, value=loss.detach())
    ends.append(now)

    own = {n: nn.Parameter(w.clone()) for n, w in weights.items()}
    optimizer = torchopt.PolyakSGD(own.values(), **NUMBERS)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(own)  # pyright: ignore[reportArgumentType]
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    ends.append({n: p.detach() for n, p in own.items()})

    for inplace in (False, True):
        adapting = torchopt.FuncOptimizer(torchopt.polyak_sgd(**NUMBERS))
        params: Any = {n: w.clone().requires_grad_() for n, w in weights.items()}
        for _ in range(3):
            params = adapting.step(loss_of(params), params, inplace=inplace)
        ends.append({n: p.detach() for n, p in params.items()})
    ends.append({n: w.detach() for n, w in weights.items()})
    for _ in range(3):
        leaves = {n: w.requires_grad_() for n, w in ends[-1].items()}
        loss = loss_of(leaves)
        grads = torch.autograd.grad(loss, list(leaves.values()))
        total = sum((g * g).sum() for g in grads) + 0.2
        size = 0.7 * min((loss.item() + 0.3) / total, 0.4)
        ends[-1] = {n: (w - size * g).detach() for (n, w), g in zip(leaves.items(), grads)}
    for end in ends[:-1]:
        assert_close(end, ends[-1])


@pytest.mark.parametrize("value", [None, torch.ones(2), "1.0"], ids=["none", "two", "text"])
def test_without_a_value_nothing_changes(value: Any) -> None:
    p = nn.Parameter(nonzero(3))
    before, optimizer = p.detach().clone(), torchopt.PolyakSGD([p])
    p.grad = nonzero(3)
    with pytest.raises(ValueError, match=r"value of the loss.*step\(closure\)"):
        optimizer.step(None if value is None else lambda: value)
    assert torch.equal(p, before)
    assert not optimizer.state
    tx = torchopt.polyak_sgd()
    with pytest.raises(ValueError, match="value=loss"):
        tx.update(p.grad, tx.init(p), value=value)


def test_a_gradient_that_is_zero_moves_nothing_and_a_small_one_does() -> None:
    tx = torchopt.polyak_sgd()
    g = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    updates, _ = tx.update(g, tx.init(g), inplace=False, value=1.0)
    assert not updates.any()
    assert all_finite(*torch.autograd.grad(updates.sum(), g))
    small = torch.full((1,), 1e-9, dtype=torch.float64)
    assert tx.update(small, tx.init(small), value=1.0, inplace=False)[0].item() == -1e-9


def test_an_optimizer_does_not_keep_the_graph_of_a_loss() -> None:
    net = nn.Linear(2, 1)
    inner = torchopt.MetaPolyakSGD(net)
    inner.step(net(torch.ones(1, 2)).square().sum())
    loss = net(torch.ones(1, 2)).square().sum()
    inner.step(loss, create_graph=False)
    kept = weakref.ref(loss)
    del loss
    gc.collect()
    assert kept() is None


def test_why_takes_what_update_takes() -> None:
    params = {"w": nonzero(3)}
    tx = torchopt.polyak_sgd(0.1)
    with pytest.raises(ValueError, match="needs the value of the loss"):
        why(tx, params, params=params)
    assert any("not elementwise" in line for line in why(tx, params, params=params, value=2.0))
