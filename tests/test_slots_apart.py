"""A slot that a rule sets to the parameter or the gradient itself keeps its value."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import nonzero
from pointwise import user_optimizer

import torchopt


RULES = {
    "parameter": lambda g, p, t, slots, lr: (-lr * g, (p,)),
    "gradient": lambda g, p, t, slots, lr: (-lr * g, (g,)),
}


@pytest.mark.parametrize("fused", [None, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("name", RULES)
def test_what_a_slot_keeps_is_not_overwritten(name: str, fused: Any) -> None:
    tx = user_optimizer(RULES[name], ("kept",), lr=0.1)().with_accelerated_op(fused)
    p = torch.nn.Parameter(nonzero(4))
    optimizer = torchopt.Optimizer([p], tx)
    for _ in range(3):
        p.grad = nonzero(4)
        expected = (p.detach() if name == "parameter" else p.grad).clone()
        optimizer.step()
        p.grad.zero_()
        assert torch.equal(optimizer.state[p]["kept"], expected)
