"""Draw the ratios of the table with their targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


COLORS = {True: "#2a7f62", False: "#c2533d", None: "#b6bcc6"}  # by whether the target is met
TARGET = "#1f2937"


def draw(results: Sequence[Mapping[str, Any]], clock: str, subtitle: str, path: Path) -> None:
    """Write a picture with a bar for each ratio and a mark at its target.

    Numbers that are no ratios have no place on the axis and are left to the table.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    shown = [r for r in results if clock in r and not r["unit"]]
    figure = Figure(figsize=(10, 1.6 + 0.42 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    for height, result in enumerate(reversed(shown)):
        _bar(axes, height, result, result[clock])
    axes.set_yticks(
        range(len(shown)), [f"{r['row']}\n{r['against']}" for r in reversed(shown)], fontsize=8
    )
    _decorate(axes, shown, clock)
    figure.suptitle("Ratios of times, and their targets", fontsize=12)
    axes.set_title(subtitle, fontsize=8, color="#6b7280")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _bar(axes: Any, height: int, result: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    value, low, high = found["value"], found["low"], found["high"]
    # from 1 on: equally fast
    axes.barh(height, value - 1, left=1, height=0.55, color=COLORS[found["met"]])
    axes.plot([low, high], [height, height], color="black", linewidth=1.2)
    target = result["target"]
    if target is not None:
        # the arrow of the mark points to where the target is reached
        marker = "<" if result["at_most"] else ">"
        axes.plot([target, target], [height - 0.4, height + 0.4], color=TARGET, linewidth=2)
        axes.plot(target, height, marker=marker, color=TARGET, markersize=5)
    axes.annotate(
        f"{value:.2f}",
        (1, height),
        xycoords=("axes fraction", "data"),
        ha="right",
        va="center",
        fontsize=9,
    )


def _decorate(axes: Any, shown: Sequence[Mapping[str, Any]], clock: str) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import FixedLocator, NullLocator

    ends = [n for r in shown for n in (r[clock]["low"], r[clock]["high"], r["target"] or 1)]
    least, most = min([0.6, *ends]) / 1.1, max([2, *ends]) * 1.5
    axes.set_xscale("log")
    axes.set_xlim(least, most)
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if least <= t <= most]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"{t:g}" for t in ticks])
    axes.axvline(1, color="#6b7280", linewidth=1, zorder=0)
    axes.grid(axis="x", color="#e5e7eb", zorder=0)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        handles=[
            Patch(color=COLORS[True], label="target reached"),
            Patch(color=COLORS[False], label="not reached"),
            Patch(color=COLORS[None], label="limit: if updates cost nothing"),
            Line2D([], [], color=TARGET, marker=">", markersize=5, label="target: at least"),
            Line2D([], [], color=TARGET, marker="<", markersize=5, label="target: at most"),
            Line2D([], [], color="black", linewidth=1.2, label="95 % interval"),
        ],
        fontsize=8,
        frameon=False,
        ncols=6,
        loc="upper center",
        bbox_to_anchor=(0.4, -0.06),
    )
