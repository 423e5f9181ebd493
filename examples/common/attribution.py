r"""What each training example does to the loss after a training run: exactly, and by TracIn.

A *run* is a problem, an order of batches and an optimizer. Each example :math:`i` has a weight
:math:`w_i = 1` in the losses of its batches, and :math:`-\partial L / \partial w_i` predicts, to
first order, how the loss :math:`L` on held-out data changes if the run is made without it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

import torchopt
from common.attribution_data import Params, Problem, make_problem
from torchopt.diff import Checkpointed, accumulate, unroll


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        problem: The name of the problem.
        examples: How many examples there are to train on.
        batch: How many of them a step sees.
        steps: How many steps there are.
        lr: The learning rate of AdamW.
        micro_batches: Into how many parts the derivative of a step is divided.
        seed: Of data, initial weights and batches.
    """

    problem: str
    examples: int
    batch: int
    steps: int
    lr: float
    micro_batches: int = 1
    seed: int = 0

    def made(self) -> tuple[Problem, Params, Tensor]:
        """Return the problem, the initial weights, and the batches ``[steps, batch]``."""
        problem, params = make_problem(self.problem, self.examples, self.seed)
        generator = torch.Generator().manual_seed(self.seed)
        epochs = -(-self.steps * self.batch // self.examples)
        orders = [torch.randperm(self.examples, generator=generator) for _ in range(epochs)]
        flat = torch.cat(orders)[: self.steps * self.batch]
        return problem, params, flat.reshape(self.steps, self.batch)

    def optimizer(self) -> torchopt.GradientTransformation:
        """Return AdamW with a root that is smooth where a second moment is small."""
        # without eps_root the loss is no smooth function of the weights (metasmoothness)
        return torchopt.adamw(self.lr, betas=(0.9, 0.99), eps_root=1e-5, weight_decay=1e-3)

    # Training ------------------------------------------------------------------------------------

    def trained(
        self, weights: Tensor, adjoint: Any, each: Callable[[Params, Tensor], Any] | None = None
    ) -> tuple[Params, Any]:
        """Train, so that the result can be differentiated by the weights of the examples.

        Args:
            weights: One for each example.
            adjoint: How to differentiate it.
            each: Is called with the parameters before each step and its batch; its results are
                stacked.
        """
        problem, params, batches = self.made()
        tx = self.optimizer()

        def loss(params: Params, index: Tensor) -> Tensor:
            return (weights[index] * problem.losses(params, index)).mean()

        gradient = accumulate(grad(loss), micro_batches=self.micro_batches)

        def step(carry: Any, index: Tensor) -> Any:
            params, state = carry
            seen = None if each is None else each(params, index)
            grads = gradient(params, index)
            return tx.apply_gradients(grads, state, params, inplace=False), seen

        (params, _), seen = unroll(step, (params, tx.init(params)), batches, adjoint=adjoint)
        return params, seen

    def metagradient(self, adjoint: Any) -> tuple[Tensor, float]:
        """Return the exact derivative of the held-out loss by all weights, and that loss."""
        weights = torch.ones(self.examples, dtype=torch.float64, requires_grad=True)
        params, _ = self.trained(weights, adjoint)
        loss = self.made()[0].held_out_loss(params)
        return torch.autograd.grad(loss, weights)[0], loss.item()

    @torch.no_grad()
    def tracin(self, checkpoints: int) -> Tensor:
        """Return TracIn's estimate of the same derivative from some checkpoints of the run.

        Pruthi et al., 2020: minus the sum of the products of an example's gradient and that of the
        held-out loss, times the learning rate, as if each step were one of plain gradient descent
        and later steps did not depend on earlier ones. What the two have in common is a factor.
        """
        problem, params, batches = self.made()
        tx, state = self.optimizer(), None
        state, everyone = tx.init(params), torch.arange(self.examples)
        total = torch.zeros(self.examples, dtype=torch.float64)
        every = max(1, self.steps // checkpoints)
        for t, index in enumerate(batches):
            if t % every == every // 2:
                direction = grad(problem.held_out_loss)(params)
                losses = lambda p: problem.losses(p, everyone)  # noqa: E731
                products = jvp(losses, (params,), (direction,))[1]
                total -= self.lr * products * every / self.examples
            grads = grad(lambda p, i=index: problem.losses(p, i).mean())(params)
            params, state = tx.apply_gradients(grads, state, params, inplace=False)
        return total

    @torch.no_grad()
    def retrained(self, left_out: Tensor) -> Tensor:
        """Return the held-out losses after runs without some examples, all runs at once by vmap.

        Args:
            left_out: Which examples, true or false: ``[runs, examples]``.
        """
        problem, first, batches = self.made()
        tx = self.optimizer()

        def step(params: Params, state: Any, weights: Tensor, index: Tensor) -> Any:
            grads = grad(lambda p: (weights[index] * problem.losses(p, index)).mean())(params)
            return tx.apply_gradients(grads, state, params, inplace=False)

        weights = (~left_out).double()
        params = {k: p.expand(len(weights), *p.shape).clone() for k, p in first.items()}
        state = vmap(tx.init)(params)
        for index in batches:
            params, state = vmap(step, in_dims=(0, 0, 0, None))(params, state, weights, index)
        return vmap(problem.held_out_loss)(params)


# Killed and resumed ------------------------------------------------------------------------------


def in_folder(
    run: Run, folder: Path, every: Any, kill_at: tuple[str, int] | None, threads: int
) -> Tensor:
    """Return the metagradient of a run whose checkpoints are in a folder.

    Args:
        run: The run.
        folder: The folder; a run in it that was interrupted continues.
        every: Which carries are kept.
        kill_at: Direction and number of steps after which this process is killed.
        threads: Of the CPU; another number adds up in another order.
    """
    torch.set_num_threads(threads)

    def progress(direction: str, done: int, _: int) -> None:
        if (direction, done) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    return run.metagradient(Checkpointed(every, store=folder, progress=progress))[0]


def killed_and_resumed(run: Run, folder: Path, every: Any) -> dict[str, Any]:
    """Kill a run in each of its two passes, resume it, and compare with one left alone."""
    statuses, threads = [], torch.get_num_threads()
    for place in (("forward", run.steps // 2), ("backward", run.steps // 2)):
        process = multiprocessing.get_context("spawn").Process(
            target=in_folder, args=(run, folder, every, place, threads)
        )
        process.start()
        process.join()
        statuses.append(process.exitcode)
    resumed = in_folder(run, folder, every, None, threads)
    straight = run.metagradient(Checkpointed(every))[0]
    return {
        "killed": all(status == -signal.SIGKILL for status in statuses),
        "same": torch.equal(resumed, straight),
        "steps": run.steps,
        "left_files": len(list(folder.iterdir())),
    }


# Comparing ---------------------------------------------------------------------------------------


def subsets(count: int, examples: int, share: float, seed: int) -> Tensor:
    """Return random subsets of the examples, true or false: ``[count, examples]``."""
    generator = torch.Generator().manual_seed(seed + 1)
    size = max(1, round(share * examples))
    chosen = torch.zeros(count, examples, dtype=torch.bool)
    for row in chosen:
        row[torch.randperm(examples, generator=generator)[:size]] = True
    return chosen


def correlation(a: Tensor, b: Tensor) -> float:
    """Return Pearson's correlation."""
    return torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1].item()


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Return Spearman's correlation, that of the ranks (the linear datamodeling score)."""
    return correlation(a.argsort().argsort(), b.argsort().argsort())
