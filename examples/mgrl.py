"""Learn the discount while learning to act: meta-gradient reinforcement learning.

An actor-critic learns CartPole from returns under a discount gamma and a trace decay lambda. After
a few steps its policy is judged on the experience that follows, under a fixed reference
gamma' = 0.99 and lambda' = 1, and the gradient of this outer loss flows through the steps to gamma
and lambda. Then ``torchopt.stop_gradient`` cuts the graph behind network and optimizer, and
learning continues from there: there is only one life. For comparison, the same life is run with the
discount held fixed, on a grid.

    python examples/mgrl.py
    python examples/mgrl.py --fixed 0.5 0.8 0.95 0.99 0.999
    python examples/mgrl.py --resume                     # after an interruption

Experience is used as in the paper, so that nothing is sampled for the outer loss alone: what judges
the last steps is what the next step learns from. Three things differ from the paper: an outer step
is taken after four inner steps instead of each, the network is not told gamma and lambda, and the
environment is a small one instead of Atari.

Reference: Xu, van Hasselt and Silver, Meta-gradient reinforcement learning, NeurIPS 2018,
https://arxiv.org/abs/1805.09801.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from common.command import (
    Estimate,
    Jobs,
    counted,
    estimate,
    parser,
    plain_endings,
    positive_float,
    positive_int,
)
from common.mgrl_agent import ActorCritic, Sampler, actor_critic_loss, policy_loss
from common.mgrl_figure import draw
from common.options import share
from common.reporting import Table, console, print_claims, progress_bar
from torch import Tensor

import torchopt


ENVIRONMENT = "CartPole-v1"
OBSERVATIONS, ACTIONS, HIDDEN = 4, 2, 32
QUICK: dict[str, Any] = {
    "rounds": 5,
    "seeds": 2,
    "copies": 4,
    "steps": 32,
    "fixed": [0.5],
    "fixed_traces": [0.95],
    "start": [0.5],
}
REWARD_SCALE = 0.05  # so that values are of the size that a fresh network gives


@dataclass(frozen=True)
class Settings:
    """What determines the numbers of one life."""

    seed: int
    seeds: int
    copies: int
    steps: int
    rounds: int
    inner_steps: int
    inner_lr: float
    outer_lr: float
    outer_discount: float
    device: str


class Method(NamedTuple):
    """A way to choose discount and trace: to hold them, or to learn them from there."""

    learn: bool
    gamma: float
    trace: float

    @property
    def start(self) -> tuple[float, float]:
        """Discount and trace at first."""
        return self.gamma, self.trace

    def __str__(self) -> str:
        return f"{'learned from' if self.learn else 'fixed'} {self.gamma:g}, {self.trace:g}"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    description = "Learn the discount of an actor-critic by meta-gradients."
    result = parser("mgrl", description, QUICK)
    add = result.add_argument
    add("--seeds", type=positive_int, default=10, help="independent agents, trained side by side")
    grid, traces = [0.5, 0.95, 0.99], [0.95, 0.999]
    add(
        "--fixed", type=share, nargs="*", default=grid, help="fixed discounts gamma to compare with"
    )
    add(
        "--fixed-traces",
        type=share,
        nargs="*",
        default=traces,
        help="trace decays lambda to combine with each of them",
    )
    add(
        "--start",
        type=share,
        nargs="+",
        default=[0.5, 0.95],
        help="discounts from which learning begins, a run each",
    )
    add("--trace", type=share, default=0.95, help="trace decay from which learning begins")
    add("--outer-discount", type=share, default=0.99, help="discount gamma' of the outer loss")
    add("--rounds", type=positive_int, default=180, help="outer steps")
    add(
        "--inner-steps", type=positive_int, default=4, help="learning steps between two outer steps"
    )
    add("--inner-lr", type=positive_float, default=2e-3, help="learning rate of the agents")
    add(
        "--outer-lr",
        type=positive_float,
        default=0.2,
        help="learning rate of the logits of gamma and lambda",
    )
    add("--copies", type=positive_int, default=16, help="environments of each agent")
    add("--steps", type=positive_int, default=32, help="steps of each environment in a batch")
    return result.parse_args(argv)


# The algorithm ----------------------------------------------------------------------------------


def live(
    settings: Settings, start: tuple[float, float], learn: bool
) -> Iterator[tuple[list[float], Tensor, Tensor]]:
    """Train the agents of all seeds, and yield returns, discounts and traces after each round.

    Args:
        settings: See :class:`Settings`.
        start: Discount and trace at first.
        learn: Whether to learn discount and trace.
    """
    device = torch.device(settings.device)
    generator = torch.Generator().manual_seed(settings.seed)
    agent = ActorCritic(settings.seeds, OBSERVATIONS, ACTIONS, HIDDEN, generator).to(device)
    sampler = Sampler(
        *(ENVIRONMENT, settings.seeds, settings.copies, settings.steps, settings.seed),
        *(device, REWARD_SCALE),
    )
    initial = torch.tensor(start, device=device).unsqueeze(-1)
    logits = initial.expand(2, settings.seeds).logit().clone().requires_grad_()
    reference = torch.tensor([settings.outer_discount, 1.0], device=device)
    reference = reference.unsqueeze(-1).expand(2, settings.seeds)

    inner = torchopt.MetaAdam(agent, lr=settings.inner_lr)
    outer = torchopt.Adam([logits], lr=settings.outer_lr)
    experience = sampler.collect(agent)
    for _ in range(settings.rounds):
        for _ in range(settings.inner_steps):
            discount, trace = logits.sigmoid()
            inner.step(actor_critic_loss(agent, experience, discount, trace).sum())
            experience = sampler.collect(agent)
        if learn:
            outer.zero_grad()
            outer_loss = policy_loss(agent, experience, *reference).sum()
            outer_loss.backward(inputs=[logits])  # through all inner steps of this round
            outer.step()
        torchopt.stop_gradient(agent)  # the next round begins where this one ended,
        torchopt.stop_gradient(inner)  # but its gradients end here
        yield sampler.mean_returns(), discount.detach(), trace.detach()


def lived(
    settings: Settings, method: Method, report: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Return the metrics of a life, one row for each round, with one number for each seed."""
    rows = []
    for number, (returns, discount, trace) in enumerate(
        live(settings, method.start, method.learn), 1
    ):
        row = {"round": number, "returns": returns}
        if method.learn:
            row |= {"gamma": discount.tolist(), "lambda": trace.tolist()}
        rows.append(row)
        mean = sum(returns) / len(returns)
        report(f"return {mean:.0f}, gamma {discount.mean():.3f}")
    return rows


# Report -----------------------------------------------------------------------------------------


class Summary:
    """Returns and discounts of all methods."""

    def __init__(self, jobs: Jobs, args: argparse.Namespace) -> None:
        self.jobs, self.args = jobs, args
        self.fixed = [Method(False, g, t) for t in args.fixed_traces for g in args.fixed]
        self.learned = [Method(True, g, args.trace) for g in args.start]

    def curves(self, method: Method, key: str = "returns") -> Tensor:
        """Return ``key`` over the rounds, ``[rounds, seeds]``."""
        rows = [r for r in self.jobs.rows if r["method"] == str(method)]
        return torch.tensor([r[key] for r in rows], dtype=torch.float64)

    def over_life(self, method: Method) -> list[float]:
        """Return the mean return of each seed over its whole life."""
        return self.curves(method).nanmean(0).tolist()

    def at_end(self, method: Method, key: str = "returns") -> list[float]:
        """Return the mean of each seed over the last tenth of its life."""
        curves = self.curves(method, key)
        return curves[-max(1, len(curves) // 10) :].mean(0).tolist()

    def table(self) -> Table:
        """Return all methods as a table."""
        title = f"{ENVIRONMENT}, {counted(self.args.seeds, 'seed')}"
        table = Table(title=title, title_justify="left")
        table.add_column("gamma, lambda", no_wrap=True)
        for name in ("return over the whole life", "at the end", "gamma at the end", "lambda"):
            table.add_column(name, justify="right")
        for method in (*self.fixed, *self.learned):
            cells = [str(estimate(self.over_life(method))), str(estimate(self.at_end(method)))]
            if method.learn:
                cells += [str(estimate(self.at_end(method, k))) for k in ("gamma", "lambda")]
            table.add_row(str(method), *cells)
        return table

    def claims(self) -> list[dict[str, Any]]:
        """Return what the paper claims, what was measured, and whether it holds."""
        claims = []
        for method in self.learned:
            held = method._replace(learn=False)
            if held in self.fixed:
                gain = self._difference(method, held)
                text = f"learning gamma and lambda from {method.gamma:g}, {method.trace:g} "
                claims.append(
                    {
                        "claim": text + "beats leaving them there",
                        "measured": f"{self._compared(method, held)}; gamma ends at "
                        f"{estimate(self.at_end(method, 'gamma'))}",
                        "holds": gain.above(0),
                    }
                )
            if self.fixed:
                claims.append(self._claim_over_grid(method))
        return claims

    def _claim_over_grid(self, method: Method) -> dict[str, Any]:
        best = max(self.fixed, key=lambda m: sum(self.over_life(m)))
        gaps = [self._difference(method, m) for m in self.fixed]
        wins = sum(gap.above(0) is True for gap in gaps)
        losses = sum(gap.below(0) is True for gap in gaps)
        gap = self._difference(method, best)
        text = f"gamma and lambda learned from {method.gamma:g}, {method.trace:g} "
        return {
            "claim": text + "beat the best fixed ones of a grid",
            "measured": f"{self._compared(method, best)}; of the {len(gaps)} fixed ones it beats "
            f"{wins} and loses to {losses}, by the interval",
            "holds": gap.above(0),
        }

    def _compared(self, one: Method, other: Method) -> str:
        return (
            f"mean return {estimate(self.over_life(one))}, {other}: "
            f"{estimate(self.over_life(other))}; difference {self._difference(one, other)}"
        )

    def _difference(self, one: Method, other: Method) -> Estimate:
        pairs = zip(self.over_life(one), self.over_life(other))
        return estimate([a - b for a, b in pairs])


def live_all(settings: Settings, methods: list[Method], jobs: Jobs) -> None:
    """Live one life of all seeds by each method that has not lived yet."""
    with progress_bar() as bar:
        task = bar.add_task("lives", total=len(methods), figures="")
        report = lambda text: bar.update(task, figures=text)  # noqa: E731
        for method in methods:
            bar.update(task, description=str(method))
            jobs.run({"method": str(method)}, lambda m=method: lived(settings, m, report))
            bar.advance(task)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the example and return its results."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    started = time.monotonic()
    given = {**vars(args), "device": str(args.device)}
    settings = Settings(**{name: given[name] for name in Settings.__annotations__})
    with plain_endings("mgrl"):
        jobs = Jobs(args.output, asdict(settings), args.resume, args.overwrite)
        summary = Summary(jobs, args)
        live_all(settings, [*summary.fixed, *summary.learned], jobs)
        console.print(summary.table())
        claims = print_claims(summary.claims(), args.quick)
        results = {
            "settings": asdict(settings),
            "seconds": round(time.monotonic() - started, 1),
            "returns": {
                str(m): asdict(estimate(summary.over_life(m)))
                for m in (*summary.fixed, *summary.learned)
            },
            "claims": claims,
        }
        jobs.save_results(results)
        draw(args.output / "mgrl.png", summary)
        console.print(f"Figure, metrics and results are in {args.output}.")
        return results


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
