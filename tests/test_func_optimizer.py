"""``FuncOptimizer`` is ``update`` and ``apply_updates``, and may be differentiated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from any_trees import b, w
from cases import Case, every_case
from conftest import nonzero
from tolerances import assert_close
from torch import Tensor

import torchopt


def _loss(params: Any) -> Tensor:
    return (params["w"] ** 3).sum() + (params["w"].sum(0) * params["b"]).sum()


@pytest.mark.parametrize("inplace", [True, False], ids=["inplace", "pure"])
@every_case
def test_func_optimizer_is_update_and_apply(case: Case, inplace: bool) -> None:
    tx = case.tx()
    params = {"w": w().requires_grad_(), "b": b().requires_grad_()}
    expected = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
    originals, state = dict(params), tx.init(expected)
    optimizer = torchopt.FuncOptimizer(tx, inplace=inplace)
    for _ in range(3):
        params = optimizer.step(_loss(params), params)
        grads = dict(zip(expected, torch.autograd.grad(_loss(expected), list(expected.values()))))
        updates, state = tx.update(grads, state, expected, inplace=False)
        new = torchopt.apply_updates(expected, updates, inplace=False)
        expected = {name: p.detach().requires_grad_() for name, p in new.items()}
    assert_close(params, expected)
    assert optimizer.state.step == 3
    same = all(params[name] is originals[name] for name in params)
    assert same is inplace


def test_func_optimizer_is_differentiable() -> None:
    """Through two steps, to the initial parameters and the learning rate; central differences."""
    lr, start = torch.tensor(0.1, dtype=torch.float64, requires_grad=True), nonzero(3)

    def outer(x: Tensor, rate: Any) -> Tensor:
        optimizer = torchopt.FuncOptimizer(torchopt.sgd(rate, momentum=0.9))
        params = x if x.requires_grad else x.clone().requires_grad_()
        for _ in range(2):
            params = optimizer.step((params**3).sum(), params)
        return (params**2).sum()

    found = torch.autograd.grad(outer(start.requires_grad_(), lr), (start, lr))
    start = start.detach()
    h = 1e-6
    by_lr = (outer(start, 0.1 + h) - outer(start, 0.1 - h)) / (2 * h)
    rows = h * torch.eye(3, dtype=torch.float64)
    by_start = torch.stack(
        [(outer(start + e, 0.1) - outer(start - e, 0.1)) / (2 * h) for e in rows]
    )
    assert_close(found[0], by_start.detach(), times=1e6)
    assert_close(found[1], by_lr.detach(), times=1e6)


def test_func_optimizer_leaves_unused_and_frozen_parameters() -> None:
    params = {
        "w": w().requires_grad_(),
        "unused": b().requires_grad_(),
        "frozen": b(),
        "none": None,
    }
    optimizer = torchopt.FuncOptimizer(torchopt.adam(0.1))
    new = optimizer.step((params["w"] ** 2 * params["frozen"]).sum(), params)
    assert not torch.equal(new["w"], params["w"])
    assert new["unused"] is params["unused"]
    assert new["frozen"] is params["frozen"]
    assert new["none"] is None


def test_func_optimizer_goes_on_from_a_state_dict() -> None:
    start = {"w": w().requires_grad_(), "b": b().requires_grad_()}
    first, second = (torchopt.FuncOptimizer(torchopt.adam(0.1)) for _ in range(2))
    assert first.state_dict() is None
    params = first.step(_loss(start), start)
    second.load_state_dict(first.state_dict())
    one = first.step(_loss(params), params)
    two = second.step(_loss(params), params)
    assert_close(one, two)
    assert second.state.step == 2


def test_func_optimizer_refuses_the_state_of_another() -> None:
    optimizer = torchopt.FuncOptimizer(torchopt.adam(0.1))
    optimizer.init([w()])
    kept = optimizer.state
    with pytest.raises(ValueError, match="another optimizer"):
        optimizer.load_state_dict(torchopt.sgd(momentum=0.9).init([w()]))
    with pytest.raises(TypeError, match="expects an OptState, got dict"):
        optimizer.load_state_dict({"step": 1})
    assert optimizer.state is kept
