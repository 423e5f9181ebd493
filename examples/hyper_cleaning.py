"""Find wrong labels by the loss on a few clean examples: data hyper-cleaning, in four ways.

Every training example has a weight between 0 and 1. A classifier is trained on the weighted
examples, and the loss of the trained classifier on clean examples is differentiated by all weights:
through the steps of the training (unrolled, or checkpointed: some carries are kept, and steps are
computed again), by the condition that its gradient is zero (implicit, whatever the steps were), or
by a single step from the solution (T1-T2). Adam follows the derivative. At the end a classifier is
trained on the weighted and the clean examples, and compared with three others: without cleaning, on
clean images only, and on the right labels only, which in practice nobody knows.

    python examples/hyper_cleaning.py                          # scikit-learn's digits
    python examples/hyper_cleaning.py --rates 0.3 --seeds 3    # another share of wrong labels
    python examples/hyper_cleaning.py --data mnist --root DIR  # the four official files in DIR
    python examples/hyper_cleaning.py --resume                 # after an interruption

The paper has 5,000 images of MNIST each to train on and to clean by, half of the labels wrong, and
the same linear classifier. Here there are 700, 250 and about 800 to test on, of 8x8 pixels, split
again for every seed. Memory is measured in a process for each method, for the steps used here and
for ten times as many; so is the distance of the derivative to that of the unrolled steps.

Reference: Franceschi, Donini, Frasconi and Pontil, Forward and reverse gradient-based
hyperparameter optimization, ICML 2017, https://arxiv.org/abs/1703.01785. T1-T2: Luketina,
Berglund, Greff and Raiko, ICML 2016, https://arxiv.org/abs/1511.06727, in the form of Lorraine,
Vicol and Duvenaud, AISTATS 2020, https://arxiv.org/abs/1911.02590.
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
from common.cleaning_report import claims, draw, table
from common.cleaning_training import LEARNED, METHODS, Cleaning, clean_up, memory_and_error
from common.command import Jobs, parser, plain_endings, positive_float, positive_int
from common.digit_data import Problem, flipped, load_digits, load_mnist
from common.memory import alone
from common.options import by_choice, listed, share
from common.reporting import console, print_claims, progress_bar


CLEANING = Cleaning(
    inner_steps=50,
    lr=1.0,
    momentum=0.9,
    ridge=1e-3,
    outer_steps=20,
    outer_lr=0.3,
    final_steps=200,
)
SIZES = {"digits": (700, 250), "mnist": (5000, 5000)}
LONGER = 10  # times as many steps in the second measurement of memory
QUICK = {
    "size": 100,
    "clean": 50,
    "inner_steps": 5,
    "outer_steps": 3,
    "seeds": 1,
    "workers": 1,
    "rates": [0.5],
    "methods": ["no cleaning", "implicit"],
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    description = "Find wrong labels by the loss on clean examples."
    options = parser("hyper_cleaning", description, QUICK)
    add = options.add_argument
    add("--workers", type=positive_int, default=2, help="trainings at once, a process each")
    add("--data", choices=sorted(SIZES), default="digits", help="images to learn from")
    add("--root", type=Path, help="folder with the official MNIST files")
    add("--rates", nargs="+", type=share, default=[0.2, 0.5], help="shares of wrong labels")
    methods_help = f"to compare, of {listed(METHODS)} (default all)"
    add("--methods", nargs="+", choices=METHODS, metavar="METHOD", help=methods_help)
    add("--seeds", type=positive_int, default=5, help="runs of everything, for the intervals")
    sizes = {data: {"size": size, "clean": clean} for data, (size, clean) in SIZES.items()}
    add("--size", type=positive_int, help=f"training images {by_choice(sizes, 'size')}")
    add("--clean", type=positive_int, help=f"clean images {by_choice(sizes, 'clean')}")
    usual = CLEANING
    inner_help = "gradient steps that train a classifier, before each update of the weights"
    add("--inner-steps", type=positive_int, default=usual.inner_steps, help=inner_help)
    outer_help = "updates of the weights, by Adam"
    add("--outer-steps", type=positive_int, default=usual.outer_steps, help=outer_help)
    lr_help = "learning rate of these updates"
    add("--outer-lr", type=positive_float, default=usual.outer_lr, help=lr_help)
    args = options.parse_args(argv)
    if (args.data == "mnist") != (args.root is not None):
        options.error("--data mnist needs --root DIR, the folder with the official files")
    args.methods = args.methods or list(METHODS)
    args.rates = sorted(set(args.rates))
    size, clean = SIZES[args.data]
    args.size, args.clean = args.size or size, args.clean or clean
    return args


def cleaning_of(args: argparse.Namespace) -> Cleaning:
    """Return how weights are learned."""
    names = ("inner_steps", "outer_steps", "outer_lr")
    return replace(CLEANING, **{name: getattr(args, name) for name in names})


def problem_of(args: argparse.Namespace, rate: float, seed: int) -> Problem:
    """Return what is trained and tested on.

    Raises:
        ValueError: If the data has too few images for it.
    """
    source = load_digits() if args.data == "digits" else load_mnist(args.root)
    source = replace(source, distort=False)  # a linear classifier learns what stays in place
    generator = torch.Generator().manual_seed(seed)
    return flipped(source, rate, args.size, args.clean, generator)


def cleaned(args: argparse.Namespace, part: dict[str, Any]) -> list[dict[str, Any]]:
    """Do one cleaning, in whichever process, and return its figures."""
    torch.set_num_threads(args.threads)
    problem = problem_of(args, part["rate"], part["seed"]).to(args.device)
    return [clean_up(part["method"], problem, cleaning_of(args))]


def measured(args: argparse.Namespace, method: str, steps: int) -> dict[str, float]:
    """Measure memory; to be called in a process of its own."""
    torch.set_num_threads(args.threads)
    problem = problem_of(args, args.rates[-1], args.seed).to(args.device)
    return memory_and_error(method, problem, cleaning_of(args), steps)


class CleaningRun:
    """One run: data, a cleaning for each share of wrong labels, method and seed, report."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        for rate in args.rates:
            problem_of(args, rate, args.seed)  # refuse what cannot be made now
        names = ("data", "size", "clean", "seed")
        settings = {name: getattr(args, name) for name in names}
        settings["cleaning"] = asdict(cleaning_of(args))
        self.jobs = Jobs(args.output, settings, args.resume, args.overwrite)
        self.parts = [
            {"rate": rate, "method": method, "seed": args.seed + k}
            for k in range(args.seeds)
            for rate in args.rates
            for method in METHODS
            if method in args.methods
        ]
        self.measurements = [
            {"measured": method, "steps": steps}
            for method in LEARNED
            if method in args.methods
            for steps in (args.inner_steps, LONGER * args.inner_steps)[: 1 if args.quick else 2]
        ]

    def run(self) -> dict[str, Any]:
        """Do everything and return the results."""
        began = time.monotonic()
        memory = self._measure()
        self._clean()
        wanted = [tuple(part.values()) for part in self.parts]
        keys = ("rate", "method", "seed")
        rows = [row for row in self.jobs.rows if tuple(row.get(key) for key in keys) in wanted]
        console.print(table(rows, memory))
        results = {
            "settings": {"data": self.args.data, "seeds": self.args.seeds},
            "figures": [{k: v for k, v in row.items() if k != "losses"} for row in rows],
            "memory": memory,
            "claims": claims(rows, memory),
            "seconds": round(time.monotonic() - began, 1),
        }
        results["claims"] = print_claims(results["claims"], self.args.quick)
        draw(self.args.output / "hyper_cleaning.png", rows, memory)
        self.jobs.save_results(results)
        console.print(f"Figure, metrics and results are in {self.args.output}.")
        return results

    def _measure(self) -> list[dict[str, Any]]:
        rows = []
        with console.status("measuring memory, a process for each method"):
            for part in self.measurements:
                method, steps = part["measured"], part["steps"]
                work = partial(alone, measured, self.args, method, steps, here=self.args.quick)
                (row,) = self.jobs.run(part, lambda work=work: [work()])
                rows.append({**row, "method": method})
        return rows

    def _clean(self) -> None:
        with progress_bar() as bar:
            progress = bar.add_task("cleanings", total=len(self.parts), figures="")

            def ended(part: dict[str, Any]) -> None:
                figures = f"{part['rate']:g} wrong, {part['method']}, seed {part['seed']}"
                bar.update(progress, advance=1, figures=figures)

            self.jobs.run_all(self.parts, partial(cleaned, self.args), self.args.workers, ended)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the example and return its results."""
    args = parse(argv)
    with plain_endings("hyper_cleaning"):
        return CleaningRun(args).run()


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
