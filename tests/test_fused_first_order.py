"""First-order steps through kernels keep no more than those of the rules."""

import pytest
import torch
from conftest import nonzero
from fusing import needs_library
from torch import nn

import torchopt


pytestmark = needs_library

CASES = {
    "sgd": lambda use: torchopt.sgd(0.1, momentum=0.9, use_accelerated_op=use),
    "adam": lambda use: torchopt.adam(0.1, use_accelerated_op=use),
    "adam-decay": lambda use: torchopt.adam(0.1, weight_decay=0.1, use_accelerated_op=use),
    "adamw": lambda use: torchopt.adamw(0.1, weight_decay=0.1, use_accelerated_op=use),
    "rmsprop": lambda use: torchopt.rmsprop(0.1, centered=True, use_accelerated_op=use),
}


def first_order(make, use):
    """Take steps without second derivatives.

    Returns:
        Bytes kept by the steps, which slots require grad, and the meta-gradients.
    """
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    start = list(net.parameters())
    optimizer = torchopt.MetaOptimizer(net, make(use))
    kept = []

    def keep(x):
        kept.append(x.nbytes)
        return x

    for _ in range(3):
        loss = net(nonzero(5, 3)).square().mean()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            optimizer.step(loss, create_graph=False)
    (state,) = optimizer.extract_state()
    slots = {
        name: any(x.requires_grad for x in column.values()) for name, column in state.slots.items()
    }
    grads = torch.autograd.grad(net(nonzero(5, 3)).square().mean(), start)
    return sum(kept), slots, grads


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_as_by_the_rules(make):
    _, slots, grads = first_order(make, None)
    _, slots_by_rules, grads_by_rules = first_order(make, False)
    assert slots == slots_by_rules
    for fast, slow in zip(grads, grads_by_rules):
        torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["sgd", "adam", "rmsprop"])
def test_nothing_is_kept(name):
    kept, slots, _ = first_order(CASES[name], None)
    assert kept == 0
    assert not any(slots.values())
