"""Table, claims and figure of :mod:`common.sinusoid`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.command import Estimate, counted, estimate
from common.reporting import Table, mpl, save_figure


@dataclass
class Tested:
    """Mean squared errors of one learner in one test.

    Attributes:
        learner: Its name.
        condition: What it was given and where its error was measured.
        lr: Step size of its gradient steps; ``None`` if it makes none.
        errors: For each seed, before and after each step.
    """

    learner: str
    condition: str
    lr: float | None
    errors: list[list[float]]

    def after(self, step: int) -> Estimate:
        """Return mean and interval over seeds after ``step`` steps; the oracle makes none."""
        return estimate([row[min(step, len(row) - 1)] for row in self.errors])

    def as_row(self) -> dict[str, Any]:
        """Return a row of ``results.json``."""
        return asdict(self)


@dataclass
class Fit:
    """One learner's fits of one wave, for the figure."""

    learner: str
    half: bool
    points: tuple[list[float], list[float]]
    grid: list[float]
    truth: list[float]
    after: list[list[float]]  # for each number of steps, on the grid


def table(tested: Sequence[Tested], seeds: int, waves: int) -> Table:
    """Return the table of errors before and after the first and the last step."""
    last = max(len(test.errors[0]) for test in tested) - 1
    steps = sorted({0, 1, last})
    title = f"Mean squared error on {waves} waves, 95 % interval over {counted(seeds, 'seed')}"
    result = Table(title=title, title_justify="left")
    result.add_column("learner")
    for step in steps:
        header = "no step" if step == 0 else f"{step} step{'s' * (step > 1)}"
        result.add_column(header, justify="right", no_wrap=True)
    for previous, test in zip([None, *tested], tested):
        if previous is None or previous.condition != test.condition:
            result.add_section()
            result.add_row(f"[bold]{test.condition}")
        learner = test.learner if test.lr is None else f"{test.learner}, lr {test.lr:g}"
        errors = [test.after(step) for step in (steps if test.lr is not None else [0])]
        result.add_row(f"  {learner}", *(f"{e:.3f}" for e in errors))
    return result


def claims(tested: Sequence[Tested], usual: str, half: str) -> list[dict[str, Any]]:
    """Return what the paper claims and what was measured.

    Args:
        tested: All results.
        usual: The condition with as many points as in meta-training.
        half: The condition with points in one half of the range.
    """
    found = {(test.learner, test.condition): test for test in tested}
    result = []
    for condition, claim in (
        (usual, "one gradient step of MAML fits better than fine-tuning a pre-trained network"),
        (half, "points in one half of the range let MAML infer the other half"),
    ):
        if ("MAML", condition) in found:
            maml, pretrained = (found[name, condition] for name in ("MAML", "pre-training"))
            last = len(maml.errors[0]) - 1
            step = 1 if condition == usual else last
            # the baseline may make all its steps
            gain = [p[last] - m[step] for p, m in zip(pretrained.errors, maml.errors)]
            text = (
                f"{condition}: error {maml.after(step)} after {step} step{'s' * (step > 1)}, "
                f"pre-training {pretrained.after(last)} after {last}"
            )
            result.append(_claim(claim, text, gain))
    maml = found.get(("MAML", usual))
    if maml is not None and len(maml.errors[0]) > 2:
        last = len(maml.errors[0]) - 1
        gain = [row[1] - row[last] for row in maml.errors]
        text = f"error {maml.after(1)} after 1 step, {maml.after(last)} after {last}"
        claim = "MAML keeps improving beyond one step"
        result.append(_claim(claim, f"{usual}: {text}", gain))
    return result


def _claim(claim: str, measured: str, gain: list[float]) -> dict[str, Any]:
    """Return a claim that holds if the gain, paired by seed, is surely above zero."""
    return {"claim": claim, "measured": measured, "holds": estimate(gain).above(0)}


# Figure -----------------------------------------------------------------------------------------

COLOURS = {"MAML": "tab:red", "pre-training": "tab:blue", "oracle": "tab:gray"}


def draw(path: Path, shots: int, tested: Sequence[Tested], shown: Sequence[Fit]) -> None:
    """Draw fits before and after gradient steps, and the error over steps.

    Args:
        path: The PNG file.
        shots: Points of a wave in meta-training.
        tested: All results.
        shown: The fits.
    """
    mpl.use("Agg")  # no screen is needed
    import matplotlib.pyplot as plt

    figure, axes = plt.subplot_mosaic(
        [
            ["MAML False", "MAML True", "errors"],
            ["pre-training False", "pre-training True", "errors"],
        ],
        figsize=(13, 5.6),
        width_ratios=(1, 1, 1.15),
        layout="constrained",
    )
    for fit in shown:
        _draw_fit(axes[f"{fit.learner} {fit.half}"], fit)
    axes["MAML False"].set_title(f"{shots} points of a typical wave")
    axes["MAML True"].set_title(f"{shots} points in one half of the range")
    for half in (False, True):
        axes[f"MAML {half}"].tick_params(labelbottom=False)
        axes[f"pre-training {half}"].set_xlabel("x")
    axes["MAML False"].set_ylabel("MAML", weight="bold", color=COLOURS["MAML"])
    axes["pre-training False"].set_ylabel(
        "pre-training", weight="bold", color=COLOURS["pre-training"]
    )
    handles, labels = axes["MAML False"].get_legend_handles_labels()
    handles = [copy.copy(handle) for handle in handles]
    for handle in handles[1:]:
        handle.set_color("black")  # the styles mean the same for both learners
    figure.legend(
        handles,
        labels,
        loc="outside lower left",
        ncols=5,
        frameon=False,
    )
    _draw_errors(axes["errors"], tested)
    save_figure(figure, path, dpi=110)
    plt.close(figure)


def _draw_fit(axes: Any, fit: Fit) -> None:
    colour, last = COLOURS[fit.learner], len(fit.after) - 1
    axes.plot(fit.grid, fit.truth, color="black", linewidth=3, alpha=0.25, label="truth")
    styles = {0: (":", 0.8), 1: ("--", 0.8), last: ("-", 1.0)}
    for step, (style, alpha) in styles.items():
        label = "before" if step == 0 else f"after {step} step{'s' * (step > 1)}"
        axes.plot(fit.grid, fit.after[step], style, color=colour, alpha=alpha, label=label)
    axes.plot(*fit.points, "^", color="black", markersize=5, label="points given")
    axes.set(ylim=(-5.6, 5.6), xlim=(-5, 5))
    axes.grid(alpha=0.3)


def _draw_errors(axes: Any, tested: Sequence[Tested]) -> None:
    from matplotlib.ticker import LogFormatter

    conditions = list(dict.fromkeys(t.condition for t in tested if "at x" not in t.condition))
    usual = [test for test in tested if test.condition in conditions]
    for test in usual:
        colour = COLOURS[test.learner]
        first = test.condition == conditions[0]
        label = test.learner if first else None
        if test.lr is None:
            if first:  # it does not see the points
                axes.axhline(test.after(0).mean, color=colour, label=label)
            continue
        steps = range(len(test.errors[0]))
        estimates = [test.after(step) for step in steps]
        means = [e.mean for e in estimates]
        axes.plot(steps, means, color=colour, label=label, marker=".")
        low, high = ([e.mean + sign * e.half_width for e in estimates] for sign in (-1, 1))
        axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.annotate(
            test.condition,
            (steps[-1], means[-1]),
            (6, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize="small",
        )
    axes.set(xlabel="gradient steps on the points", yscale="log")
    # short labels: such as 6 x 10^0 would reach into the panel on the left
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
    axes.set_title("mean squared error on new waves")
    last = max(len(test.errors[0]) for test in usual) - 1
    axes.set_xticks(range(0, last + 1, max(1, last // 5)))
    axes.set_xlim(right=1.21 * last)  # room for the labels
    axes.grid(alpha=0.3, which="both")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 0.08))
