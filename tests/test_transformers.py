"""Optimizers in the ``Trainer`` of Hugging Face's transformers, and its resumption."""

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


transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
STEPS, ACCUMULATE = 4, 2


class Model(nn.Module):
    """What the trainer takes: a model that returns its loss."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.mse_loss(self.net(x), labels)}


class InOrder(transformers.Trainer):
    """A trainer that does not shuffle, so that a plain loop can follow."""

    def get_train_dataloader(self) -> Any:
        dataset: Any = self.train_dataset
        loader = torch.utils.data.DataLoader(dataset, batch_size=4, shuffle=False)
        return self.accelerator.prepare(loader)


def trainer(net: nn.Module, make: Any, data: list[Any], folder: Path) -> Any:
    rows = [{"x": x, "labels": y} for batch in data for x, y in zip(*batch)]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=STEPS,
        gradient_accumulation_steps=ACCUMULATE,
        max_grad_norm=0.5,
        save_steps=2,
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    optimizer = make(net.parameters())
    optimizers = (optimizer, one_cycle(optimizer, STEPS))
    return InOrder(Model(net), arguments, train_dataset=rows, optimizers=optimizers)


@every_optimizer(lambda case: not reads_loss(case))
def test_training_and_resumption(case: Case, tmp_path: Path) -> None:
    plain, data = network(case), batches(ACCUMULATE * STEPS)
    nets = [twin(plain, case) for _ in range(3)]

    def make(params: Any) -> torchopt.Optimizer:
        return case.cls(params, **case.kwargs)

    optimizer = make(plain.parameters())
    cycle = one_cycle(optimizer, STEPS)
    train(plain, optimizer, data, scheduler=cycle, accumulate=ACCUMULATE, max_norm=0.5)

    trainer(nets[0], make, data, tmp_path).train()
    assert_close(weights(nets[0]), weights(plain), times=10, what="beside a plain loop")
    resumed = trainer(nets[1], make, data, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == STEPS
    assert_close(weights(nets[1]), weights(nets[0]), what="resumed")

    if case.torch_cls is not None:
        theirs = lambda params: case.torch_cls(params, **case.kwargs)  # noqa: E731
        trainer(nets[2], theirs, data, tmp_path / "torch").train()
        assert_close(weights(nets[0]), weights(nets[2]), times=10, what="beside torch.optim")


@pytest.mark.parametrize("name", ["sam", "polyak"])
def test_who_needs_the_loss_says_so(name: str, tmp_path: Path) -> None:
    """The trainer steps without a closure."""
    net = network(ROWS[0])
    make = {
        "sam": lambda params: torchopt.SAM(params, torchopt.sgd(0.1)),
        "polyak": lambda params: torchopt.PolyakSGD(params, 0.1),
    }
    before = weights(net)
    with pytest.raises(ValueError, match=r"optimizer.step\(closure\)"):
        trainer(net, make[name], batches(ACCUMULATE * STEPS), tmp_path).train()
    assert all(map(torch.equal, weights(net), before))
