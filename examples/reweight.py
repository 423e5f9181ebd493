"""Learn the weight of each training example from a few clean ones: learning to reweight.

At every minibatch the weights of its examples start at zero. A virtual step of SGD with these
weights leaves the network where it is, but the loss on a few clean, balanced images after the step
has a derivative with respect to each weight. Its negative part, normalised, weights the real step.

Two tasks on real handwritten digits: two digits of which one is rare, as in the paper, and ten
digits with wrong labels, where the paper uses CIFAR. Each method is tested on balanced images with
right labels. All have the same data; all but the learned weights also train on the clean images.

    python examples/reweight.py                              # scikit-learn's digits, both tasks
    python examples/reweight.py --tasks imbalance --proportions 0.9 0.95 0.98 0.99 0.995
    python examples/reweight.py --data mnist --root DIR      # the four official files in DIR
    python examples/reweight.py --data mnist --root DIR --full   # 8,000 steps
    python examples/reweight.py --resume                     # after an interruption

What differs from the paper with scikit-learn's digits: they have 8x8 pixels, and each has about
100 originals to train on, so the 5,000 training images are distorted copies (as many rare
originals as rare images, up to 100); about 160 test images, other ones for every seed; fewer and
larger steps, with momentum and a learning rate that falls to zero.

Where a digit is rare, plain training learns it late rather than never: with ten times the learning
rate and four times the steps (``--steps 2000``), "plain, lr x 10" reaches about 95 % at 0.995.

Reference: Ren, Zeng, Yang and Urtasun, Learning to reweight examples for robust deep learning,
ICML 2018, https://arxiv.org/abs/1803.09050.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common.command import Jobs, parser, plain_endings, positive_float, positive_int
from common.digit_data import Problem, flipped, imbalanced, load_digits, load_mnist
from common.options import by_choice, listed, share, whole
from common.reporting import console, print_claims, progress_bar
from common.reweight_report import beyond_the_paper, claims, draw, tables
from common.reweight_training import FAST, METHODS, Training, train


TASKS = {
    "imbalance": [*METHODS],
    "flip": [name for name in METHODS if name not in ("class weights", FAST)],
}
SIZES = {"digits": {"imbalance": 5000, "flip": 1000}, "mnist": {"imbalance": 5000, "flip": 10000}}
TRAINING = {
    "imbalance": Training(steps=500, batch=100, lr=0.01, momentum=0.9, decay=True, channels=8),
    "flip": Training(steps=1200, batch=50, lr=0.05, momentum=0.9, decay=True, channels=16),
}
FULL = {"steps": 8000, "lr": 1e-3, "decay": False}  # the paper's, for MNIST
PROPORTIONS = (0.9, 0.995)
FULL_PROPORTIONS = (0.9, 0.95, 0.98, 0.99, 0.995)
MEASUREMENTS = 10
QUICK = {
    "steps": 10,
    "seeds": 1,
    "workers": 1,
    "size": 300,
    "channels": 4,
    "proportions": [0.9],
    "methods": ["plain", "learned weights"],
}


def digit(text: str) -> int:
    """Read a digit."""
    value = whole(text)
    if value > 9:
        raise argparse.ArgumentTypeError(f"must be a digit, got {value}")
    return value


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    description = "Learn the weights of training examples from a few clean ones."
    options = parser("reweight", description, QUICK)
    add = options.add_argument
    add("--workers", type=positive_int, default=2, help="trainings at once, a process each")
    add("--data", choices=sorted(SIZES), default="digits", help="images to learn from")
    add("--root", type=Path, help="folder with the official MNIST files")
    tasks_help = "imbalance: one of two digits is rare; flip: ten digits, wrong labels"
    add("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), help=tasks_help)
    methods_help = f"to compare, of {listed(METHODS)} (default all)"
    add("--methods", nargs="+", choices=METHODS, metavar="METHOD", help=methods_help)
    add("--seeds", type=positive_int, default=10, help="runs of everything; the paper has ten")
    add("--digits", nargs=2, type=digit, default=[4, 9], help="the rare digit and the other one")
    usual, full = (" ".join(map(str, p)) for p in (PROPORTIONS, FULL_PROPORTIONS))
    help_text = f"shares of the frequent digit (default {usual}; with --full {full})"
    add("--proportions", nargs="+", type=share, help=help_text)
    add("--flip-rate", type=share, default=0.4, help="share of wrong labels")
    add("--clean", type=positive_int, default=10, help="clean images of the task imbalance")
    add("--flip-clean", type=positive_int, default=100, help="clean images of the task flip")
    sizes = {f"{d}/{t}": {"size": n} for d, own in SIZES.items() for t, n in own.items()}
    add("--size", type=positive_int, help=f"training images {by_choice(sizes, 'size')}")
    training = {task: asdict(usual) for task, usual in TRAINING.items()}
    steps, batch, lr, channels = (
        f"{by_choice(training, name)[:-1]}{f'; with --full {FULL[name]}' if name in FULL else ''})"
        for name in ("steps", "batch", "lr", "channels")
    )
    add("--steps", type=positive_int, help=f"minibatches of a training {steps}")
    add("--batch", type=positive_int, help=f"images of a minibatch {batch}")
    add("--lr", type=positive_float, help=f"learning rate at first {lr}")
    add("--channels", type=positive_int, help=f"channels of the network's convolutions {channels}")
    add("--full", action="store_true", help="settings of the paper, for MNIST; takes long")
    args = options.parse_args(argv)
    if (args.data == "mnist") != (args.root is not None):
        options.error("--data mnist needs --root DIR, the folder with the official files")
    if args.full and args.data != "mnist":
        options.error("--full needs --data mnist: its settings are for MNIST")
    if args.digits[0] == args.digits[1]:
        options.error(f"--digits: expected two different digits, got {args.digits}")
    args.methods = args.methods or list(METHODS)
    proportions = args.proportions or (FULL_PROPORTIONS if args.full else PROPORTIONS)
    args.proportions = sorted(set(proportions))
    return args


def size_of(args: argparse.Namespace, task: str) -> int:
    """Return how many training images a task has."""
    return args.size or SIZES[args.data][task]


def training_of(args: argparse.Namespace, task: str) -> Training:
    """Return how the networks of a task are trained."""
    names = ("steps", "batch", "lr", "channels")
    given = {name: getattr(args, name) for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    return replace(TRAINING[task], **{**(FULL if args.full else {}), **given})


def problem_of(args: argparse.Namespace, task: str, proportion: float | None, seed: int) -> Problem:
    """Return what a task trains and tests on.

    Raises:
        ValueError: If the data has too few images for it.
    """
    source = load_digits() if args.data == "digits" else load_mnist(args.root)
    generator, size = torch.Generator().manual_seed(seed), size_of(args, task)
    if task == "flip":
        return flipped(source, args.flip_rate, size, args.flip_clean, generator)
    assert proportion is not None
    digits = (args.digits[0], args.digits[1])
    return imbalanced(source, digits, proportion, size, args.clean, generator)


def trained(args: argparse.Namespace, part: dict[str, Any]) -> list[dict[str, Any]]:
    """Do one training, in whichever process, and return its metrics."""
    torch.set_num_threads(args.threads)
    task, seed = part["task"], part["seed"]
    problem = problem_of(args, task, part["proportion"], seed).to(args.device)
    return list(train(part["method"], problem, training_of(args, task), seed, MEASUREMENTS))


class ReweightRun:
    """One run: data, a training for each task, method and seed, report."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.parts = self._parts()
        if not self.parts:
            raise ValueError(f"None of the methods {args.methods} is for the tasks {args.tasks}.")
        for task, proportion in dict.fromkeys((p["task"], p["proportion"]) for p in self.parts):
            problem_of(args, task, proportion, args.seed)  # refuse what cannot be made now
        names = ("data", "digits", "flip_rate", "clean", "flip_clean", "seed")
        settings = {name: getattr(args, name) for name in names}
        settings["sizes"] = {task: size_of(args, task) for task in args.tasks}
        settings["training"] = {task: asdict(training_of(args, task)) for task in args.tasks}
        self.jobs = Jobs(args.output, settings, args.resume, args.overwrite)

    def _parts(self) -> list[dict[str, Any]]:
        """Return what names each training; seed by seed, so that an early end has all methods."""
        args = self.args
        return [
            {"task": task, "proportion": proportion, "method": method, "seed": args.seed + k}
            for task in args.tasks
            for k in range(args.seeds)
            for proportion in (args.proportions if task == "imbalance" else [None])
            for method in TASKS[task]
            if method in args.methods
        ]

    def run(self) -> dict[str, Any]:
        """Do everything and return the results."""
        began = time.monotonic()
        self._train()
        wanted = [tuple(part.values()) for part in self.parts]
        keys = ("task", "proportion", "method", "seed")
        rows = [row for row in self.jobs.rows if tuple(row[key] for key in keys) in wanted]
        for table in tables(rows):
            console.print(table)
        last = [row for row in rows if "other_weight" in row]
        results = {
            "settings": {"data": self.args.data, "seeds": self.args.seeds},
            "accuracies": [{k: v for k, v in row.items() if "counts" not in k} for row in last],
            "claims": claims(rows),
            "beyond the paper": beyond_the_paper(rows),
            "seconds": round(time.monotonic() - began, 1),
        }
        mine = results["claims"]
        judged = print_claims([*mine, *results["beyond the paper"]], self.args.quick)
        results["claims"], results["beyond the paper"] = judged[: len(mine)], judged[len(mine) :]
        draw(self.args.output / "reweight.png", rows, self.args.digits, self.args.flip_rate)
        self.jobs.save_results(results)
        console.print(f"Figure, metrics and results are in {self.args.output}.")
        return results

    def _train(self) -> None:
        with progress_bar() as bar:
            progress = bar.add_task("trainings", total=len(self.parts), figures="")

            def ended(part: dict[str, Any]) -> None:
                where = "" if part["proportion"] is None else f" {part['proportion']}"
                figures = f"{part['task']}{where}, {part['method']}, seed {part['seed']}"
                bar.update(progress, advance=1, figures=figures)

            self.jobs.run_all(self.parts, partial(trained, self.args), self.args.workers, ended)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the example and return its results."""
    args = parse(argv)
    with plain_endings("reweight"):
        return ReweightRun(args).run()


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
