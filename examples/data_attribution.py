"""Which training examples made the model what it is: metagradients of a whole training run.

A small network is trained for thousands of steps, and then the loss on held-out data is
differentiated through *all* of them by the weight of each training example: exactly, in the memory
of a dozen carries, by ``Checkpointed("log")``. Two problems: scikit-learn's digits, a tenth of them
with wrong labels, and a transformer on the manual that comes with Python.

To see whether the derivatives say anything, the runs are made again without random subsets of the
examples, and the change of the loss that the derivatives predict is compared with the one that
took place, and so is TracIn's first-order estimate. And a run is killed twice, once forwards and
once backwards, and goes on from its folder to the same result, bit for bit.

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
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common.attribution import Run, killed_and_resumed, subsets
from common.attribution_report import PROBLEMS, report
from common.command import Jobs, parser, plain_endings, positive_float, positive_int
from common.reporting import console

from torchopt.diff import Checkpointed


NOT_SETTINGS = ("device", "threads", "output", "resume", "overwrite")
QUICK = {"steps": 60, "text_steps": 20, "examples": 96, "subsets": 6, "tracin_checkpoints": 3}
RUNS_AT_ONCE = 25  # of the retrainings


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    result = parser("data_attribution", "Differentiate a training run by its training examples.")
    result.set_defaults(threads=1)  # the tensors are small: a second thread costs more than it does
    add = result.add_argument
    add("--examples", type=positive_int, default=256, help="to train on")
    add("--batch", type=positive_int, default=64, help="examples of a step; half as many texts")
    add("--steps", type=positive_int, default=2000, help="of the digits")
    add("--text-steps", type=positive_int, default=150, help="of the text")
    add("--lr", type=positive_float, default=0.0005, help="of AdamW on the digits")
    add("--text-lr", type=positive_float, default=0.002, help="of AdamW on the text")
    add("--every", default="log", help="carries to keep: log, sqrt, revolve, or a number")
    add("--micro-batches", type=positive_int, default=1, help="parts of a step's derivative")
    add("--subsets", type=positive_int, default=24, help="subsets of examples that are left out")
    add("--share", type=positive_float, default=0.05, help="of the examples, in each subset")
    add("--tracin-checkpoints", type=positive_int, default=20, help="of TracIn")
    add("--killed-steps", type=positive_int, default=60, help="of the run that is killed")
    add("--quick", action="store_true", help="much smaller, to see that it runs")
    args = result.parse_args(argv)
    if args.quick:
        vars(args).update(QUICK)
    if args.device.type != "cpu":
        raise SystemExit("data_attribution: the networks are made for the CPU.")
    args.every = int(args.every) if args.every.isdigit() else args.every
    return args


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
    """Return the derivative by each weight; an interrupted run goes on from its folder."""
    start = time.perf_counter()
    adjoint = Checkpointed(args.every, store=folder, progress=True)
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
            console.print(f"{problem}: {part}, {training.steps} steps")
            rows[f"{problem} {part}"] = jobs.run({"problem": problem, "part": part}, work)[0]
    short = Run("digits", args.examples, args.batch, args.killed_steps, args.lr, 2, args.seed)
    folder = args.output / "checkpoints-killed"
    _clear(folder)
    console.print(f"killed and resumed: {short.steps} steps")
    killed = jobs.run({"part": "killed"}, lambda: [killed_and_resumed(short, folder, args.every)])[
        0
    ]
    about = {"settings": settings, "seconds": time.perf_counter() - start}
    return report(args, jobs, {p: run_of(args, p) for p in PROBLEMS}, rows, killed, about)


def _clear(folder: Path) -> None:
    """Remove the checkpoints of a run that nobody will go on with."""
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the example and return its results."""
    args = parse(argv)
    with plain_endings("data_attribution"):
        return run(args)


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
