"""``torch.amp.GradScaler``: unscaled steps, and none where a gradient overflows."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Case
from frameworks import ROWS, batches, every_optimizer, loss_of, network, reads_loss, twin, weights
from tolerances import assert_close
from torch import Tensor, nn

import torchopt


SCALE, OVERFLOWS = 2.0**8, 1


def scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=SCALE)


def with_overflow(n: int) -> list[Any]:
    """Return batches; the loss of one of them is infinite."""
    data = batches(n)
    data[OVERFLOWS][0][0, 0] = math.inf
    return data


def state_of(optimizer: Any) -> list[Any]:
    """Return a copy of all that is in the state of an optimizer."""
    return copy.deepcopy([list(entry.items()) for entry in optimizer.state.values()])


def same(a: Any, b: Any) -> bool:
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


def train_scaled(
    net: nn.Module, optimizer: Any, data: list[Any], step: Callable[[Any, Tensor], None]
) -> None:
    """Train with scaled losses; an overflow moves nothing and halves the scale."""
    scale = scaler()
    for k, batch in enumerate(data):
        optimizer.zero_grad()
        loss = loss_of(net, batch)
        scale.scale(loss).backward()
        before, state = weights(net), state_of(optimizer)
        step(scale, loss.detach())
        scale.update()
        if k == OVERFLOWS:
            assert same(weights(net), before)
            assert same(state_of(optimizer), state)
    assert scale.get_scale() == SCALE / 2


def train_plainly(net: nn.Module, optimizer: Any, data: list[Any]) -> None:
    for k, batch in enumerate(data):
        if k != OVERFLOWS:

            def closure(batch: Any = batch) -> Tensor:
                optimizer.zero_grad()
                loss = loss_of(net, batch)
                loss.backward()
                nn.utils.clip_grad_norm_(net.parameters(), 0.5)
                return loss.detach()

            optimizer.step(closure)


@every_optimizer()
def test_scaled_steps_are_those_of_unscaled_training(case: Case) -> None:
    plain, data = network(case), with_overflow(4)
    nets = [twin(plain, case) for _ in range(2)]
    train_plainly(plain, case.cls(plain.parameters(), **case.kwargs), data)
    for net, cls in zip(nets, (case.cls, case.torch_cls)):
        if cls is None:
            continue
        optimizer = cls(net.parameters(), **case.kwargs)

        def step(scale: Any, loss: Tensor, net: Any = net, optimizer: Any = optimizer) -> None:
            scale.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            scale.step(optimizer, **({"value": loss} if reads_loss(case) else {}))

        train_scaled(net, optimizer, data, step)
        assert_close(weights(net), weights(plain), times=10)


@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_sam_scales_both_losses(adaptive: bool) -> None:
    plain, data = network(ROWS[0]), with_overflow(4)
    net = twin(plain, ROWS[0])
    unscaled, scaled = (
        torchopt.SAM(x.parameters(), torchopt.sgd(0.1, momentum=0.9), 0.3, adaptive)
        for x in (plain, net)
    )
    for k, batch in enumerate(data):
        if k != OVERFLOWS:
            for step in (unscaled.first_step, unscaled.second_step):
                unscaled.zero_grad()
                loss_of(plain, batch).backward()
                step()
    second = iter(data)

    def step(scale: Any, loss: Tensor) -> None:
        scaled.first_step()
        scale.scale(loss_of(net, next(second))).backward()
        scaled.second_step(scale)

    train_scaled(net, scaled, data, step)
    assert_close(weights(net), weights(plain), times=10)


def test_sam_says_how_to_scale() -> None:
    net = network(ROWS[0])
    optimizer = torchopt.SAM(net.parameters(), torchopt.sgd(0.1))
    scale = scaler()
    scale.scale(loss_of(net, batches(1)[0])).backward()
    before = weights(net)
    with pytest.raises(ValueError, match=r"second_step\(scaler\)"):
        scale.step(optimizer)
    assert same(weights(net), before)
