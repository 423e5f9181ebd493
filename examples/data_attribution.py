"""Which training examples made the model what it is: metagradients of a whole training run.

A small network is trained, and then the loss on held-out data is differentiated through *all* steps
with respect to the weight of each training example: exactly, in the memory of a dozen carries, by
``Checkpointed("log")``. Two problems: 2,000 steps on scikit-learn's digits, a tenth of them with
wrong labels, and 150 steps of a transformer on the manual that comes with Python.

To see whether the derivatives say anything, training is repeated without random subsets of the
examples, and the actual change of the loss is compared with the change that the derivatives
predict, and with TracIn's first-order estimate. A derivative describes small changes, and leaving
an example out is a large one, so the predicted changes are smaller than the actual ones; what
counts is their correlation. Finally a run is killed twice, once in the forward and once in the
backward pass, and continues from its folder to the same result, bit for bit.

    python examples/data_attribution.py
    python examples/data_attribution.py --quick
    python examples/data_attribution.py --output runs/mine --resume       # after an interruption

References: Engstrom, Ilyas, Chen, Feldmann, Moses and Madry, Optimizing ML training with
metagradient descent, 2025, https://arxiv.org/abs/2503.13751; Pruthi, Liu, Kale and Sundararajan,
Estimating training data influence by tracing gradient descent (TracIn), NeurIPS 2020,
https://arxiv.org/abs/2002.08484.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common.attribution import Run, killed_and_resumed, subsets
from common.attribution_report import PROBLEMS, report
from common.command import Jobs, parser, plain_endings, positive_float, positive_int
from common.options import share, whole
from common.reporting import console, progress_bar

from torchopt.diff import Checkpointed


NOT_SETTINGS = ("device", "threads", "output", "resume", "overwrite", "quick")
QUICK = {
    "steps": 20,
    "text_steps": 6,
    "examples": 64,
    "subsets": 6,
    "tracin_checkpoints": 3,
    "batch": 16,
    "killed_steps": 0,
}
RUNS_AT_ONCE = 25  # of the retrainings


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    description = "Differentiate a training run by its training examples."
    result = parser("data_attribution", description, QUICK)
    add = result.add_argument
    add("--examples", type=positive_int, default=256, help="examples to train on")
    add("--batch", type=positive_int, default=64, help="examples of a step; half as many texts")
    add("--steps", type=positive_int, default=2000, help="training steps on the digits")
    add("--text-steps", type=positive_int, default=150, help="training steps on the text")
    add("--lr", type=positive_float, default=0.0005, help="learning rate of AdamW on the digits")
    add("--text-lr", type=positive_float, default=0.002, help="learning rate of AdamW on the text")
    every_help = "which carries are kept: log, sqrt, revolve, or one in so many steps"
    add("--every", type=carries, default="log", help=every_help)
    add(
        "--micro-batches",
        type=positive_int,
        default=1,
        help="parts in which a step's derivative is computed",
    )
    add("--subsets", type=positive_int, default=24, help="subsets of examples that are left out")
    add("--share", type=share, default=0.05, help="share of the examples in each subset")
    add(
        "--tracin-checkpoints",
        type=positive_int,
        default=20,
        help="checkpoints that TracIn looks at",
    )
    killed_help = "training steps of a run that is killed twice and resumed; 0 leaves this out"
    add("--killed-steps", type=whole, default=60, help=killed_help)
    args = result.parse_args(argv)
    if args.device.type != "cpu":
        result.error("--device must be cpu: the networks are made for the CPU")
    return args


def carries(text: str) -> str | int:
    """Read which carries are kept."""
    if text in ("log", "sqrt", "revolve"):
        return text
    try:
        return positive_int(text)
    except argparse.ArgumentTypeError as error:
        expected = "must be log, sqrt, revolve or a number of steps"
        raise argparse.ArgumentTypeError(f"{expected}, got {text!r}") from error


def run_of(args: argparse.Namespace, problem: str) -> Run:
    """Return the training run of a problem."""
    digits = problem == "digits"
    return Run(
        problem=problem,
        examples=args.examples,
        batch=args.batch if digits else max(1, args.batch // 2),
        steps=args.steps if digits else args.text_steps,
        lr=args.lr if digits else args.text_lr,
        micro_batches=args.micro_batches,
        seed=args.seed,
    )


# The parts of a run ------------------------------------------------------------------------------


def exact(args: argparse.Namespace, run: Run, folder: Path) -> list[dict[str, Any]]:
    """Return the derivative by each weight; an interrupted run continues from its folder."""
    start = time.perf_counter()
    with progress_bar() as bar:
        tasks: dict[str, Any] = {}

        def report(direction: str, done: int, total: int) -> None:
            if direction not in tasks:
                name = f"{run.problem}: exact, {direction:8}"
                tasks[direction] = bar.add_task(name, total=total, figures="")
            bar.update(tasks[direction], completed=done)

        adjoint = Checkpointed(args.every, store=folder, progress=report)
        grads, loss = run.metagradient(adjoint)
    plan = adjoint.plan(run.steps, 0)
    row = {"derivatives": grads.tolist(), "loss": loss, "seconds": time.perf_counter() - start}
    return [{**row, "carries": plan.carries, "advances": plan.advances}]


def estimated(args: argparse.Namespace, run: Run) -> list[dict[str, Any]]:
    """Return TracIn's estimates."""
    start = time.perf_counter()
    estimates = run.tracin(args.tracin_checkpoints)
    return [{"derivatives": estimates.tolist(), "seconds": time.perf_counter() - start}]


def retrained(args: argparse.Namespace, run: Run) -> list[dict[str, Any]]:
    """Return the losses of runs without some examples; the first one leaves out none."""
    chosen = subsets(args.subsets, args.examples, args.share, args.seed)
    everyone = torch.cat([torch.zeros_like(chosen[:1]), chosen])
    start = time.perf_counter()
    losses = torch.cat([run.retrained(part) for part in everyone.split(RUNS_AT_ONCE)])
    return [{"losses": losses.tolist(), "seconds": time.perf_counter() - start}]


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Do all parts that are not finished, and report."""
    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    settings = {k: v for k, v in vars(args).items() if k not in NOT_SETTINGS}
    jobs = Jobs(args.output, settings, args.resume, args.overwrite)
    rows: dict[str, dict[str, Any]] = {}
    for problem in PROBLEMS:
        training = run_of(args, problem)
        folder = args.output / f"checkpoints-{problem}"
        if args.overwrite and not args.resume:
            _clear(folder)
        parts = {
            "exact": lambda r=training, f=folder: exact(args, r, f),
            "TracIn": lambda r=training: estimated(args, r),
            "retrained": lambda r=training: retrained(args, r),
        }
        for part, work in parts.items():
            job, working = {"problem": problem, "part": part}, contextlib.nullcontext()
            if part != "exact":  # has a bar of its own
                working = console.status(f"{problem}: {part}, {training.steps} steps")
            with working:
                rows[f"{problem} {part}"] = jobs.run(job, work)[0]
    killed = killed_run(args, jobs) if args.killed_steps else None
    about = {"settings": settings, "seconds": time.perf_counter() - start}
    return report(args, jobs, {p: run_of(args, p) for p in PROBLEMS}, rows, killed, about)


def killed_run(args: argparse.Namespace, jobs: Jobs) -> dict[str, Any]:
    """Kill a short run and resume it; return what became of it."""
    short = Run("digits", args.examples, args.batch, args.killed_steps, args.lr, 2, args.seed)
    folder = args.output / "checkpoints-killed"
    _clear(folder)
    work = lambda: [killed_and_resumed(short, folder, args.every)]  # noqa: E731
    with console.status(f"killed and resumed: {short.steps} steps"):
        return jobs.run({"part": "killed"}, work)[0]


def _clear(folder: Path) -> None:
    """Remove the checkpoints of a run that nobody will resume."""
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the example and return its results."""
    args = parse(argv)
    with plain_endings("data_attribution"):
        return run(args)


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
