"""Every scheduler of ``torch.optim.lr_scheduler`` with every optimizer.

Where torch has the optimizer ``test_optim_hooks.py`` compares with it; here a scheduler is compared
with its numbers, written into groups by hand.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Case
from frameworks import batches, every_optimizer, network, train, twin, weights
from test_optim_hooks import SCHEDULERS

import torchopt


STEPS = 6


class Carrier(torch.optim.Optimizer):
    """Groups for a scheduler, and nothing else."""

    def step(self, closure: Any = None) -> None:
        pass


def groups(net: Any) -> list[dict[str, Any]]:
    first, *others = net.parameters()
    return [{"params": [first]}, {"params": others, "lr": 0.02}]


@pytest.mark.filterwarnings("ignore:The epoch parameter")
@pytest.mark.sampled(3, by="family")
@every_optimizer()
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_is_numbers_in_groups(name: str, case: Case) -> None:
    net = network(case)
    other, third = twin(net, case), twin(net, case)
    optimizer, by_hand = (case.cls(groups(x), **case.kwargs) for x in (net, other))
    carrier = Carrier(groups(third), optimizer.defaults)
    schedulers = [SCHEDULERS[name](o) for o in (optimizer, carrier)]
    seen = []
    for batch in batches(STEPS):
        for ours, theirs in zip(by_hand.param_groups, carrier.param_groups):
            ours.update({n: theirs[n] for n in ("lr", "momentum", "betas") if n in theirs})
        seen.append(by_hand.param_groups[0]["lr"])
        train(net, optimizer, [batch])
        train(other, by_hand, [batch])
        carrier.step()
        for scheduler in schedulers:
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        assert all(map(torch.equal, weights(net), weights(other)))
    assert len(set(seen)) > 1
    assert isinstance(optimizer, torchopt.Optimizer)
    new = SCHEDULERS[name](optimizer)
    new.load_state_dict(schedulers[0].state_dict())
    assert new.get_last_lr() == schedulers[1].get_last_lr()
