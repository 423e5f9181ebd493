"""``torch.optim.swa_utils``: averages of weights, their rates and running statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Case
from frameworks import batches, every_optimizer, network, takes_all_shapes, train, twin, weights
from tolerances import assert_close
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

import torchopt


STEPS, BEGIN, DECAY = 6, 2, 0.8


def averaged(
    case: Case, net: nn.Sequential, optimizer: Any, data: list[Any], ema: bool
) -> tuple[AveragedModel, list[list[Tensor]], list[float]]:
    """Return the average over the last steps, the weights after each, and all rates."""
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(DECAY) if ema else None)
    rates = SWALR(optimizer, swa_lr=optimizer.param_groups[0]["lr"] / 2, anneal_epochs=3)
    path, seen = [], []
    for k, batch in enumerate(data):
        train(net, optimizer, [batch])
        seen.append(optimizer.param_groups[0]["lr"])
        if k >= BEGIN:
            average.update_parameters(net)
            rates.step()
            path.append(weights(net))
    update_bn([x for x, _ in data], average)
    return average, path, seen


def with_norm(net: nn.Sequential, case: Case) -> nn.Sequential:
    norm = nn.BatchNorm1d(5, affine=takes_all_shapes(case)).double()
    return nn.Sequential(*net[:2], norm, net[2])


@every_optimizer()
@pytest.mark.parametrize("ema", [False, True], ids=["mean", "ema"])
def test_average_rate_and_statistics(case: Case, ema: bool) -> None:
    start, data = network(case), batches(STEPS)
    net, other = with_norm(twin(start, case), case), with_norm(start, case)
    ours = case.cls(net.parameters(), **case.kwargs)
    average, path, seen = averaged(case, net, ours, data, ema)
    assert isinstance(ours, torchopt.Optimizer)
    assert len(set(seen)) > 2
    expected = path[0]
    for n, now in enumerate(path[1:], 2):
        part = 1 - DECAY if ema else 1 / n
        expected = [e + part * (x - e) for e, x in zip(expected, now)]
    found = weights(average.module)
    assert not torch.equal(found[0], path[-1][0])
    assert_close(found, expected, times=10)
    mean = average.module[:2](torch.cat([x for x, _ in data])).mean(0).detach()
    assert_close(average.module[2].running_mean, mean, times=10)
    if case.torch_cls is not None:
        theirs = case.torch_cls(other.parameters(), **case.kwargs)
        beside, _, rates = averaged(case, other, theirs, data, ema)
        assert seen == rates
        assert_close(found, weights(beside.module), times=10)
