"""Learn reinforcement-learning tasks from a few trajectories: MAML with policy gradients.

A policy is meta-trained so that one policy-gradient step on twenty trajectories of a new task makes
it good at that task. Two families of tasks, both Gymnasium environments:

* ``tabular``: random Markov decision processes with 10 states and 5 actions (Duan et al. 2016). The
  highest possible return of each is known by dynamic programming, and so are exact meta-gradients.
* ``navigation``: a point in the plane must find a goal that it cannot see (Finn et al. 2017).

Beside MAML stand the same network without meta-training, and after ordinary training for the mean
return of all tasks; both may choose the best inner learning rate for each number of steps.

    python examples/maml_rl.py
    python examples/maml_rl.py --families navigation --hidden 100 --horizon 100 --iterations 500
    python examples/maml_rl.py --families tabular --inner-lr 0.1 --outer-lr 1e-3 --meta-batch 40 \
        --iterations 500                                   # the setting of the first TorchOpt
    python examples/maml_rl.py --resume                     # after an interruption

The inner step is differentiated through its sampling, by the DiCE estimator with advantages. The
estimate that the first papers used (``--estimator surrogate``) leaves out how the weights decide
what is sampled, so its second derivatives are biased (Rothfuss et al. 2019); the last panel of the
figure measures this. What is maximised is the return after a step on the *expected* gradient, as in
MAML; the initial policy gets no credit for sampling informative trajectories, as in E-MAML.

References: Finn, Abbeel and Levine, Model-agnostic meta-learning, ICML 2017,
https://arxiv.org/abs/1703.03400. Duan et al., RL^2, 2016, https://arxiv.org/abs/1611.02779.
Foerster et al., DiCE, ICML 2018, https://arxiv.org/abs/1802.05098. Farquhar, Whiteson and Foerster,
Loaded DiCE, NeurIPS 2019, https://arxiv.org/abs/1909.10549. Rothfuss et al., ProMP, ICLR 2019,
https://arxiv.org/abs/1810.06784.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

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
from common.maml_rl_experiment import (
    Family,
    Settings,
    best_rates,
    measured,
    meta_gradient_errors,
    meta_train,
    paths,
)
from common.options import by_choice
from common.reporting import Table, console, print_claims, progress_bar, save_figure


# What an option is where it is not given.
DEFAULTS: dict[str, dict[str, Any]] = {
    "tabular": {"hidden": 64, "horizon": 10, "iterations": 150, "inner_lr": 1.0, "outer_lr": 3e-3},
    "navigation": {
        "hidden": 32,
        "horizon": 20,
        "iterations": 200,
        "inner_lr": 0.1,
        "outer_lr": 4e-3,
    },
}
UNTRAINED, JOINT, MAML = "no meta-training", "trained for the mean return", "MAML"
METHODS = (UNTRAINED, JOINT, MAML)
COLOURS = {UNTRAINED: "tab:gray", JOINT: "tab:orange", MAML: "tab:blue"}
COUNTS = (20, 80, 320, 1280, 5120)
COUNT_HELP = (
    f"trajectories of the best estimate of a meta-gradient, of {', '.join(map(str, COUNTS))}"
)
#: Of an option that depends on the family.
MEANINGS = {
    "hidden": "units of a layer of the policy",
    "horizon": "steps of a trajectory",
    "iterations": "outer steps of a training",
    "inner_lr": "learning rate of an inner step",
    "outer_lr": "learning rate of the outer steps, by Adam",
}
QUICK: dict[str, Any] = {
    "iterations": 5,
    "seeds": 1,
    "trajectories": 5,
    "meta_batch": 4,
    "test_tasks": 5,
    "test_steps": 1,
    "horizon": 8,
    "largest_count": 80,
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    description = "Meta-train policies to learn new tasks from a few trajectories."
    result = parser("maml_rl", description, QUICK)
    add = result.add_argument
    families = ["tabular", "navigation"]
    add(
        "--families",
        nargs="+",
        choices=sorted(DEFAULTS),
        default=families,
        help="families of tasks",
    )
    add("--seeds", type=positive_int, default=5, help="independent runs of everything")
    add(
        "--trajectories",
        type=positive_int,
        default=20,
        help="trajectories of a task in an inner step",
    )
    add("--meta-batch", type=positive_int, default=20, help="tasks in an outer step")
    add("--test-tasks", type=positive_int, default=100, help="unseen tasks of the test")
    add("--test-steps", type=positive_int, default=3, help="inner steps of the test")
    estimator_help = "estimator of an inner step; the derivatives of surrogate are biased"
    add("--estimator", choices=["dice", "surrogate"], default="dice", help=estimator_help)
    add("--discount", type=positive_float, default=0.99, help="discount factor gamma, at most 1")
    add("--trace", type=positive_float, default=0.95, help="lambda of the advantages, at most 1")
    add("--largest-count", type=positive_int, default=COUNTS[-1], help=COUNT_HELP)
    for name, meaning in MEANINGS.items():
        kind = positive_float if name.endswith("_lr") else positive_int
        text = f"{meaning} {by_choice(DEFAULTS, name)}"
        add(f"--{name.replace('_', '-')}", type=kind, default=argparse.SUPPRESS, help=text)
    args = result.parse_args(argv)
    for name in ("discount", "trace"):
        if getattr(args, name) > 1:
            result.error(f"--{name} must be at most 1, got {getattr(args, name)}")
    if args.largest_count < COUNTS[0]:
        result.error(f"--largest-count must be at least {COUNTS[0]}, got {args.largest_count}")
    return args


def counts_of(args: argparse.Namespace) -> tuple[int, ...]:
    """Return the numbers of trajectories from which meta-gradients are estimated."""
    return tuple(count for count in COUNTS if count <= args.largest_count)


def settings_of(args: argparse.Namespace, family: str) -> Settings:
    """Return the settings of one family."""
    given = {**DEFAULTS[family], **vars(args), "family": family, "device": str(args.device)}
    return Settings(**{name: given[name] for name in Settings.__annotations__})


# Work -------------------------------------------------------------------------------------------


def tested(
    settings: Settings, method: str, seed: int, report: Callable[[int, float], None]
) -> list[dict[str, Any]]:
    """Train one method on one seed and return its metrics; the last row is the test."""
    family = Family(settings, seed)
    params, log = family.initial(), []
    if method != UNTRAINED:
        params, log = meta_train(family, method == MAML, report)
    own = [settings.inner_lr] * settings.test_steps
    row = measured(family, params, own if method == MAML else best_rates(family, params))
    if method == MAML and not family.tabular:
        row["paths"] = paths(family, params, settings.inner_lr)
    return [*log, row]


def work(args: argparse.Namespace, jobs: Jobs) -> None:
    """Do all jobs that are not finished."""
    seeds = range(args.seed, args.seed + args.seeds)
    listed = [(f, m, s) for f in args.families for m in METHODS for s in seeds]
    if "tabular" in args.families:
        listed += [("tabular", "meta-gradient", s) for s in seeds]
    with progress_bar() as bar:
        task = bar.add_task("jobs", total=len(listed), figures="")
        for family, method, seed in listed:
            settings = settings_of(args, family)

            def report(iteration: int, value: float, s: Settings = settings) -> None:
                figures = f"{iteration}/{s.iterations}, return {value:.2f}"
                bar.update(task, figures=figures)

            def job(family: Settings = settings, m: str = method, k: int = seed) -> Any:
                if m == "meta-gradient":
                    return meta_gradient_errors(Family(family, k), counts_of(args))
                return tested(family, m, k, report)

            bar.update(task, description=f"{family}, {method}, seed {seed}")
            jobs.run({"family": family, "method": method, "seed": seed}, job)
            bar.advance(task)


# Report -----------------------------------------------------------------------------------------


class Summary:
    """The tests of all methods, family by family, over seeds."""

    def __init__(self, jobs: Jobs, args: argparse.Namespace) -> None:
        self.jobs, self.args = jobs, args
        self.steps = range(args.test_steps + 1)
        self.counts = counts_of(args)

    def rows(self, family: str, method: str, key: str = "returns") -> list[dict[str, Any]]:
        """Return the rows that have ``key``, in the order of the seeds."""
        wanted = [r for r in self.jobs.rows if (r["family"], r["method"]) == (family, method)]
        return sorted((r for r in wanted if key in r), key=lambda r: r["seed"])

    def returns(self, family: str, method: str, step: int) -> list[float]:
        """Return the returns of the seeds after ``step`` inner steps."""
        return [row["returns"][step] for row in self.rows(family, method)]

    def best(self, family: str) -> Estimate:
        """Return the highest possible return."""
        return estimate([row["best"] for row in self.rows(family, MAML)])

    def claims(self) -> list[dict[str, Any]]:
        """Return what the papers claim, what was measured, and whether it holds."""
        pairs = [(f, m) for f in self.args.families for m in (UNTRAINED, JOINT)]
        claims = [self._claim_against(*pair) for pair in pairs]
        if "tabular" in self.args.families:
            claims.append(self._estimator_claim())
        return claims

    def _claim_against(self, family: str, rival: str) -> dict[str, Any]:
        after, others = self.returns(family, MAML, 1), self.returns(family, rival, 1)
        gain = estimate([a - b for a, b in zip(after, others)])
        rates = sorted({row["rates"][0] for row in self.rows(family, rival)})
        chosen = ", ".join(f"{rate:g}" for rate in rates)
        return {
            "claim": f"{family}: one inner step from MAML's weights learns a new task better than "
            f"from a network {'with ' if rival == UNTRAINED else ''}{rival}",
            "measured": f"MAML {estimate(self.returns(family, MAML, 0))} before and "
            f"{estimate(after)} after, the other {estimate(others)} after (with the best inner lr, "
            f"{chosen}); difference {gain}; highest possible {self.best(family)}",
            "holds": gain.above(0),
        }

    def _estimator_claim(self) -> dict[str, Any]:
        dice, surrogate = self.errors("dice"), self.errors("surrogate")
        least, most = self.counts[0], self.counts[-1]
        return {
            "claim": "the surrogate's second derivatives are biased, those of DiCE are not",
            "measured": f"relative error of the meta-gradient with {most} trajectories: DiCE "
            f"{dice[-1]}, surrogate {surrogate[-1]}; with {least}, where variance counts more: "
            f"DiCE {dice[0]}, surrogate {surrogate[0]}",
            "holds": dice[-1].below(surrogate[-1].mean - surrogate[-1].half_width),
        }

    def errors(self, estimator: str) -> list[Estimate]:
        """Return the relative errors of the meta-gradient by number of trajectories."""
        rows = self.rows("tabular", "meta-gradient", "count")
        return [estimate([r[estimator] for r in rows if r["count"] == n]) for n in self.counts]

    def table(self) -> Table:
        """Return the returns as a table."""
        table = Table(
            title=f"Return on unseen tasks, {counted(self.args.seeds, 'seed')}",
            title_justify="left",
        )
        table.add_column("family")
        table.add_column("method", no_wrap=True)
        for step in self.steps:
            table.add_column(counted(step, "step"), justify="right")
        for family in self.args.families:
            for method in METHODS:
                cells = [str(estimate(self.returns(family, method, k))) for k in self.steps]
                table.add_row(family, method, *cells)
            table.add_row(family, "highest possible", str(self.best(family)))
        return table


def draw(path: Path, summary: Summary) -> None:
    """Draw returns by inner steps, ways to goals and errors of meta-gradients."""
    import matplotlib as mpl

    mpl.use("Agg")  # no screen is needed
    import matplotlib.pyplot as plt

    families = summary.args.families
    panels = [lambda axes, f=f: _draw_adaptation(axes, summary, f) for f in families]
    if "navigation" in families:
        panels.append(lambda axes: _draw_paths(axes, summary))
    if "tabular" in families:
        panels.append(lambda axes: _draw_errors(axes, summary))
    columns = 2 if len(panels) > 1 else 1
    rows = -(-len(panels) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(5.2 * columns, 4 * rows), layout="constrained", squeeze=False
    )
    for axes, panel in zip(grid.flat, panels):
        panel(axes)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    save_figure(figure, path, dpi=100)
    plt.close(figure)


def _draw_adaptation(axes: Any, summary: Summary, family: str) -> None:
    steps = list(summary.steps)
    for method in METHODS:
        points = [estimate(summary.returns(family, method, k)) for k in steps]
        mean, half = [p.mean for p in points], [p.half_width for p in points]
        axes.errorbar(steps, mean, half, marker="o", capsize=4, color=COLOURS[method], label=method)
    best = summary.best(family).mean
    axes.axhline(best, color="black", linestyle="--", label="highest possible, task known")
    axes.set(title=f"{family}: unseen tasks", xlabel="inner gradient steps", xticks=steps)
    axes.set_ylabel("return (95 % interval over seeds)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="best")


def _draw_paths(axes: Any, summary: Summary) -> None:
    import matplotlib.pyplot as plt

    shown = summary.rows("navigation", MAML, "paths")[0]["paths"]
    for k, (goal, before, after) in enumerate(zip(shown["goals"], shown["before"], shown["after"])):
        colour = plt.get_cmap("tab10")(k)
        axes.plot(*zip(*before), color="tab:gray", linestyle=":", linewidth=2)
        axes.plot(*zip(*after), color=colour, marker=".", markersize=4)
        axes.plot(*goal, color=colour, marker="*", markersize=14, markeredgecolor="black")
    axes.plot([], [], color="tab:gray", linestyle=":", label="before")
    axes.plot([], [], color="black", marker=".", markersize=4, label="after one step")
    axes.plot([], [], "*", color="white", markersize=12, markeredgecolor="black", label="goal")
    axes.set(title="navigation: mean actions of MAML's policy", xlabel="x", ylabel="y")
    axes.set(xlim=(-0.7, 0.7), ylim=(-0.7, 0.7), aspect="equal")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="best")


def _draw_errors(axes: Any, summary: Summary) -> None:
    for estimator, colour in (("surrogate", "tab:red"), ("dice", "tab:blue")):
        points = summary.errors(estimator)
        mean, half = [p.mean for p in points], [p.half_width for p in points]
        label = {"dice": "DiCE", "surrogate": "surrogate (biased)"}[estimator]
        axes.errorbar(summary.counts, mean, half, marker="o", capsize=4, color=colour, label=label)
    axes.set(xscale="log", yscale="log", title="tabular: estimated and exact meta-gradient")
    axes.set(xlabel="trajectories of the inner step", ylabel="relative error")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the example and return its results."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    started = time.monotonic()
    settings = {f: asdict(settings_of(args, f)) for f in args.families}
    head = {"seed": args.seed, "seeds": args.seeds, "families": settings}
    head["largest_count"] = args.largest_count
    with plain_endings("maml_rl"):
        jobs = Jobs(args.output, head, args.resume, args.overwrite)
        work(args, jobs)
        summary = Summary(jobs, args)
        console.print(summary.table())
        claims = print_claims(summary.claims(), args.quick)
        results = {
            "settings": head,
            "seconds": round(time.monotonic() - started, 1),
            "returns": {
                f: {
                    m: [asdict(estimate(summary.returns(f, m, k))) for k in summary.steps]
                    for m in METHODS
                }
                for f in args.families
            },
            "claims": claims,
        }
        jobs.save_results(results)
        draw(args.output / "maml_rl.png", summary)
        console.print(f"Figure, metrics and results are in {args.output}.")
        return results


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
