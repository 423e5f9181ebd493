"""``inplace=True`` changes what it was given, unless a graph would be cut; ``False`` is pure."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from any_trees import b, tensors_of, w
from conftest import nonzero, nonzero_like
from torch import Tensor
from torch.autograd import forward_ad

import torchopt


RECORDED_HYPERPARAMETERS = {
    "lr": lambda x: torchopt.sgd(lr=x),
    "lr-of-one-parameter": lambda x: torchopt.sgd(lr={"w": x, "b": 0.1}),
    "betas": lambda x: torchopt.adam(betas=(x, 0.99)),
    "weight_decay": lambda x: torchopt.adamw(weight_decay=x),
    "clip": lambda x: torchopt.chain(torchopt.clip_grad_norm(x), torchopt.sgd()),
    "masked": lambda x: torchopt.masked(torchopt.scale(x), {"w": True, "b": False}),
}


@pytest.mark.parametrize(
    "make", RECORDED_HYPERPARAMETERS.values(), ids=RECORDED_HYPERPARAMETERS.keys()
)
def test_inplace_update_refuses_recorded_hyperparameters(make: Any) -> None:
    tx = make(torch.tensor(0.5, dtype=torch.float64, requires_grad=True))
    params = {"w": w(), "b": b()}
    state, grads = tx.init(params), nonzero_like(params)
    with pytest.raises(RuntimeError, match=r"recorded through hyperparameters.*inplace=False"):
        tx.update(grads, state, params)
    with torch.no_grad():
        updates, _ = tx.update(grads, state, params)
    assert not any(u.requires_grad for u in updates.values())
    updates, _ = tx.update(grads, state, params, inplace=False)
    assert any(u.requires_grad for u in updates.values())


@pytest.mark.parametrize("name", ["grads", "exp_avg", "exp_avg_sq", "params"])
def test_inplace_update_refuses_recorded_inputs(name: str) -> None:
    tx, params = torchopt.adam(), {"w": w()}
    state, grads = tx.init(params), {"w": w()}
    recorded = {"w": w().requires_grad_() * 1.0}
    if name == "grads":
        grads = recorded
    elif name == "params":
        params = recorded
    else:
        state = torchopt.OptState(0, {**state.slots, name: recorded})
    with pytest.raises(RuntimeError, match=f"recorded through {name}.*inplace=False"):
        tx.update(grads, state, params)
    updates, _ = tx.update(grads, state, params, inplace=False)
    assert updates["w"].requires_grad == (name != "params")  # adam without decay reads no params
    with torch.no_grad():
        updates, _ = tx.update(grads, state, params, inplace=True)
    assert not updates["w"].requires_grad


@pytest.mark.parametrize("name", ["params", "updates"])
def test_inplace_apply_updates_refuses_recorded_inputs(name: str) -> None:
    values = {"params": {"w": w()}, "updates": {"w": w()}}
    values[name] = {"w": w().requires_grad_() * 1.0}
    before = values["params"]["w"].detach().clone()
    with pytest.raises(RuntimeError, match=f"recorded through {name}.*inplace=False"):
        torchopt.apply_updates(values["params"], values["updates"])
    assert torch.equal(values["params"]["w"].detach(), before)
    result = torchopt.apply_updates(values["params"], values["updates"], inplace=False)
    assert result["w"].requires_grad
    assert torch.equal(values["params"]["w"].detach(), before)


def test_leaf_parameters_and_no_grad_are_allowed() -> None:
    tx = torchopt.adamw(0.1, weight_decay=0.1)
    params = {"w": w().requires_grad_()}
    before = params["w"].detach().clone()
    updates, _ = tx.update({"w": w()}, tx.init(params), params)
    torchopt.apply_updates(params, updates)
    assert not torch.equal(params["w"].detach(), before)
    assert params["w"].is_leaf
    assert params["w"].requires_grad
    product = params["w"] * 1.0
    with torch.no_grad():
        assert torchopt.apply_updates([product], [torch.ones_like(product)])[0] is product


@pytest.mark.parametrize("what", ["update", "apply_updates", "closed-over"])
@pytest.mark.parametrize("mode", ["func.grad", "func.vjp", "func.jvp", "forward_ad"])
def test_inplace_is_refused_under_every_mode_of_differentiation(mode: str, what: str) -> None:
    tx, x = torchopt.sgd(0.1, momentum=0.9), nonzero(3)
    state = tx.init([x])

    def function(y: Tensor) -> Tensor:
        if what == "apply_updates":
            return torchopt.apply_updates([y], [torch.ones_like(y)])[0].sum()
        if what == "closed-over":  # only the parameters carry the derivative
            updates, _ = tx.update([torch.ones_like(x)], state, [y * 1.0])
        else:
            updates, _ = tx.update([y], state)
        return updates[0].sum()

    with pytest.raises(RuntimeError, match="inplace=False"):  # noqa: PT012
        if mode == "func.grad":
            torch.func.grad(function)(x)
        elif mode == "func.vjp":
            torch.func.vjp(function, x)
        elif mode == "func.jvp":
            torch.func.jvp(function, (x,), (torch.ones_like(x),))
        else:
            with forward_ad.dual_level():
                function(forward_ad.make_dual(x, torch.ones_like(x)))


def test_init_shares_nothing_with_the_parameters() -> None:
    params = {"w": w().requires_grad_()}
    state = torchopt.rmsprop(centered=True, momentum=0.9).init(params)
    pointers = {x.data_ptr() for x in tensors_of(state.slots)}
    assert len(pointers) == 3
    assert params["w"].data_ptr() not in pointers
    assert not any(x.requires_grad for x in tensors_of(state.slots))
