"""Optimizers in a Lightning ``Trainer``: one cycle, a monitor, added gradients, resumption."""

from __future__ import annotations

import logging
import warnings
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
    reads_loss,
    train,
    twin,
    weights,
)
from tolerances import assert_close
from torch import Tensor, nn

import torchopt


lightning = pytest.importorskip("lightning.pytorch")
loggers = pytest.importorskip("lightning.pytorch.loggers.logger")
#: Of each epoch; gradients of two are added up.
BATCHES, ACCUMULATE, EPOCHS = 4, 2, 2


class Rates(loggers.DummyLogger):
    """What :class:`LearningRateMonitor` has reported."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.found.append(metrics)


class Module(lightning.LightningModule):
    def __init__(self, net: nn.Module, make: Any, total_steps: int) -> None:
        super().__init__()
        self.net, self.make, self.total_steps = net, make, total_steps

    def training_step(self, batch: Any, index: int) -> Tensor:
        return loss_of(self.net, batch)

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.net.parameters())
        scheduler = one_cycle(optimizer, self.total_steps)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def fit(module: Module, data: list[Any], folder: Path, epochs: int, **options: Any) -> Any:
    """Train for some epochs, in all, and return the trainer."""
    resume = options.pop("resume", None)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        max_epochs=epochs,
        logger=Rates(),
        callbacks=[lightning.callbacks.LearningRateMonitor("step", log_momentum=True)],
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        **options,
    )
    loader = torch.utils.data.DataLoader(data, batch_size=None, shuffle=False)
    trainer.fit(module, loader, ckpt_path=resume)
    return trainer


@every_optimizer()
def test_one_cycle_accumulation_and_resume(case: Case, tmp_path: Path) -> None:
    # a step that reads the loss is told that of the last batch
    accumulate = 1 if reads_loss(case) else ACCUMULATE
    options = {"accumulate_grad_batches": accumulate, "gradient_clip_val": 0.5}
    data, steps = batches(BATCHES), EPOCHS * BATCHES // accumulate
    plain = network(case)
    nets = [twin(plain, case) for _ in range(4)]

    def make(params: Any) -> torchopt.Optimizer:
        return case.cls(params, **case.kwargs)

    optimizer = make(plain.parameters())
    cycle = one_cycle(optimizer, steps)
    train(plain, optimizer, data * EPOCHS, scheduler=cycle, accumulate=accumulate, max_norm=0.5)

    whole = fit(Module(nets[0], make, steps), data, tmp_path, EPOCHS, **options)
    assert_close(weights(nets[0]), weights(plain), times=10, what="beside a plain loop")

    half = fit(Module(nets[1], make, steps), data, tmp_path, 1, **options)
    half.save_checkpoint(tmp_path / "half.ckpt")
    module = Module(nets[2], make, steps)
    resumed = fit(module, data, tmp_path, EPOCHS, resume=tmp_path / "half.ckpt", **options)
    assert_close(weights(nets[2]), weights(nets[0]), what="resumed")
    assert half.logger.found + resumed.logger.found == whole.logger.found

    if case.torch_cls is not None:
        module = Module(nets[3], lambda params: case.torch_cls(params, **case.kwargs), steps)
        theirs = fit(module, data, tmp_path, EPOCHS, **options)
        assert_close(weights(nets[0]), weights(nets[3]), times=10, what="beside torch.optim")
        assert rates(whole) == rates(theirs)


def test_sam(tmp_path: Path) -> None:
    """The trainer's closure is called twice; it starts anew only if each batch makes a step."""
    case = ROWS[0]
    plain, data = network(case), batches(BATCHES)
    nets = [twin(plain, case) for _ in range(2)]

    def make(params: Any) -> torchopt.Optimizer:
        return torchopt.SAM(params, torchopt.sgd(0.1, momentum=0.9), rho=0.1)

    optimizer = make(plain.parameters())
    train(plain, optimizer, data, scheduler=one_cycle(optimizer, BATCHES))
    fit(Module(nets[0], make, BATCHES), data, tmp_path, 1)
    assert_close(weights(nets[0]), weights(plain), times=10)

    before = weights(nets[1])
    with pytest.raises(RuntimeError, match=r"zero_grad.*first_step"):
        fit(Module(nets[1], make, BATCHES), data, tmp_path, 1, accumulate_grad_batches=2)
    assert_close(weights(nets[1]), before)


def rates(trainer: Any) -> list[float]:
    """Return the learning rates that the monitor reported for each batch."""
    (name,) = {n for metrics in trainer.logger.found for n in metrics if "momentum" not in n}
    found = [metrics[name] for metrics in trainer.logger.found]
    assert len(found) == EPOCHS * BATCHES
    assert len(set(found)) >= EPOCHS * BATCHES // ACCUMULATE
    return found
