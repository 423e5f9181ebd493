"""First-order steps through kernels keep no more than those of the rules."""

import torch
from cases import every, every_fused_case
from conftest import nonzero
from fusing import needs_library
from torch import nn

import torchopt


pytestmark = needs_library


def first_order(case, use):
    """Take steps without second derivatives.

    Returns:
        Bytes kept by the steps, which slots require grad, and the meta-gradients.
    """
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    start = list(net.parameters())
    optimizer = torchopt.MetaOptimizer(net, case.tx(use_accelerated_op=use))
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


@every_fused_case
def test_as_by_the_rules(case):
    _, slots, grads = first_order(case, None)
    _, slots_by_rules, grads_by_rules = first_order(case, False)
    assert slots == slots_by_rules
    for fast, slow in zip(grads, grads_by_rules):
        torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-15)


@every(lambda case: case.algorithm.fused and not case.needs_params)
def test_nothing_is_kept(case):
    kept, slots, _ = first_order(case, None)
    assert kept == 0
    assert not any(slots.values())
