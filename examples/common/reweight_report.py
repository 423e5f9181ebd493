"""What the reweighting example shows: tables, claims and the figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common.command import counted, estimate
from common.reporting import Table, mpl, save_figure
from common.reweight_training import METHODS, PLAIN, REWEIGHTED, WEIGHT_BINS


Rows = Sequence[dict[str, Any]]
COLORS = dict(zip(METHODS, ("tab:gray", "tab:brown", "tab:olive", "tab:orange", "tab:green")))
COLORS[REWEIGHTED] = "tab:blue"
PAPER = {"imbalance": (PLAIN, "class weights", "random weights"), "flip": (PLAIN, "random weights")}
FEW_POINTS = 5.0  # the paper's error rises by about 2 points up to 200:1


def final(rows: Rows, task: str, method: str, proportion: float | None = None) -> list[dict]:
    """Return the last row of each seed, in the order of the seeds."""
    chosen = [
        row
        for row in rows
        if "other_weight" in row
        and (row["task"], row["method"], row["proportion"]) == (task, method, proportion)
    ]
    return sorted(chosen, key=lambda row: row["seed"])


def accuracies(rows: Rows, task: str, method: str, proportion: float | None = None) -> list[float]:
    """Return the final test accuracy of each seed."""
    return [row["test_accuracy"] for row in final(rows, task, method, proportion)]


def methods(rows: Rows, task: str) -> list[str]:
    """Return the methods there are rows of, in the usual order."""
    present = {row["method"] for row in rows if row["task"] == task}
    return [method for method in METHODS if method in present]


def proportions(rows: Rows) -> list[float]:
    """Return the proportions there are rows of."""
    return sorted({row["proportion"] for row in rows if row["task"] == "imbalance"})


def tables(rows: Rows) -> list[Table]:
    """Return one table for each task."""
    result = []
    for task in ("imbalance", "flip"):
        if not methods(rows, task):
            continue
        columns: list[float | None] = [*proportions(rows)] if task == "imbalance" else [None]
        count = len(accuracies(rows, task, methods(rows, task)[0], columns[0]))
        what = "One digit is rare" if task == "imbalance" else "Wrong labels"
        title = f"{what}: test accuracy (%), {counted(count, 'seed')}"
        table = Table(
            title=title, title_justify="left", box=None, padding=(0, 1, 0, 0), min_width=60
        )
        table.add_column("method", no_wrap=True)
        for column in columns:
            header = "accuracy" if column is None else f"{column}"
            table.add_column(header, justify="right", no_wrap=True)
        for method in methods(rows, task):
            table.add_row(method, *(_text(accuracies(rows, task, method, c)) for c in columns))
        result.append(table)
    return result


def _text(values: Sequence[float]) -> str:
    return f"{estimate(values):.1f}"


def claims(rows: Rows) -> list[dict[str, Any]]:
    """Compare what the paper claims with what was measured; differences are paired by seed."""
    result = [
        found
        for task, others in PAPER.items()
        for other in others
        if (found := _better(rows, task, other)) is not None
    ]
    if REWEIGHTED in methods(rows, "imbalance") and len(proportions(rows)) > 1:
        result.append(_rise(rows))
    if REWEIGHTED in methods(rows, "flip"):
        result.append(_lower_weight(rows))
    return result


def beyond_the_paper(rows: Rows) -> list[dict[str, Any]]:
    """Compare with what the paper does not compare with on such data."""
    return [
        found
        for task, others in PAPER.items()
        for other in METHODS
        if other not in others and (found := _better(rows, task, other)) is not None
    ]


def _better(rows: Rows, task: str, other: str) -> dict[str, Any] | None:
    """Compare learned weights with another method, where a digit is rarest."""
    present = methods(rows, task)
    if other == REWEIGHTED or REWEIGHTED not in present or other not in present:
        return None
    most = proportions(rows)[-1] if task == "imbalance" else None
    where = "wrong labels" if most is None else f"two digits, {most} of one"
    ours, theirs = (accuracies(rows, task, method, most) for method in (REWEIGHTED, other))
    difference = estimate([a - b for a, b in zip(ours, theirs)])
    measured = f"{_text(ours)} % against {_text(theirs)} %, difference {difference:.1f} points"
    claim = f"{where}: learned weights are better than {other}"
    return {"claim": claim, "measured": measured, "holds": difference.above(0)}


def _rise(rows: Rows) -> dict[str, Any]:
    least, most = proportions(rows)[0], proportions(rows)[-1]
    few = accuracies(rows, "imbalance", REWEIGHTED, least)
    many = accuracies(rows, "imbalance", REWEIGHTED, most)
    rise = estimate([a - b for a, b in zip(few, many)])
    return {
        "claim": f"the error of learned weights rises by a few points only from {least} to {most}",
        "measured": f"{rise:.1f} points",
        "holds": rise.below(FEW_POINTS),
    }


def _lower_weight(rows: Rows) -> dict[str, Any]:
    last = final(rows, "flip", REWEIGHTED)
    wrong, right = ([row[f"{kind}_weight"] for row in last] for kind in ("marked", "other"))
    difference = estimate([b - a for a, b in zip(wrong, right)])
    return {
        "claim": "images with wrong labels get lower weights",
        "measured": f"{estimate(wrong)} against {estimate(right)} (1 is an equal share)",
        "holds": difference.above(0),
    }


def draw(path: Path, rows: Rows, digits: Sequence[int], flip_rate: float) -> None:
    """Draw error over imbalance, accuracy over wrong-label training and the learned weights.

    Args:
        path: The PNG file.
        rows: All measurements.
        digits: The rare and the frequent digit.
        flip_rate: Share of wrong labels.
    """
    mpl.use("Agg")  # no screen is needed
    import matplotlib.pyplot as plt

    panels: list[Callable[[Any], None]] = []
    if methods(rows, "imbalance"):
        panels.append(lambda axes: _draw_imbalance(axes, rows, digits))
    if methods(rows, "flip"):
        panels.append(lambda axes: _draw_flip(axes, rows, flip_rate))
    if REWEIGHTED in methods(rows, "flip"):
        panels.append(lambda axes: _draw_weights(axes, rows))
    size = (4.7 * len(panels), 4.0)
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    for panel, place in zip(panels, axes[0]):
        panel(place)
        place.grid(alpha=0.3)
    save_figure(figure, path, dpi=110)
    plt.close(figure)


def _draw_imbalance(axes: Any, rows: Rows, digits: Sequence[int]) -> None:
    places = proportions(rows)
    shown = methods(rows, "imbalance")
    for k, method in enumerate(shown):
        errors = [
            estimate([100 - a for a in accuracies(rows, "imbalance", method, p)]) for p in places
        ]
        axes.errorbar(
            [i + 0.05 * (k - len(shown) / 2) for i in range(len(places))],  # side by side
            [e.mean for e in errors],
            [e.half_width for e in errors],
            color=COLORS[method],
            linewidth=2.5 if method == REWEIGHTED else 1.3,
            marker="o",
            markersize=4,
            capsize=3,
            label=method,
        )
    axes.set_xticks(range(len(places)), [f"{p}" for p in places])
    axes.set_xlim(-0.5, len(places) - 0.5)  # the markers of one place together, even if it is alone
    axes.set_ylim(0, 85)  # room for the legend
    axes.set(xlabel=f"share of the frequent digit ({digits[1]} against {digits[0]})")
    axes.set(ylabel="test error (%)", title="One digit is rare")
    axes.legend(fontsize=8, ncols=2, loc="upper center")


def _draw_flip(axes: Any, rows: Rows, flip_rate: float) -> None:
    for method in methods(rows, "flip"):
        chosen = [row for row in rows if (row["task"], row["method"]) == ("flip", method)]
        steps = sorted({row["step"] for row in chosen})
        means = [
            estimate([row["test_accuracy"] for row in chosen if row["step"] == step])
            for step in steps
        ]
        low, high = ([m.mean + sign * m.half_width for m in means] for sign in (-1, 1))
        width = 2.5 if method == REWEIGHTED else 1.3
        axes.plot(steps, [m.mean for m in means], COLORS[method], linewidth=width, label=method)
        axes.fill_between(steps, low, high, color=COLORS[method], alpha=0.15, linewidth=0)
    axes.set(
        xlabel="step",
        ylabel="test accuracy (%)",
        title=f"{100 * flip_rate:g} % of the labels are wrong",
    )
    axes.legend(fontsize=8, loc="lower right")


def _draw_weights(axes: Any, rows: Rows) -> None:
    last = final(rows, "flip", REWEIGHTED)
    edges = WEIGHT_BINS.tolist()
    for kind, label, color in (
        ("other", "right label", "tab:blue"),
        ("marked", "wrong label", "tab:red"),
    ):
        counts = [sum(column) for column in zip(*(row[f"{kind}_counts"] for row in last))]
        shares = [100 * count / max(1, sum(counts)) for count in counts]
        axes.stairs(shares, edges, fill=True, alpha=0.4, color=color, label=label)
        axes.stairs(shares, edges, color=color)
    axes.set(xlabel="learned weight (1: equal share; 8: all above)", ylabel="share of images (%)")
    axes.set(title="Weights, second half of training", yscale="log")
    axes.legend(fontsize=8)
