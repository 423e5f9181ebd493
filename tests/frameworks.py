"""What the tests of training frameworks share: all rows, a network, batches, and a plain loop.

A framework is held to the same training without it, and to ``torch.optim``'s class within it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from cases import CASES, SPECIAL_ALGORITHMS, Case
from conftest import nonzero
from torch import Tensor, nn


#: Every optimizer of the table, those too that the general laws do not hold of.
ROWS = (*CASES, *(case for algorithm in SPECIAL_ALGORITHMS for case in algorithm.cases()))


def every_optimizer(where: Callable[[Case], Any] = lambda case: True) -> pytest.MarkDecorator:
    """Run a law for every optimizer; of most families ``make test`` runs one only."""
    seen: set[Any] = set()
    found = []
    for case in filter(where, ROWS):
        marks = [pytest.mark.thorough] if case.family in seen else []
        seen.add(case.family)
        if case.torch_cls is not None and case.algorithm.float64_scalars:
            marks.append(pytest.mark.float64_scalars)
        found.append(pytest.param(case, id=case.name, marks=marks))
    return pytest.mark.parametrize("case", found)


def reads_loss(case: Case) -> bool:
    """Whether a step needs the loss, which ``step(closure)`` brings."""
    return "value" in case.tx().plan.reads


def takes_all_shapes(case: Case) -> bool:
    """Whether it takes other parameters than matrices."""
    return not any(part.is_selective for part in case.tx().parts)


def network(case: Case) -> nn.Sequential:
    """Return a network with random weights, which has biases if the optimizer takes vectors."""
    bias = takes_all_shapes(case)
    net = nn.Sequential(nn.Linear(3, 5, bias=bias), nn.Tanh(), nn.Linear(5, 2, bias=bias)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(nonzero(*p.shape) * 0.5)
    return net


def twin(net: nn.Module, case: Case) -> Any:
    """Return another network with the same weights."""
    other = network(case)
    other.load_state_dict(net.state_dict())
    return other


def batches(n: int, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    return [(nonzero(size, 3), nonzero(size, 2)) for _ in range(n)]


def loss_of(net: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return nn.functional.mse_loss(net(x), y)


def weights(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def groups_of(data: Iterable[Any], n: int) -> Iterator[list[Any]]:
    """Yield batches ``n`` by ``n``, those whose gradients are added up."""
    items = list(data)
    for k in range(0, len(items), n):
        yield items[k : k + n]


def train(
    net: nn.Module,
    optimizer: Any,
    data: Iterable[Any],
    *,
    scheduler: Any = None,
    accumulate: int = 1,
    max_norm: float | None = None,
    agree: Callable[[Tensor], Tensor] = torch.detach,
) -> None:
    """Train as one does without a framework, with mean gradients of ``accumulate`` batches.

    ``agree`` makes of the loss what the optimizer is told.
    """
    for group in groups_of(data, accumulate):

        def closure(group: list[Any] = group) -> Tensor:
            optimizer.zero_grad()
            losses = [loss_of(net, batch) / len(group) for batch in group]
            for loss in losses:
                loss.backward()
            if max_norm is not None:
                nn.utils.clip_grad_norm_(net.parameters(), max_norm)
            return agree(torch.stack(losses).sum())

        optimizer.step(closure)
        if scheduler is not None:
            scheduler.step()


def one_cycle(optimizer: Any, total_steps: int) -> Any:
    """Return the scheduler that changes rate and momentum of every step."""
    lr = 2 * optimizer.param_groups[0]["lr"]
    momentum = {"momentum", "betas"} & set(optimizer.defaults)
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=lr, total_steps=total_steps, cycle_momentum=bool(momentum)
    )
