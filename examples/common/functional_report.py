"""Tables, claims and figure of ``examples/functional.py``."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.command import Estimate, Jobs, counted, estimate
from common.reporting import Table, console, mpl, print_claims, save_figure


STYLES = ("functional", "object-oriented", "differentiable", "torch.optim.Adam")
SAME = 1e-12  # relative; rounding errors of double precision over some hundred steps


def largest_difference(losses: dict[str, list[float]], style: str) -> float:
    """Return the largest relative difference of a style's losses to the functional ones."""
    pairs = zip(losses[style], losses["functional"])
    return max(abs(own - other) / abs(other) for own, other in pairs)


def members_at(ensembles: Sequence[dict[str, Any]], key: str, k: int, rates: int) -> Estimate:
    """Return the mean of the members with the ``k``-th learning rate, over ensembles."""
    return estimate([statistics.fmean(row[key][k::rates]) for row in ensembles])


@dataclass
class SpeedUp:
    """How many times faster some networks train by ``vmap`` than in a loop, over rounds."""

    loop: str
    members: int
    median: float
    least: float
    most: float

    def __str__(self) -> str:
        return f"{self.median:.1f} ({self.least:.1f} to {self.most:.1f})"


def speed_ups(timed: Sequence[dict[str, Any]]) -> list[SpeedUp]:
    """Return the ratios of times, each of one round."""
    result = []
    for loop in timed[0]["seconds"]:
        for members in dict.fromkeys(row["members"] for row in timed):
            seconds = [row["seconds"] for row in timed if row["members"] == members]
            ratios = [s[loop] / s["vmap"] for s in seconds]
            median = statistics.median(ratios)
            if loop != "vmap":
                result.append(SpeedUp(loop, members, median, min(ratios), max(ratios)))
    return result


def report(
    args: argparse.Namespace,
    jobs: Jobs,
    compared: dict[str, Any],
    ensembles: Sequence[dict[str, Any]],
    timed: Sequence[dict[str, Any]],
    about: dict[str, Any],
) -> dict[str, Any]:
    """Print tables and claims, draw the figure, and return what is in ``results.json``.

    Args:
        args: The command line.
        jobs: Where results go.
        compared: Losses of the styles and slopes by the learning rate.
        ensembles: One row for each.
        timed: One row of seconds for each round.
        about: Settings and seconds of the run.
    """
    console.print(_table_of_styles(compared))
    console.print(_table_of_ensembles(args, ensembles))
    speed = speed_ups(timed)
    console.print(_table_of_speed(speed))
    claims = print_claims(_claims(args, compared, ensembles, speed), args.quick)
    results = {
        **about,
        "claims": claims,
        "differences": {s: largest_difference(compared["losses"], s) for s in STYLES},
        "slope": compared["slope"],
        "slope_by_differences": compared["slope_by_differences"],
        "vote_accuracies": [row["vote_accuracies"] for row in ensembles],
        "member_accuracies": [row["accuracies"] for row in ensembles],
        "speed": [asdict(ratio) for ratio in speed],
    }
    draw(args.output / "figure.png", args, compared["losses"], ensembles, speed)
    jobs.save_results(results)
    console.print(f"Figure, metrics and results are in {args.output}.")
    return results


def _table_of_styles(compared: dict[str, Any]) -> Table:
    losses = compared["losses"]
    count = len(losses["functional"])
    result = Table(title=f"One run of {count} steps in double precision", title_justify="left")
    for name in ("style", "last loss", "difference", "d loss / d lr"):
        result.add_column(name, justify="left" if name == "style" else "right")
    slopes = {
        "functional": f"{compared['slope_by_differences']:.7g} (differences)",
        "differentiable": f"{compared['slope']:.7g}",
    }
    for style in STYLES:
        difference = largest_difference(losses, style)
        shown = "the same bits" if difference == 0 else f"{difference:.1g}"
        shown = "" if style == "functional" else shown
        result.add_row(style, f"{losses[style][-1]:.12f}", shown, slopes.get(style, ""))
    return result


def _table_of_ensembles(args: argparse.Namespace, ensembles: Sequence[dict[str, Any]]) -> Table:
    seeds, count = len(ensembles), len(args.rates)
    title = f"{args.members} networks trained at once, 95 % interval over {counted(seeds, 'seed')}"
    result = Table(title=title, title_justify="left")
    columns = ("accuracy (%)", "of the mean vote", "-log p", "of the mean vote")
    result.add_column("members")
    for name in columns:
        result.add_column(name, justify="right")
    for k, name in enumerate([*(f"lr {rate:g}" for rate in args.rates), "all"]):
        own = slice(k, None, count) if name != "all" else slice(None)
        cells = []
        for key in ("accuracies", "log_losses"):
            cells.append(estimate([statistics.fmean(row[key][own]) for row in ensembles]))
            cells.append(estimate([row[f"vote_{key}"][k] for row in ensembles]))
        result.add_row(name, *map(str, cells))
    return result


def _table_of_speed(speed: Sequence[SpeedUp]) -> Table:
    counts = list(dict.fromkeys(ratio.members for ratio in speed))
    title = "Times as fast by vmap as in a loop, median (least to most) of all rounds"
    result = Table(title=title, title_justify="left")
    for name in ("loop over", *(f"{count} networks" for count in counts)):
        result.add_column(name, justify="left" if name == "loop over" else "right")
    for loop in dict.fromkeys(ratio.loop for ratio in speed):
        result.add_row(loop, *(str(ratio) for ratio in speed if ratio.loop == loop))
    return result


def _claims(
    args: argparse.Namespace,
    compared: dict[str, Any],
    ensembles: Sequence[dict[str, Any]],
    speed: Sequence[SpeedUp],
) -> list[dict[str, Any]]:
    losses = compared["losses"]
    difference = max(largest_difference(losses, style) for style in STYLES[:3])
    to_torch = largest_difference(losses, "torch.optim.Adam")
    slope, by_differences = compared["slope"], compared["slope_by_differences"]
    error = abs(slope - by_differences) / abs(by_differences)
    vote = estimate([row["vote_accuracies"][-1] for row in ensembles])
    count = len(args.rates)
    means = [members_at(ensembles, "accuracies", k, count) for k in range(count)]
    best = max(range(count), key=lambda k: means[k].mean)
    gain = estimate(
        [
            row["vote_accuracies"][-1] - statistics.fmean(row["accuracies"][best::count])
            for row in ensembles
        ]
    )
    over_torch = [ratio for ratio in speed if ratio.loop == "torch.optim.Adam"]
    return [
        {
            "claim": "the three styles give the same losses in double precision",
            "measured": f"largest relative difference {difference:.1g} in "
            f"{len(losses['functional'])} steps; {to_torch:.1g} to torch.optim.Adam",
            "holds": max(difference, to_torch) < SAME,
        },
        {
            "claim": "the differentiable style gives the derivative of the last loss with "
            "respect to the lr",
            "measured": f"{slope:.6g}, relative difference {error:.1g} to central differences",
            "holds": error < 1e-5,
        },
        {
            "claim": "the mean vote is more accurate than its members",
            "measured": f"{vote} %, members with the best learning rate ({args.rates[best]:g}) "
            f"{means[best]} %, difference {gain}",
            "holds": gain.above(0),
        },
        {
            "claim": "many networks train faster by vmap than in a loop over torch.optim.Adam",
            "measured": ", ".join(f"{r.members} networks {r} times" for r in over_torch),
            "holds": max(over_torch, key=lambda r: r.members).least > 1,
        },
    ]


# Figure -----------------------------------------------------------------------------------------


def draw(
    path: Path,
    args: argparse.Namespace,
    losses: dict[str, list[float]],
    ensembles: Sequence[dict[str, Any]],
    speed: Sequence[SpeedUp],
) -> None:
    """Draw the styles' losses, the members' losses and accuracies, and the speed."""
    mpl.use("Agg")  # no screen is needed
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    _draw_styles(axes[0, 0], losses)
    _draw_speed(axes[0, 1], speed)
    colours = plt.get_cmap("viridis")(
        [0.9 * k / max(1, len(args.rates) - 1) for k in range(len(args.rates))]
    )
    _draw_members(axes[1, 0], args.rates, ensembles, colours)
    _draw_accuracies(axes[1, 1], args.rates, ensembles, colours)
    for panel in axes.flat:
        panel.grid(alpha=0.3)
        panel.set_axisbelow(True)
    save_figure(figure, path, dpi=110)
    plt.close(figure)


def _draw_styles(axes: Any, losses: dict[str, list[float]]) -> None:
    widths = {"functional": 7, "object-oriented": 4, "differentiable": 1.5}
    colours = {"functional": "0.85", "object-oriented": "tab:orange", "differentiable": "black"}
    for style, width in widths.items():
        difference = largest_difference(losses, style)
        shown = "the same bits" if difference == 0 else f"relative difference {difference:.0e}"
        label = style if style == "functional" else f"{style}: {shown}"
        axes.plot(losses[style], color=colours[style], linewidth=width, label=label)
    difference = largest_difference(losses, "torch.optim.Adam")
    axes.plot([], [], " ", label=f"(torch.optim.Adam: relative difference {difference:.0e})")
    axes.set(title="one run in three styles", xlabel="step", ylabel="loss", yscale="log")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylim(bottom=min(losses["functional"]) / 8)  # room for the legend
    axes.legend(fontsize="small", loc="lower left")


def _draw_speed(axes: Any, speed: Sequence[SpeedUp]) -> None:
    for loop in dict.fromkeys(ratio.loop for ratio in speed):
        own = sorted((r for r in speed if r.loop == loop), key=lambda r: r.members)
        medians = [r.median for r in own]
        ranges = [[r.median - r.least for r in own], [r.most - r.median for r in own]]
        axes.errorbar(
            [r.members for r in own],
            medians,
            ranges,
            marker="o",
            capsize=4,
            label=f"than a loop: {loop}",
        )
    counts = sorted({r.members for r in speed})
    axes.axhline(1, color="0.4", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="networks", title="times as fast by vmap")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set_yticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    axes.legend(fontsize="small", loc="upper left")


def _draw_members(
    axes: Any, rates: Sequence[float], ensembles: Sequence[dict[str, Any]], colours: Any
) -> None:
    for k, rate in enumerate(rates):
        mean = [statistics.fmean(step) for step in zip(*(row["losses"][k] for row in ensembles))]
        axes.plot(mean, color=colours[k], label=f"learning rate {rate:g}")
    axes.set(title="mean training loss of the members", xlabel="step", ylabel="loss", yscale="log")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize="small")


def _draw_accuracies(
    axes: Any, rates: Sequence[float], ensembles: Sequence[dict[str, Any]], colours: Any
) -> None:
    for k in range(len(rates)):
        values = [a for row in ensembles for a in row["accuracies"][k :: len(rates)]]
        spread = [k + 0.5 * (i / max(1, len(values) - 1) - 0.5) for i in range(len(values))]
        axes.plot(spread, values, ".", color=colours[k], alpha=0.6)
        mean = members_at(ensembles, "accuracies", k, len(rates))
        axes.errorbar(
            k, mean.mean, mean.half_width, fmt="_", color="black", markersize=30, capsize=5
        )
    votes = [row["vote_accuracies"][-1] for row in ensembles]
    last = len(rates)
    axes.plot([last] * len(votes), votes, ".", color="tab:red", alpha=0.6)
    vote = estimate(votes)
    axes.errorbar(
        last, vote.mean, vote.half_width, fmt="_", color="black", markersize=30, capsize=5
    )
    names = [*(f"lr {rate:g}" for rate in rates), "mean vote\nof all"]
    axes.set_xticks(range(last + 1), names)
    axes.set(title="members and their vote", ylabel="test accuracy (%)")
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 0), min(high, 100))  # few seeds have intervals that go beyond
