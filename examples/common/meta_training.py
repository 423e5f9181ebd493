"""The outer loop of MAML: one batch of tasks after the other, with checkpoints."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import torchopt
from common.augmentation import RandomAffine
from common.checkpoints import check_settings, load_checkpoint, reading, save_checkpoint
from common.episodes import EpisodeSampler
from common.maml import Learner, Params, initial_rates


@dataclass(frozen=True)
class Settings:
    """What determines a run: two runs of the same settings give the same numbers.

    Times are in seconds; the learning rates are those of the first iteration.
    """

    data: str
    ways: int
    shots: int
    queries: int
    inner_optimizer: str
    inner_steps: int
    inner_lr: float
    learn_lr: bool
    first_order: bool
    meta_batch: int
    iterations: int
    outer_lr: float
    augment: float
    channels: int
    blocks: int
    pretrain_iterations: int
    test_tasks: int
    test_steps: int
    seed: int


class MetaTraining:
    """Initial weights and inner learning rates, trained by Adam with cosine decay.

    Args:
        settings: Of the run.
        learner: How one task is learned.
        params: Initial weights by name; they become the trained ones.
        sampler: Of the training tasks.
        time_budget: Seconds of training after which it stops even if iterations are left; the
            learning rate then falls with the time spent, so that it ends at zero. ``None`` for no
            limit, which alone makes a run exactly repeatable on a machine that is too slow.
    """

    def __init__(
        self,
        settings: Settings,
        learner: Learner,
        params: Params,
        sampler: EpisodeSampler,
        time_budget: float | None,
    ) -> None:
        self.settings, self.learner, self.sampler = settings, learner, sampler
        self.augment = RandomAffine(settings.augment, sampler.generator)
        self.time_budget = time_budget
        self.params = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
        self.rates = initial_rates(self.params, settings.inner_lr)
        groups: list[dict[str, Any]] = [{"params": list(self.params.values())}]
        if settings.learn_lr:
            groups.append({"params": [rate.requires_grad_() for rate in self.rates.values()]})
        self.outer = torchopt.Adam(groups, lr=settings.outer_lr)
        self.iteration = 0
        self.seconds = 0.0

    @property
    def fraction(self) -> float:
        """How much of the training is over, from 0 to 1."""
        by_count = self.iteration / self.settings.iterations
        by_time = 0.0 if self.time_budget is None else self.seconds / self.time_budget
        return min(1.0, max(by_count, by_time))

    @property
    def finished(self) -> bool:
        """Whether all iterations are done or the time is used up."""
        return self.fraction >= 1.0

    def step(self) -> tuple[float, float]:
        """Train on one batch of tasks; return its mean query loss and accuracy in percent."""
        start = time.perf_counter()
        for group in self.outer.param_groups:
            group["lr"] = self.settings.outer_lr * 0.5 * (1 + math.cos(math.pi * self.fraction))
        device = next(iter(self.params.values())).device
        batch = self.augment(self.sampler.sample_batch(self.settings.meta_batch)).to(device)
        losses, hits = self.learner.outcome(
            self.params, self.rates, batch, self.settings.inner_steps
        )
        self.outer.zero_grad()
        losses.mean().backward()
        self.outer.step()
        self.iteration += 1
        self.seconds += time.perf_counter() - start
        return losses.mean().item(), 100 * hits.mean().item()

    def save(self, path: Path) -> None:
        """Write everything that the rest of the run depends on."""
        save_checkpoint(
            path,
            {
                "settings": asdict(self.settings),
                "iteration": self.iteration,
                "seconds": self.seconds,
                "params": self.params,
                "rates": self.rates,
                "outer": self.outer.state_dict(),
                "sampler": self.sampler.generator.get_state(),
            },
        )

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: If the file is no checkpoint or was written with other settings.
        """
        device = next(iter(self.params.values())).device
        saved = load_checkpoint(path, device)
        check_settings(saved["settings"], asdict(self.settings), path)
        with reading(path):
            for own, stored in ((self.params, saved["params"]), (self.rates, saved["rates"])):
                _copy(own, stored)
            self.outer.load_state_dict(saved["outer"])
            self.sampler.generator.set_state(saved["sampler"].cpu())
            self.iteration, self.seconds = int(saved["iteration"]), float(saved["seconds"])


def _copy(own: dict[str, Tensor], stored: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(stored[name])
