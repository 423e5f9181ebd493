"""Optimizers prepared by Accelerate: added gradients, ``save_state`` and ``load_state``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case
from frameworks import (
    ROWS,
    batches,
    every_optimizer,
    loss_of,
    network,
    one_cycle,
    train,
    twin,
    weights,
)
from tolerances import assert_close
from torch import nn

import torchopt


accelerate = pytest.importorskip("accelerate")
STEPS, ACCUMULATE = 4, 2


class Run:
    """A network that Accelerate has prepared, with its optimizer and its scheduler."""

    def __init__(self, net: nn.Module, make: Any, data: list[Any], folder: Path) -> None:
        self.accelerator = accelerate.Accelerator(
            cpu=True, gradient_accumulation_steps=ACCUMULATE, project_dir=folder
        )
        optimizer = make(net.parameters())
        loader = torch.utils.data.DataLoader(data, batch_size=None)
        scheduler = one_cycle(optimizer, STEPS)
        prepared = self.accelerator.prepare(net, optimizer, loader, scheduler)
        self.net, self.optimizer, self.loader, self.scheduler = prepared

    def train(self, first: int, last: int) -> None:
        """Train with the batches of some steps."""
        mean = torch.zeros(())
        for k, batch in enumerate(self.loader):
            if not ACCUMULATE * first <= k < ACCUMULATE * last:
                continue
            with self.accelerator.accumulate(self.net):
                loss = loss_of(self.net, batch)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.net.parameters(), 0.5)
                mean = (0 if k % ACCUMULATE == 0 else mean) + loss.detach() / ACCUMULATE
                self.optimizer.step(lambda loss=mean: loss)
                self.scheduler.step()
                self.optimizer.zero_grad()


@every_optimizer()
def test_prepare_save_and_load(case: Case, tmp_path: Path) -> None:
    plain, data = network(case), batches(ACCUMULATE * STEPS)
    nets = [twin(plain, case) for _ in range(4)]

    def make(params: Any) -> torchopt.Optimizer:
        return case.cls(params, **case.kwargs)

    optimizer = make(plain.parameters())
    cycle = one_cycle(optimizer, STEPS)
    train(plain, optimizer, data, scheduler=cycle, accumulate=ACCUMULATE, max_norm=0.5)
    whole = Run(nets[0], make, data, tmp_path)
    whole.train(0, STEPS)
    assert_close(weights(nets[0]), weights(plain), times=10, what="beside a plain loop")

    half = Run(nets[1], make, data, tmp_path)
    half.train(0, 2)
    half.accelerator.save_state(str(tmp_path / "half"))
    resumed = Run(nets[2], make, data, tmp_path)
    resumed.accelerator.load_state(str(tmp_path / "half"))
    resumed.train(2, STEPS)
    assert_close(weights(nets[2]), weights(nets[0]), what="resumed")
    if case.torch_cls is not None:
        theirs = Run(nets[3], lambda params: case.torch_cls(params, **case.kwargs), data, tmp_path)
        theirs.train(0, STEPS)
        assert_close(weights(nets[0]), weights(nets[3]), times=10, what="beside torch.optim")
        assert resumed.scheduler.get_last_lr() == theirs.scheduler.get_last_lr()


def test_who_needs_the_loss_says_so(tmp_path: Path) -> None:
    """Of gradients that are added up SAM would take the last batch's for those of all."""
    net, data = network(ROWS[0]), batches(ACCUMULATE * STEPS)
    run = Run(net, lambda params: torchopt.SAM(params, torchopt.sgd(0.1)), data, tmp_path)
    before = weights(net)
    with pytest.raises(RuntimeError, match=r"zero_grad\(\) each time .* first_step\(\)"):
        run.train(0, STEPS)
    assert all(map(torch.equal, weights(net), before))
