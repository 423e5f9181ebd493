"""Learn to cooperate in the iterated prisoner's dilemma by shaping the opponent: LOLA.

Two players learn at once. A naive learner follows the gradient of its own return, and both end in
mutual defection, -2 a step. A LOLA player differentiates its return *through* the next learning
steps that it expects of its opponent (the look-aheads), so it learns to answer in kind: the pair
ends near mutual cooperation, -1 a step, with policies like tit-for-tat.

Returns are exact (a linear system) or estimated from sampled games by DiCE, whose estimates may be
differentiated any number of times. Many independent pairs learn side by side in one tensor.

    python examples/lola.py                          # exact and DiCE, 0 to 3 look-aheads
    python examples/lola.py --gradients exact        # seconds
    python examples/lola.py --rounds 150 --games 1024     # games as in TorchOpt 0.7: far longer
    python examples/lola.py --steps "DiCE paper" --rounds 150 --first-iterations 0    # that paper's
    python examples/lola.py --steps "LOLA paper" --gradients exact --look-aheads 0 1  # that paper's
    python examples/lola.py --resume                 # after an interruption

**Why one look-ahead may not last.** To retaliate costs the player who does it, so its own gradient
makes it more forgiving; only the shaping term, proportional to the opponent's expected step, works
against that. Where it is too weak, the probability to cooperate after having been exploited creeps
over 1 - 1 / (2 * discount) = 0.48, from where on defecting against that player pays, and the other
one does. This needs neither noise nor Adam: with the steps 0.3 (inner) and 0.2 (outer) of the DiCE
paper, which the example of TorchOpt 0.7 has, it happens with exact gradients too, as soon as two
players are not exactly alike. The first steps of LOLA from indifference point at tit-for-tat;
taken with an outer step size of 2 they go all the way, to where every probability, also that of
retaliation, is so certain that nothing moves it any more. With half of it, as in the LOLA paper,
some probabilities stay undecided, and cooperation breaks down now and then.

Such steps need good gradients while the policies are undecided, so the first iterations sample
1,024 games for each estimate, as that of TorchOpt 0.7 does in all of them, the others 64, as in the
DiCE paper.

References: Foerster, Chen, Al-Shedivat, Whiteson, Abbeel and Mordatch, Learning with
opponent-learning awareness, AAMAS 2018, https://arxiv.org/abs/1709.04326. Foerster, Farquhar,
Al-Shedivat, Rocktaeschel, Xing and Whiteson, DiCE: the infinitely differentiable Monte Carlo
estimator, ICML 2018, https://arxiv.org/abs/1802.05098. The baseline for derivatives of every order
is that of Mao, Foerster, Rocktaeschel, Al-Shedivat, Farquhar and Whiteson, ICML 2019.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import torch
from common.command import (
    Jobs,
    non_negative_float,
    parser,
    plain_endings,
    positive_float,
    positive_int,
)
from common.lola_learning import OUTER_OPTIMIZERS, Dice, Estimator, Exact, Steps, learn
from common.lola_report import claims, draw, last_tenth, summary, title
from common.options import by_choice, listed, share, whole
from common.reporting import console, print_claims, progress_bar


#: Step sizes, and how far from each other the players start.
STEPS = {
    "large": Steps(lr_in=1.0, lr_out=2.0, outer="sgd", initial_std=0.1),
    "LOLA paper": Steps(lr_in=1.0, lr_out=1.0, outer="sgd", initial_std=1.0, expand=True),
    "DiCE paper": Steps(lr_in=0.3, lr_out=0.2, outer="sgd", initial_std=0.1),
    "TorchOpt 0.7": Steps(lr_in=0.3, lr_out=0.2, outer="adam", initial_std=0.1),
}
GRADIENTS = ("exact", "DiCE")
RECORD_EVERY = 10
QUICK: dict[str, Any] = {
    "iterations": 20,
    "look_aheads": [0, 1],
    "exact_pairs": 3,
    "dice_pairs": 2,
    "games": 8,
    "first_games": 16,
    "first_iterations": 5,
    "rounds": 10,
}


def discount_factor(text: str) -> float:
    """Read a discount factor, 0.5 < x < 1: below, no retaliation makes up for being exploited."""
    value = share(text)
    if value <= 0.5:
        raise argparse.ArgumentTypeError(f"must be between 0.5 and 1, got {value}")
    return value


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    description = "Learn to cooperate by differentiating through the opponent's steps."
    options = parser("lola", description, QUICK)
    add = options.add_argument
    gradients_help = "of the returns: exact, or estimated from games by DiCE"
    add("--gradients", nargs="+", choices=GRADIENTS, default=list(GRADIENTS), help=gradients_help)
    look_aheads_help = "numbers of steps expected of the opponent, to compare; 0: naive learners"
    add("--look-aheads", nargs="+", type=whole, default=[0, 1, 2, 3], help=look_aheads_help)
    add("--iterations", type=positive_int, default=1000, help="learning steps of both players")
    add("--exact-pairs", type=positive_int, default=50, help="pairs with exact gradients")
    add("--dice-pairs", type=positive_int, default=10, help="pairs with sampled games")
    add("--games", type=positive_int, default=64, help="games of a pair for each estimate")
    add(
        "--first-games",
        type=positive_int,
        default=1024,
        help="games of a pair in the first iterations",
    )
    add("--first-iterations", type=whole, default=40, help="how many iterations are the first ones")
    add("--rounds", type=positive_int, default=75, help="rounds of a game")
    discount_help = "discount factor, between 0.5 and 1"
    add("--discount", type=discount_factor, default=0.96, help=discount_help)
    steps_help = f"learning rates, optimizer and start that go together, of {listed([*STEPS])}"
    add("--steps", choices=STEPS, metavar="NAME", default="large", help=steps_help)
    named = {name: asdict(steps) for name, steps in STEPS.items()}
    lr_in, lr_out, outer, initial_std = (
        by_choice(named, name).replace("(default", "(default that of --steps:")
        for name in ("lr_in", "lr_out", "outer", "initial_std")
    )
    add(
        "--lr-in",
        type=positive_float,
        help=f"learning rate of the opponent's expected steps {lr_in}",
    )
    add("--lr-out", type=positive_float, help=f"learning rate of the players {lr_out}")
    optimizers = sorted(OUTER_OPTIMIZERS)
    add("--outer", choices=optimizers, help=f"optimizer of the players {outer}")
    std_help = f"deviation of the first logits {initial_std}"
    add("--initial-std", type=non_negative_float, help=std_help)
    value_help = "learning rate of the baselines that reduce the variance; 0 for no baselines"
    add("--lr-value", type=non_negative_float, default=0.1, help=value_help)
    add("--no-comparison", action="store_true", help="leave out the runs with the other --steps")
    return options.parse_args(argv)


class LolaRun:
    """One run: a job for each kind of gradients, step sizes and number of look-aheads; report."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        names = ("lr_in", "lr_out", "outer", "initial_std")
        given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
        self.name = "own" if given else args.steps
        self.steps = {**STEPS, self.name: replace(STEPS[args.steps], **given)}
        self.parts = self._parts()  # refuses before the folder is touched
        torch.set_num_threads(args.threads)
        kept = ("seed", "iterations", "exact_pairs", "dice_pairs", "games", "first_games")
        kept = (*kept, "first_iterations", "rounds", "discount", "lr_value")
        settings = {name: getattr(args, name) for name in kept}
        settings["own_steps"] = asdict(self.steps[self.name])
        self.jobs = Jobs(args.output, settings, args.resume, args.overwrite)

    def _parts(self) -> list[dict[str, Any]]:
        """Return what names each job: the comparison of step sizes has one exact look-ahead.

        Raises:
            ValueError: If the expansion of the LOLA paper is asked for what it is not made for.
        """
        numbers = sorted(set(self.args.look_aheads))
        if self.steps[self.name].expand and (max(numbers) > 1 or "DiCE" in self.args.gradients):
            raise ValueError(
                f"--steps {self.args.steps!r} expands one step of the opponent, exactly; got "
                f"--look-aheads {numbers} --gradients {self.args.gradients}. Pass --look-aheads "
                "0 1 --gradients exact."
            )
        chosen = [g for g in GRADIENTS if g in self.args.gradients]
        parts = [
            {"gradients": gradients, "steps": self.name, "look_aheads": number}
            for gradients in chosen
            for number in numbers
        ]
        others = [] if self.args.no_comparison else [name for name in STEPS if name != self.name]
        return parts + [{"gradients": "exact", "steps": n, "look_aheads": 1} for n in others]

    def _work(self, part: dict[str, Any], report: Any) -> Iterator[dict[str, Any]]:
        """Let the pairs of one job learn; its random numbers are its own."""
        args, exact = self.args, part["gradients"] == "exact"
        seed = 1000 * args.seed + 10 * part["look_aheads"] + GRADIENTS.index(part["gradients"])
        generator = torch.Generator(args.device).manual_seed(seed)
        estimator: Estimator = Exact(args.discount)
        if not exact:
            games = (args.games, args.first_games, args.first_iterations)
            estimator = Dice(args.discount, *games, args.rounds, args.lr_value, generator)
        pairs = args.exact_pairs if exact else args.dice_pairs
        rows = learn(
            estimator,
            self.steps[part["steps"]],
            part["look_aheads"],
            pairs,
            args.iterations,
            RECORD_EVERY,
            args.discount,
            generator,
        )
        for row in rows:
            report(row["iteration"])
            yield row

    def run(self) -> dict[str, Any]:
        """Do everything and return the results."""
        began = time.monotonic()
        rows = self._learn()
        done = list(zip(self.parts, rows))
        table, numbers = summary(done)
        console.print(table)
        results = {
            "settings": {"iterations": self.args.iterations, "games": self.args.games},
            "parts": numbers,
            "claims": claims(numbers, self.args.iterations, self.name),
            "seconds": round(time.monotonic() - began, 1),
        }
        results["claims"] = print_claims(results["claims"], self.args.quick)
        draw(self.args.output / "lola.png", done, self.args.discount, self.name)
        self.jobs.save_results(results)
        console.print(f"Figure, metrics and results are in {self.args.output}.")
        return results

    def _learn(self) -> list[list[dict[str, Any]]]:
        results = []
        with progress_bar() as bar:
            total = len(self.parts) * self.args.iterations
            progress = bar.add_task("learning", total=total, figures="")
            for index, part in enumerate(self.parts):
                before = index * self.args.iterations
                name = f"{title(part)}, {part['steps']} steps"
                bar.update(progress, figures=name)

                def report(iteration: int, before: int = before) -> None:
                    bar.update(progress, completed=before + iteration)

                rows = self.jobs.run(part, lambda p=part, r=report: self._work(p, r))
                bar.update(progress, completed=before + self.args.iterations)
                console.print(f"{name}: {last_tenth(rows).mean():.3f} a step")
                results.append(rows)
        return results


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the example and return its results."""
    args = parse(argv)
    with plain_endings("lola"):
        return LolaRun(args).run()


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
