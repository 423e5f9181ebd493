"""Closures that SAM calls twice, and steps that need none."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import nonzero
from tolerances import assert_close
from torch import nn

import torchopt


SGD = torchopt.sgd(0.1, momentum=0.9)


def problem(**options: Any) -> tuple[nn.Linear, Any, torch.Tensor]:
    net = nn.Linear(3, 2).double()
    return net, torchopt.SAM(net.parameters(), SGD, 0.3, **options), nonzero(4, 3)


def test_a_closure_that_adds_to_the_first_gradient_is_refused() -> None:
    net, optimizer, x = problem()
    before = copy.deepcopy(net.state_dict())

    def closure() -> None:
        net(x).square().mean().backward()

    with pytest.raises(RuntimeError, match=r"zero_grad\(\) each time .* first_step\(\)"):
        optimizer.step(closure)
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
    first = [p.grad.clone() for p in net.parameters()]
    optimizer.zero_grad()
    closure()
    assert_close([p.grad for p in net.parameters()], first)
    assert not optimizer.state


@pytest.mark.parametrize("accumulated", [1, 2])
def test_zeroed_gradients_are_the_tensors_that_they_were(accumulated: int) -> None:
    """With ``set_to_none=False`` gradients keep their memory, and the step is the same."""
    results = []
    net, _, x = problem()
    for to_none in (True, False):
        twin = copy.deepcopy(net)
        optimizer = torchopt.SAM(twin.parameters(), SGD, 0.3)
        for p in twin.parameters():
            p.grad = torch.ones_like(p)
        held = [p.grad for p in twin.parameters()]

        def closure(twin: Any = twin, optimizer: Any = optimizer, to_none: bool = to_none) -> None:
            optimizer.zero_grad(set_to_none=to_none)
            for _ in range(accumulated):
                twin(x).square().mean().backward()

        optimizer.step(closure)
        results.append([[p.detach(), p.grad] for p in twin.parameters()])
        assert all(p.grad is g for p, g in zip(twin.parameters(), held)) is not to_none
    assert_close(results[1], results[0])


def test_an_infinite_second_gradient_is_no_mistake() -> None:
    net, optimizer, x = problem()
    calls = []

    def closure() -> None:
        optimizer.zero_grad()
        calls.append(None)
        (net(x) * (1.0 if len(calls) == 1 else float("inf"))).sum().backward()

    optimizer.step(closure)
    assert len(calls) == 2
    assert not any(p.isfinite().all() for p in net.parameters())


# From gradients that are zero ---------------------------------------------------------------------


NEEDY = {
    "sam": lambda params: torchopt.SAM(params, SGD),
    "polyak": lambda params: torchopt.PolyakSGD(params, 0.5),
    "plateau": lambda params: torchopt.Optimizer(
        params, torchopt.chain(torchopt.reduce_on_plateau(), SGD)
    ),
}


@pytest.mark.parametrize("name", NEEDY)
def test_where_there_is_no_gradient_a_step_needs_no_closure(name: str) -> None:
    params = [nn.Parameter(nonzero(2, 3)), nn.Parameter(nonzero(3))]
    before = [p.detach().clone() for p in params]
    optimizer = NEEDY[name](params)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(map(torch.equal, params, before))
    params[0].grad[0, 0] = 1e-300
    with pytest.raises(ValueError, match=r"optimizer.step\(closure\)"):
        optimizer.step()
    assert all(map(torch.equal, params, before))
