"""Extra values of a step: to whom they go, and what nothing reads is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import nonzero
from refusing import refused
from tolerances import assert_close
from torch import nn

import torchopt


NESTED = {
    "alone": lambda tx: tx,
    "masked": lambda tx: torchopt.masked(tx, True),
    "partition": lambda tx: torchopt.partition({"a": tx}, lambda p: dict.fromkeys(p, "a")),
    "named": lambda tx: torchopt.named_chain(("a", tx)),
    "finite": lambda tx: torchopt.apply_if_finite(tx, 3),
}


@pytest.mark.parametrize("where", NESTED)
def test_what_is_read_inside_is_taken_and_the_rest_refused(where: str) -> None:
    own, net = nn.Parameter(nonzero(2)), nn.ParameterDict({"w": nonzero(2)})
    tx = torchopt.chain(NESTED[where](torchopt.scale_by_sophia()), torchopt.scale(1.0))
    optimizer, inner = torchopt.Optimizer([("w", own)], tx), torchopt.MetaOptimizer(net, tx)
    own.grad = nonzero(2)
    message = r"step got an unexpected argument 'hesian'.*reads only \['hessian'\]"
    with refused(TypeError, message, own, optimizer):
        optimizer.step(hesian={"w": own.detach()})
    with refused(TypeError, message, net, inner):
        inner.step(net["w"].sum(), hesian={"w": own.detach()})
    optimizer.step(hessian={"w": own.detach()})
    inner.step(net["w"].sum(), hessian={"w": own.detach()})


def test_most_read_nothing() -> None:
    net = nn.ParameterDict({"w": nonzero(2)})
    inner = torchopt.MetaAdam(net)
    with refused(TypeError, "unexpected argument 'creat_graph'.*no such value", net, inner):
        inner.step(net["w"].sum(), creat_graph=False)  # pyright: ignore[reportCallIssue]


def test_a_functional_optimizer_that_keeps_its_state() -> None:
    tx = torchopt.sophia(0.1, (0.0, 0.0), gamma=1.0, weight_decay=0.0)
    w = nonzero(2).requires_grad_()
    optimizer, estimate = torchopt.FuncOptimizer(tx), torch.full((2,), 4.0).double()
    with refused(TypeError, r"FuncOptimizer\.step got an unexpected argument 'hesian'", w):
        optimizer.step((2 * w).sum(), w, hesian=estimate)
    assert_close(optimizer.step((2 * w).sum(), w, hessian=estimate), w - 0.1 * 2 / 4)


def test_the_value_of_the_loss_without_a_closure() -> None:
    p, twin = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer, peer = torchopt.PolyakSGD([p]), torchopt.PolyakSGD([twin])
    p.grad, twin.grad = torch.ones(2), torch.ones(2)
    optimizer.step(value=0.5)
    peer.step(lambda: 0.5)
    assert torch.equal(p, twin)
    assert not torch.equal(p, torch.ones(2))


def test_functions_are_given_what_they_have_arguments_for() -> None:
    def update(updates: Any, state: Any, params: Any = None, *, factor: float = 1.0) -> Any:
        return [u * factor for u in updates], state

    tx = torchopt.GradientTransformation(lambda params: (), update)
    p = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = torchopt.Optimizer([p], torchopt.chain(tx, torchopt.scale_by_learning_rate(1.0)))
    p.grad = g = nonzero(2)
    optimizer.step(factor=3.0)
    assert_close(p.detach(), -3.0 * g)
    with refused(TypeError, "unexpected argument 'fact'", p):
        optimizer.step(fact=3.0)
