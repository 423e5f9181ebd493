"""Regression by MAML: fit a sine wave to ten points (``few_shot.py --data sinusoid``).

A task is a wave A sin(x + phase) with A in [0.1, 5] and phase in [0, pi], given at K points x in
[-5, 5]. A network with two layers of 40 units is meta-trained so that one gradient step on the K
points fits the wave. Beside it stand the paper's baseline, the same network trained on the points
of all waves and then fine-tuned with the best of several step sizes, and the paper's oracle, which
is told amplitude and phase. The networks of all seeds are trained at once, by ``vmap``.

    python examples/few_shot.py --data sinusoid
    python examples/few_shot.py --data sinusoid --iterations 70000       # as long as the paper
    python examples/few_shot.py --data sinusoid --first-order
    python examples/few_shot.py --data sinusoid --resume                 # after an interruption

Reference: Finn, Abbeel and Levine, Model-agnostic meta-learning for fast adaptation of deep
networks, ICML 2017, section 5.1, https://arxiv.org/abs/1703.03400. Unlike the paper's, the weights
start from PyTorch's usual distribution.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

import torchopt
from common.checkpoints import check_settings, load_checkpoint, reading, save_checkpoint
from common.command import Jobs, parser, plain_endings, positive_float, positive_int
from common.reporting import console, print_claims, progress_bar
from common.sinusoid_report import Fit, Tested, claims, draw, table
from common.sinusoid_tasks import (
    GRID,
    Condition,
    Params,
    Waves,
    adaptation,
    fits,
    initial_params,
    sample_points,
    sample_waves,
    squared_error,
    told_fits,
    tuned_rate,
)


SHOWN_AMPLITUDE = 2.0  # the figure's left panels show a larger wave
CHECKPOINT_EVERY = 250
NOT_SETTINGS = ("device", "threads", "output", "resume", "overwrite", "quick")
QUICK = {
    "iterations": 50,
    "seeds": 2,
    "meta_batch": 5,
    "test_waves": 20,
    "test_shots": [10],
    "test_steps": 2,
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line, without ``--data sinusoid``."""
    result = parser("sinusoid", "Meta-train a network to fit a sine wave to a few points.", QUICK)
    result.prog = "few_shot --data sinusoid"
    add = result.add_argument
    add("--seeds", type=positive_int, default=5, help="networks of each kind, for the intervals")
    add("--shots", type=positive_int, default=10, help="points of a wave in meta-training")
    add(
        "--test-shots",
        type=positive_int,
        nargs="+",
        default=[5, 10, 20],
        help="points of a wave in tests",
    )
    add(
        "--inner-lr",
        type=positive_float,
        default=0.01,
        help="learning rate of the gradient steps on a wave",
    )
    add(
        "--inner-steps",
        type=positive_int,
        default=1,
        help="gradient steps on a wave in meta-training",
    )
    add("--test-steps", type=positive_int, default=10, help="gradient steps on a wave in tests")
    add("--meta-batch", type=positive_int, default=25, help="waves of an iteration, for each seed")
    add(
        "--iterations",
        type=positive_int,
        default=5000,
        help="meta-iterations, and steps of pre-training",
    )
    add("--outer-lr", type=positive_float, default=1e-3, help="learning rate of Adam")
    add("--first-order", action="store_true", help="ignore second derivatives")
    add("--test-waves", type=positive_int, default=600, help="waves of a test, for each seed")
    return result.parse_args(argv)


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return what determines the numbers."""
    return {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}


# Training ---------------------------------------------------------------------------------------


class Training:
    """The networks of all seeds, trained side by side in one way.

    Args:
        args: The command line.
        name: Of the checkpoint.
        loss: Gives the mean loss of each seed ``[seeds]`` for stacked weights, waves and points.
        inputs: Of the network.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        name: str,
        loss: Callable[[Params, Waves, Tensor], Tensor],
        inputs: int = 1,
    ) -> None:
        self.args, self.loss = args, loss
        self.path = args.output / f"{name}.pt"
        start = initial_params(args.seeds, args.seed, inputs)
        self.params = {k: p.to(args.device).requires_grad_(True) for k, p in start.items()}
        self.optimizer = torchopt.Adam(self.params.values(), lr=args.outer_lr)
        self.generator = torch.Generator().manual_seed(args.seed * 100 + 1)
        self.iteration = 0
        self.rows: list[dict[str, Any]] = []

    def step(self) -> Tensor:
        """Do one iteration and return the loss of each seed."""
        shape = (self.args.seeds, self.args.meta_batch)
        waves = sample_waves(shape, self.generator).to(self.args.device)
        x = sample_points(shape, 2 * self.args.shots, self.generator).to(self.args.device)
        losses = self.loss(self.params, waves, x)
        self.optimizer.zero_grad()
        losses.sum().backward()  # a seed's loss depends on its own weights only
        self.optimizer.step()
        self.iteration += 1
        return losses.detach()

    def run(self, report: Callable[[int, float], None]) -> list[dict[str, Any]]:
        """Train to the end and return the metrics."""
        every = max(1, self.args.iterations // 100)
        while self.iteration < self.args.iterations:
            losses = self.step()
            last = self.iteration == self.args.iterations
            if self.iteration % every == 0 or last:
                self.rows.append({"iteration": self.iteration, "losses": losses.tolist()})
                report(self.iteration, losses.mean().item())
            if self.iteration % CHECKPOINT_EVERY == 0 or last:
                self.save()
        return self.rows

    def save(self) -> None:
        """Write the checkpoint."""
        content = {
            "settings": settings_of(self.args),
            "iteration": self.iteration,
            "params": {name: p.detach() for name, p in self.params.items()},
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "rows": self.rows,
        }
        save_checkpoint(self.path, content)

    def restore(self) -> None:
        """Continue from the checkpoint, if there is one and ``--resume`` is given."""
        if not self.args.resume:
            self.path.unlink(missing_ok=True)  # of a run that is overwritten
        if not self.path.exists():
            return
        content = load_checkpoint(self.path, self.args.device)
        check_settings(content["settings"], settings_of(self.args), self.path)
        with reading(self.path), torch.no_grad():
            self.iteration, self.rows = int(content["iteration"]), list(content["rows"])
            for name, p in self.params.items():
                p.copy_(content["params"][name])
            self.optimizer.load_state_dict(content["optimizer"])
            self.generator.set_state(content["generator"].cpu())


def trainings(args: argparse.Namespace) -> dict[str, Training]:
    """Return MAML, the baseline and the oracle, by their names."""

    def after_adaptation(params: Params, x: Tensor, y: Tensor) -> Tensor:
        """Return the loss on half of a wave's points after steps on the other half."""
        (x, query_x), (y, query_y) = x.split(args.shots), y.split(args.shots)
        path = adaptation(params, x, y, args.inner_lr, args.inner_steps, args.first_order)
        return squared_error(path[-1], query_x, query_y)

    def maml(params: Params, waves: Waves, x: Tensor) -> Tensor:
        losses = vmap(vmap(after_adaptation, in_dims=(None, 0, 0)))(params, x, waves(x))
        return losses.mean(-1)

    def pretraining(params: Params, waves: Waves, x: Tensor) -> Tensor:
        return vmap(squared_error)(params, x.flatten(1, 2), waves(x).flatten(1, 2))

    def oracle(params: Params, waves: Waves, x: Tensor) -> Tensor:
        told = waves.described(x)
        return vmap(squared_error)(params, told.flatten(1, 2), waves(x).flatten(1, 2))

    return {
        "MAML": Training(args, "maml", maml),
        "pre-training": Training(args, "pretraining", pretraining),
        "oracle": Training(args, "oracle", oracle, inputs=3),
    }


# The run ----------------------------------------------------------------------------------------


class SinusoidRun:
    """One run: training, tests, report."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.started = time.monotonic()
        self.jobs = Jobs(args.output, settings_of(args), args.resume, args.overwrite)
        torch.set_num_threads(args.threads)
        self.trained = trainings(args)
        for training in self.trained.values():
            training.restore()

    def run(self) -> dict[str, Any]:
        """Do everything and return the results."""
        with progress_bar() as bar:
            for name, training in self.trained.items():
                self._train(bar, name, training)
        conditions = [Condition(shots) for shots in self.args.test_shots]
        conditions.append(Condition(self.args.shots, half=True))
        with console.status("testing"):
            tested = [test for condition in conditions for test in self._tested(condition)]
            shown = [fit for half in (False, True) for fit in self._shown(half)]
        return self._report(tested, shown)

    def _train(self, bar: Any, name: str, training: Training) -> None:
        done, total = training.iteration, self.args.iterations
        task = bar.add_task(f"{name:12}", total=total, completed=done, figures="")

        def report(iteration: int, loss: float) -> None:
            bar.update(task, completed=iteration, figures=f"squared error {loss:.3f}")

        self.jobs.run({"learner": name}, lambda: training.run(report))

    def _rate(self, name: str, condition: Condition) -> float:
        if name == "MAML":
            return self.args.inner_lr
        params, seed = self.trained[name].params, self.args.seed * 100 + 2
        return tuned_rate(params, condition, self.args.test_steps, seed)

    def _tested(self, condition: Condition) -> list[Tested]:
        args, results = self.args, []
        waves, x = condition.draw(args.seeds, args.test_waves, args.seed * 100 + 3)
        waves, x = waves.to(args.device), x.to(args.device)
        for name in ("pre-training", "MAML"):
            lr = self._rate(name, condition)
            predictions = fits(self.trained[name].params, waves, x, lr, args.test_steps)
            errors = condition.errors(predictions, waves).tolist()
            results.append(Tested(name, str(condition), lr, errors))
        predictions = told_fits(self.trained["oracle"].params, waves)
        errors = condition.errors(predictions, waves).tolist()
        return [*results, Tested("oracle", str(condition), None, errors)]

    def _shown(self, half: bool) -> list[Fit]:
        """Return the fits of the first seed's networks for the figure.

        Among the larger waves it is the one nearest to the median error of both learners.
        """
        args, condition = self.args, Condition(self.args.shots, half)
        waves, x = condition.draw(args.seeds, args.test_waves, args.seed * 100 + 3)
        waves, x = (
            Waves(waves.amplitude[:1], waves.phase[:1]).to(args.device),
            x[:1].to(args.device),
        )
        truth = waves(GRID.flatten().to(x))[0, :, 0]
        fitted = {}
        for name in ("MAML", "pre-training"):
            params = {k: p[:1] for k, p in self.trained[name].params.items()}
            fitted[name] = fits(params, waves, x, self._rate(name, condition), args.test_steps)[0]
        amplitudes = waves.amplitude.flatten()
        large = (amplitudes >= min(SHOWN_AMPLITUDE, amplitudes.max().item())).nonzero().flatten()
        distance = torch.zeros(len(large))
        for predictions in fitted.values():
            errors = (predictions[large, -1] - truth[large]).square().mean(-1)
            ranks = errors.argsort().argsort()
            distance += (ranks - len(large) / 2).abs().cpu()
        shown = large[distance.argmin()]
        points = (x[0, shown].flatten().tolist(), waves(x)[0, shown].flatten().tolist())
        grid, true = GRID.flatten().tolist(), truth[shown].tolist()
        return [
            Fit(name, half, points, grid, true, predictions[shown].tolist())
            for name, predictions in fitted.items()
        ]

    def _report(self, tested: list[Tested], shown: list[Fit]) -> dict[str, Any]:
        args = self.args
        console.print(table(tested, args.seeds, args.test_waves))
        results = {
            "settings": settings_of(args),
            "results": [test.as_row() for test in tested],
            "claims": claims(tested, str(Condition(args.shots)), str(Condition(args.shots, True))),
            "seconds": round(time.monotonic() - self.started, 1),
        }
        results["claims"] = print_claims(results["claims"], args.quick)
        draw(args.output / "figure.png", args.shots, tested, shown)
        self.jobs.save_results(results)
        console.print(f"Figure, metrics, results and checkpoints are in {args.output}.")
        return results


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the example and return its results.

    Args:
        argv: The command line without ``--data sinusoid``.
    """
    args = parse(argv)
    with plain_endings("few_shot --data sinusoid"):
        return SinusoidRun(args).run()
