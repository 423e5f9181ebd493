"""Learn new image classes from a few examples: MAML on real images.

A network is meta-trained so that a few gradient steps on a handful of labelled images teach it
classes it has never seen. At the end its accuracy on unseen classes is compared with two baselines
measured in the same run: the same network without meta-training, and after ordinary pre-training
on the same classes; both may be fine-tuned for longer.

    python examples/few_shot.py                                  # handwritten digits, offline
    python examples/few_shot.py --data omniglot --root DIR       # the official zip files in DIR
    python examples/few_shot.py --data omniglot --root DIR --shots 5 --learn-lr
    python examples/few_shot.py --output runs/mine --resume      # after an interruption
    python examples/few_shot.py --data sinusoid                  # the paper's regression
    python examples/few_shot.py --quick                          # seconds, to check that it works

Reference: Finn, Abbeel and Levine, Model-agnostic meta-learning for fast adaptation of deep
networks, ICML 2017, https://arxiv.org/abs/1703.03400. With ``--learn-lr``: Li, Zhou, Chen and Li,
Meta-SGD, 2017, https://arxiv.org/abs/1707.09835.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from common import sinusoid
from common.baselines import FINE_TUNING_STEPS, fine_tuned, pretrain, with_fresh_head
from common.checkpoints import MetricsFile, write_atomically
from common.command import (
    non_negative_float,
    parser,
    plain_endings,
    positive_float,
    positive_int,
    prepare_folder,
    two_or_more,
)
from common.datasets import DataSplit, load_digits_split, load_omniglot
from common.episodes import EpisodeSampler
from common.maml import INNER_OPTIMIZERS, Accuracy, Learner, Params, measured_accuracy
from common.meta_training import MetaTraining, Settings
from common.networks import ConvNet
from common.options import by_choice
from common.reporting import (
    console,
    draw_curves,
    print_claims,
    progress_bar,
    results_table,
    tensorboard_writer,
)


# What an option is where it is not given.
DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {
        "ways": 4,
        "shots": 5,
        "queries": 15,
        "inner_steps": 3,
        "test_steps": 10,
        "inner_lr": 0.4,
        "meta_batch": 8,
        "iterations": 1000,
        "time_budget": 230.0,
        "outer_lr": 6e-3,
        "augment": 0.5,
        "channels": 32,
        "blocks": 3,
        "pretrain_iterations": 800,
    },
    "omniglot": {
        "ways": 5,
        "shots": 1,
        "queries": 5,
        "inner_steps": 1,
        "test_steps": 10,
        "inner_lr": 0.4,
        "meta_batch": 8,
        "iterations": 12000,
        "time_budget": 900.0,
        "outer_lr": 3e-3,
        "augment": 0.5,
        "channels": 32,
        "blocks": 4,
        "pretrain_iterations": 1500,
    },
}
SIZES = {"digits": 8, "omniglot": 28}
TITLES = {"sgd": "SGD", "adam": "Adam", "rmsprop": "RMSprop"}
TEST_QUERIES = 15
EVALUATIONS = 10  # small tests during training, for the curve only
CURVE_TASKS = 100


#: Of an option that depends on the data.
MEANINGS = {
    "ways": "classes of a task",
    "shots": "images of each class to learn a task from",
    "queries": "images of each class that judge what was learned, in training",
    "inner_steps": "gradient steps on a task in meta-training",
    "test_steps": "gradient steps on a task in the test",
    "meta_batch": "tasks of a meta-iteration",
    "iterations": "meta-iterations",
    "pretrain_iterations": "minibatches of the baseline's pre-training",
    "channels": "channels of each convolution",
    "blocks": "convolutions, one after the other",
    "augment": "how far training images are turned, moved and sheared; 0 for not at all",
    "inner_lr": "learning rate of the steps on a task",
    "outer_lr": "learning rate of meta-training, which falls to zero",
    "time_budget": "seconds of meta-training after which it ends; 0 for no limit",
}
TYPES: dict[str, Any] = {"ways": two_or_more}  # with one class there is nothing to tell apart
TYPES |= {"augment": non_negative_float, "time_budget": non_negative_float}
TYPES |= {"inner_lr": positive_float, "outer_lr": positive_float}
QUICK = {
    "iterations": 5,
    "pretrain_iterations": 20,
    "channels": 8,
    "meta_batch": 2,
    "test_tasks": 10,
    "inner_steps": 1,
    "test_steps": 2,
    "baseline_steps": [5],
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line and fill in what was not given."""
    description = "Meta-train a network to learn new image classes from a few examples."
    options = parser("few_shot", description, QUICK)
    add = options.add_argument
    data_help = "images to learn from; sinusoid has options of its own: --data sinusoid --help"
    add("--data", choices=[*sorted(DEFAULTS), "sinusoid"], default="digits", help=data_help)
    add("--root", type=Path, help="folder with the official Omniglot zip files")
    for name, meaning in MEANINGS.items():
        kind, text = TYPES.get(name, positive_int), f"{meaning} {by_choice(DEFAULTS, name)}"
        add(f"--{name.replace('_', '-')}", type=kind, default=argparse.SUPPRESS, help=text)
    optimizers = sorted(INNER_OPTIMIZERS)
    add("--inner-optimizer", choices=optimizers, default="sgd", help="optimizer on a task")
    add("--learn-lr", action="store_true", help="meta-learn one inner lr for each weight")
    add("--first-order", action="store_true", help="ignore second derivatives")
    add("--test-tasks", type=positive_int, default=600, help="tasks of the final test")
    counts, counts_help = list(FINE_TUNING_STEPS), "steps that the baselines may choose from"
    add("--baseline-steps", nargs="+", type=positive_int, default=counts, help=counts_help)
    add("--checkpoint-every", type=positive_int, default=50, help="iterations between checkpoints")
    add("--tensorboard", action="store_true", help="also write TensorBoard events")
    given = options.parse_args(argv)
    values = {**DEFAULTS[given.data], **vars(given)}
    if given.data == "omniglot" and given.root is None:
        options.error("--data omniglot needs --root DIR, the folder with the official zip files")
    return argparse.Namespace(**values)


class FewShotRun:
    """One run: data, meta-training, baselines, test, report."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.started = time.monotonic()
        self.settings = Settings(**{name: getattr(args, name) for name in Settings.__annotations__})
        self.folder: Path = args.output
        self.checkpoint = self.folder / "checkpoint.pt"
        # without a checkpoint, metrics may still be of another run
        files = [self.checkpoint, self.folder / "metrics.jsonl", self.folder / "results.json"]
        self.held = any(file.exists() for file in files)
        self._lock = prepare_folder(self.folder, files, args.resume, args.overwrite)
        torch.set_num_threads(args.threads)
        self.device = args.device
        self.split = self._load()
        self.network = self._network(self.settings.ways, stream=1)
        params = {name: p.detach() for name, p in self.network.named_parameters()}
        self.learner = Learner(self.network, args.inner_optimizer, args.first_order)
        sampler = self._sampler("train", self.settings.queries, stream=2)
        self._sampler("test", TEST_QUERIES, stream=3)  # refuse a test that cannot be held now
        budget = args.time_budget or None
        self.training = MetaTraining(self.settings, self.learner, params, sampler, budget)
        self.writer = tensorboard_writer(self.folder / "tensorboard") if args.tensorboard else None

    def _load(self) -> DataSplit:
        if self.args.data == "digits":
            return load_digits_split()
        return load_omniglot(self.args.root, SIZES["omniglot"])

    def _network(self, classes: int, stream: int) -> ConvNet:
        """Return a network whose initial weights depend on the seed and ``stream`` only."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed * 100 + stream)
            network = ConvNet(
                classes, SIZES[self.args.data], self.settings.channels, self.settings.blocks
            )
        return network.to(self.device)

    def _sampler(self, part: str, queries: int, stream: int) -> EpisodeSampler:
        """Return a sampler of its own random stream, so that phases do not disturb each other."""
        classes = self.split.test if part == "test" else self.split.train
        if part == "train":
            classes = classes.with_rotations()
        generator = torch.Generator().manual_seed(self.settings.seed * 100 + stream)
        return EpisodeSampler(classes, self.settings.ways, self.settings.shots, queries, generator)

    # Phases -----------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Do everything and return the results."""
        console.print(self.split.description)
        if self.args.resume and self.checkpoint.exists():
            self.training.restore(self.checkpoint)
            console.print(f"Resuming after iteration {self.training.iteration}.")
        elif self.args.resume and self.held:
            console.print("There is no checkpoint to resume from yet: starting from the beginning.")
        kept = self.training.iteration if self.args.resume else None
        fields = ("loss", "accuracy")
        metrics = MetricsFile(self.folder / "metrics.jsonl", kept, fields)
        try:
            self._meta_train(metrics)
        except KeyboardInterrupt:
            self.training.save(self.checkpoint)
            raise SystemExit(
                f"Interrupted after iteration {self.training.iteration}. Pass --resume to continue."
            ) from None
        return self._report(metrics, self._test())

    def _meta_train(self, metrics: MetricsFile) -> None:
        training, settings = self.training, self.settings
        with progress_bar() as bar:
            task = bar.add_task(
                "meta-training", total=settings.iterations, completed=training.iteration, figures=""
            )
            while not training.finished:
                stage = int(EVALUATIONS * training.fraction)
                loss, accuracy = training.step()
                row = {
                    "iteration": training.iteration,
                    "seconds": round(training.seconds, 2),
                    "loss": loss,
                    "accuracy": accuracy,
                }
                if int(EVALUATIONS * training.fraction) > stage:
                    row["test_accuracy"] = self._accuracy(
                        min(CURVE_TASKS, settings.test_tasks), stream=4
                    ).mean
                metrics.add(row)
                self._to_tensorboard(row)
                recent = metrics.rows[-50:]
                mean = {k: sum(r[k] for r in recent) / len(recent) for k in ("loss", "accuracy")}
                figures = f"loss {mean['loss']:.3f}  accuracy {mean['accuracy']:.1f} %"
                bar.update(task, completed=training.iteration, figures=figures)
                if training.iteration % self.args.checkpoint_every == 0 or training.finished:
                    training.save(self.checkpoint)

    def _accuracy(self, tasks: int, stream: int) -> Accuracy:
        sampler = self._sampler("test", TEST_QUERIES, stream)
        params, rates, steps = self.training.params, self.training.rates, self.settings.test_steps
        return measured_accuracy(self.learner, params, rates, sampler, steps, tasks)

    def _test(self) -> list[tuple[str, Accuracy, str]]:
        """Return (learner, accuracy, how it was adapted) of the baselines and of MAML."""
        fresh = dict(self._network(self.settings.ways, stream=1).named_parameters())
        with console.status("testing the network without meta-training"):
            untrained = self._fine_tuned({name: p.detach() for name, p in fresh.items()})
        body = self._pretrained()
        with console.status("fine-tuning the pre-trained network"):
            pretrained = self._fine_tuned(with_fresh_head(body, fresh))
        with console.status("testing the meta-trained network"):
            meta = self._accuracy(self.settings.test_tasks, stream=3)
        learned = "learned lr" if self.settings.learn_lr else f"lr {self.settings.inner_lr}"
        optimizer = TITLES[self.settings.inner_optimizer]
        how = f"{self.settings.test_steps} {optimizer} steps, {learned}"
        order = "first-order " if self.settings.first_order else ""
        return [
            ("no meta-training", *untrained),
            ("pre-training, then fine-tuning", *pretrained),
            (f"{order}MAML", meta, how),
        ]

    def _fine_tuned(self, params: Params) -> tuple[Accuracy, str]:
        return fine_tuned(
            self.learner,
            params,
            choice=lambda: self._sampler("train", self.settings.queries, stream=5),
            test=lambda: self._sampler("test", TEST_QUERIES, stream=3),
            tasks=self.settings.test_tasks,
            counts=self.args.baseline_steps,
        )

    def _pretrained(self) -> Params:
        classes = self.split.train.with_rotations()
        network = self._network(len(classes), stream=6)
        total = self.settings.pretrain_iterations
        with progress_bar() as bar:
            task = bar.add_task("pre-training ", total=total, figures="")

            def report(iteration: int, loss: float, accuracy: float) -> None:
                figures = f"loss {loss:.3f}  accuracy {100 * accuracy:.1f} %"
                bar.update(task, completed=iteration, figures=figures)

            pretrain(network, classes, total, self.settings.seed * 100 + 7, report)
        return dict(network.named_parameters())

    # Report -----------------------------------------------------------------------------------

    def _report(
        self, metrics: MetricsFile, tested: list[tuple[str, Accuracy, str]]
    ) -> dict[str, Any]:
        settings = self.settings
        title = f"{settings.data}, {settings.ways}-way {settings.shots}-shot"
        rows = [(name, str(accuracy), how) for name, accuracy, how in tested]
        console.print(
            results_table(f"{title}, {settings.test_tasks} tasks of unseen classes", rows)
        )
        seconds = self.training.seconds
        console.print(f"{self.training.iteration} meta-iterations in {seconds:.0f} s of training.")
        bars = [(name, accuracy.mean, accuracy.half_width) for name, accuracy, _ in tested]
        draw_curves(self.folder / "curves.png", title, metrics.rows, bars)
        claims = print_claims([claim(tested)], self.args.quick)
        results = {
            "settings": asdict(settings),
            "iterations": self.training.iteration,
            "training_seconds": round(seconds, 1),
            "results": {name: accuracy.summary() for name, accuracy, _ in tested},
            "claims": claims,
            "seconds": round(time.monotonic() - self.started, 1),
        }
        text = json.dumps(results, indent=2) + "\n"
        write_atomically(self.folder / "results.json", lambda path: path.write_text(text))
        if self.writer is not None:
            for name, accuracy, _ in tested:
                self.writer.add_scalar(f"test/{name}", accuracy.mean, self.training.iteration)
            self.writer.close()
        console.print(f"Curves, metrics, results and checkpoint are in {self.folder}.")
        return results

    def _to_tensorboard(self, row: dict[str, Any]) -> None:
        if self.writer is not None:
            for name in ("loss", "accuracy", "test_accuracy"):
                if name in row:
                    self.writer.add_scalar(f"training/{name}", row[name], row["iteration"])


def claim(tested: list[tuple[str, Accuracy, str]]) -> dict[str, Any]:
    """Return what the paper claims and what was measured; MAML is the last one tested."""
    *baselines, (_, maml, _) = tested
    best = max((accuracy for _, accuracy, _ in baselines), key=lambda accuracy: accuracy.mean)
    gain = maml - best  # all were tested on the same tasks
    return {
        "claim": "MAML learns unseen classes better than fine-tuning without meta-training",
        "measured": f"{maml}, the better baseline {best}; difference over the same "
        f"{len(gain.values)} tasks {gain.estimate:.2f} points",
        "holds": gain.estimate.above(0),
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the example and return its results."""
    data = argparse.ArgumentParser(add_help=False)
    data.add_argument("--data")
    chosen, others = data.parse_known_args(argv)
    if chosen.data == "sinusoid":
        return sinusoid.main(others)
    args = parse(argv)
    with plain_endings("few_shot"):
        return FewShotRun(args).run()


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
