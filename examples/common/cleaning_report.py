"""What the hyper-cleaning example shows: table, claims and the figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.cleaning_training import (
    CHECKPOINTED,
    CLEAN,
    IMPLICIT,
    LEARNED,
    METHODS,
    NONE,
    ORACLE,
    T1_T2,
    UNROLLED,
)
from common.command import estimate
from common.reporting import Table, mpl, save_figure


Rows = Sequence[dict[str, Any]]
COLORS = {
    NONE: "tab:gray",
    CLEAN: "tab:brown",
    ORACLE: "tab:olive",
    UNROLLED: "tab:blue",
    CHECKPOINTED: "tab:cyan",
    IMPLICIT: "tab:orange",
    T1_T2: "tab:green",
}
MARKERS = "osD^v"  # of the shares of wrong labels


def values(rows: Rows, method: str, rate: float, key: str) -> list[float]:
    """Return a figure of each seed, in the order of the seeds."""
    chosen = [row for row in rows if (row["method"], row["rate"]) == (method, rate) and key in row]
    return [row[key] for row in sorted(chosen, key=lambda row: row["seed"])]


def rates(rows: Rows) -> list[float]:
    """Return the shares of wrong labels there are rows of."""
    return sorted({row["rate"] for row in rows})


def measured(rows: Rows, method: str, key: str) -> dict[int, float]:
    """Return a figure of the memory measurements by the number of inner steps."""
    return {row["steps"]: row[key] for row in rows if row["method"] == method}


def table(rows: Rows, memory: Rows) -> Table:
    """Return accuracy, time and memory of all methods side by side."""
    steps = sorted({row["steps"] for row in memory})
    title = "Wrong labels: test accuracy (%), seconds for an update, memory of a derivative (MiB)"
    result = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0), min_width=60)
    result.add_column("method", no_wrap=True)
    headers = [f"{100 * rate:g} % wrong" for rate in rates(rows)]
    for header in [*headers, "s", *(f"{count} steps" for count in steps), "error"]:
        result.add_column(header, justify="right", no_wrap=True)
    for method in METHODS:
        if not any(row["method"] == method for row in rows):
            continue
        accuracies = [_text(values(rows, method, r, "test_accuracy")) for r in rates(rows)]
        seconds = [x for rate in rates(rows) for x in values(rows, method, rate, "seconds")]
        sizes = measured(memory, method, "memory")
        errors = measured(memory, method, "error")
        result.add_row(
            method,
            *accuracies,
            f"{sum(seconds) / len(seconds):.2f}" if seconds else "",
            *(f"{sizes[count]:.1f}" if count in sizes else "" for count in steps),
            f"{errors[max(errors)]:.1g}" if errors else "",
        )
    return result


def _text(values: Sequence[float]) -> str:
    return f"{estimate(values):.1f}"


def claims(rows: Rows, memory: Rows) -> list[dict[str, Any]]:
    """Say what was shown, with differences paired by seed, of which a single one shows nothing."""
    result = []
    present = [method for method in LEARNED if any(row["method"] == method for row in rows)]
    pairs = [(method, NONE) for method in present]
    pairs += [(IMPLICIT, CLEAN)] if IMPLICIT in present else []
    for rate in rates(rows):
        for method, other in pairs:
            plain = values(rows, other, rate, "test_accuracy")
            ours = values(rows, method, rate, "test_accuracy")
            if len(ours) != len(plain) or len(ours) < 2:
                continue
            gain = estimate([a - b for a, b in zip(ours, plain)])
            result.append(
                {
                    "claim": f"{100 * rate:g} % wrong labels: weights learned by {method} "
                    f"derivatives are better than {other}",
                    "measured": f"{_text(ours)} % against {_text(plain)} %, difference "
                    f"{gain:.1f} points",
                    "holds": gain.above(0),
                }
            )
    return [*result, *_weights(rows, present), *_costs(memory)]


def _weights(rows: Rows, present: Sequence[str]) -> list[dict[str, Any]]:
    apart = [
        f"{method} {estimate(wrong).mean:.2f} against {estimate(right).mean:.2f}"
        for method in present
        for wrong, right in [
            [
                [x for rate in rates(rows) for x in values(rows, method, rate, f"{kind}_weight")]
                for kind in ("wrong", "right")
            ]
        ]
        if wrong and right
    ]
    learned = [row for row in rows if "wrong_weight" in row]
    if not apart:
        return []
    return [
        {
            "claim": "in every run examples with wrong labels get lower weights",
            "measured": "mean weight, from 0 to 1: " + ", ".join(apart),
            "holds": all(row["wrong_weight"] < row["right_weight"] for row in learned),
        }
    ]


def _costs(memory: Rows) -> list[dict[str, Any]]:
    plain = measured(memory, UNROLLED, "memory")
    result = []
    for method, claim in (
        (CHECKPOINTED, "checkpointed steps have the derivative of the unrolled ones in a tenth of "
         "their memory"),
        (IMPLICIT, "the implicit derivative matches that of many unrolled steps in a tenth of "
         "their memory"),
    ):  # fmt: skip
        sizes, errors = (measured(memory, method, key) for key in ("memory", "error"))
        if not sizes or not plain:
            continue
        most = max(sizes)
        text = ", ".join(f"{k} steps: {sizes[k]:.1f} MiB against {plain[k]:.1f}" for k in sizes)
        result.append(
            {
                "claim": claim,
                "measured": f"{text}; relative difference {errors[most]:.1g} at {most} steps",
                "holds": sizes[most] < 0.1 * plain[most] and errors[most] < 1e-2,
            }
        )
    return result


def _draw_accuracies(axes: Any, rows: Rows, present: Sequence[str]) -> None:
    """Draw points, not bars: bars that do not begin at zero would exaggerate the differences."""
    width = 0.6 / len(rates(rows))
    for k, rate in enumerate(rates(rows)):
        marker = MARKERS[k % len(MARKERS)]
        for i, method in enumerate(present):
            found = estimate(values(rows, method, rate, "test_accuracy"))
            place = i + (k - 0.5 * (len(rates(rows)) - 1)) * width
            axes.errorbar(
                found.mean,
                place,
                xerr=found.half_width,
                fmt=marker,
                color=COLORS[method],
                capsize=3,
            )
        if len(rates(rows)) > 1:
            axes.plot([], [], marker, color="black", label=f"{100 * rate:g} % wrong labels")
    axes.set_yticks(range(len(present)), present)
    axes.set_ylim(len(present) - 0.5, -0.5)  # the first at the top
    axes.grid(alpha=0.3, axis="x")
    title = "Accuracy" if len(rates(rows)) > 1 else f"{100 * rates(rows)[0]:g} % wrong labels"
    axes.set(xlabel="test accuracy (%)", title=title)
    if len(rates(rows)) > 1:
        axes.legend(fontsize=8)


def draw(path: Path, rows: Rows, memory: Rows) -> None:
    """Draw accuracy, what the weights say, and memory over the number of steps."""
    mpl.use("Agg")  # no screen is needed
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    present = [method for method in METHODS if any(row["method"] == method for row in rows)]
    _draw_accuracies(left, rows, present)
    for method in [method for method in LEARNED if method in present]:
        curves = [
            row["losses"]
            for row in rows
            if (row["method"], row["rate"]) == (method, rates(rows)[-1]) and "losses" in row
        ]
        means = [sum(column) / len(column) for column in zip(*curves)]
        # checkpointed is unrolled to the last digit: dashes let the line below be seen
        style = "--" if method == CHECKPOINTED else "-"
        middle.plot(range(len(means)), means, style, color=COLORS[method], label=method)
        sizes = measured(memory, method, "memory")
        right.plot(list(sizes), list(sizes.values()), "o-", color=COLORS[method], label=method)
    middle.set(xlabel="update of the weights", ylabel="loss on clean images")
    middle.set(title=f"{100 * rates(rows)[-1]:g} % wrong labels")
    right.set(xlabel="inner steps", ylabel="memory of a derivative (MiB)", title="Memory")
    largest = max((row["memory"] for row in memory), default=0.0)
    if largest > 1:  # a logarithmic scale of less would have a single tick
        right.set_yscale("symlog", linthresh=0.1)
    else:
        largest = max(largest, 0.01)  # measured as nothing, by few steps
    right.set(ylim=(0, None if largest > 1 else 1.2 * largest))
    right.set(xticks=sorted({row["steps"] for row in memory}))
    middle.xaxis.get_major_locator().set_params(integer=True)
    for axes in (middle, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    save_figure(figure, path, dpi=110)
    plt.close(figure)
