"""The figure of the example on meta-gradient reinforcement learning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.command import estimate
from common.reporting import save_figure


def draw(path: Path, summary: Any) -> None:
    """Draw returns and discounts over the life, and the mean returns of all methods.

    Args:
        path: The PNG file.
        summary: The results, a ``Summary`` of :mod:`mgrl`.
    """
    import matplotlib as mpl

    mpl.use("Agg")  # no screen is needed
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.6), layout="constrained")
    colours = _colours(summary, plt.get_cmap)
    for method in (*summary.fixed, *summary.learned):
        _band(left, summary.curves(method), colours[method], str(method), method.learn)
    for method in summary.learned:
        for key, line in (("gamma", "-"), ("lambda", ":")):
            name = f"{key}, learned from {method.gamma:g}, {method.trace:g}"
            _band(middle, summary.curves(method, key), colours[method], name, True, line)
    left.set(xlabel="outer steps", ylabel="return of the latest episodes", ylim=(0, 505))
    handles = left.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=8, title="gamma, lambda", fontsize=8)
    gamma = summary.args.outer_discount
    middle.axhline(gamma, color="black", linestyle="--", linewidth=0.8, label="outer gamma'")
    lowest = min(0.9, *(m.gamma for m in summary.learned)) - 0.05
    middle.set(xlabel="outer steps", ylabel="gamma, lambda (mean, 95 % interval)")
    middle.set_ylim(lowest, 1.02)
    middle.legend(fontsize=8, loc="lower right")
    _draw_bars(right, summary, colours)
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    save_figure(figure, path, dpi=85)
    plt.close(figure)


def _colours(
    summary: Any, colour_map: Callable[[str], Any]
) -> dict[tuple[bool, float, float], Any]:
    colours = {m: colour_map("tab10")(k) for k, m in enumerate(summary.learned)}
    for t, trace in enumerate(summary.args.fixed_traces):
        shades = colour_map(("Greys", "Greens", "Purples", "Reds")[t % 4])
        for g, gamma in enumerate(summary.args.fixed):
            shade = 0.35 + 0.55 * g / max(1, len(summary.args.fixed) - 1)
            colours[(False, gamma, trace)] = shades(shade)
    return colours


def _draw_bars(axes: Any, summary: Any, colours: dict[tuple[bool, float, float], Any]) -> None:
    methods = [*summary.fixed, *summary.learned]
    means = [estimate(summary.over_life(m)) for m in methods]
    axes.barh(
        [str(m) for m in methods],
        [m.mean for m in means],
        xerr=[m.half_width for m in means],
        color=[colours[m] for m in methods],
        capsize=3,
    )
    axes.tick_params(axis="y", labelsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="mean return over the whole life, 95 % interval")


def _band(axes: Any, curves: Tensor, colour: Any, label: str, band: bool, line: str = "-") -> None:
    points = [estimate(row) for row in curves.tolist()]
    x = range(1, len(points) + 1)
    mean = torch.tensor([p.mean for p in points])
    axes.plot(x, mean, line, color=colour, label=label, linewidth=1.8 if band else 1.2)
    if band:
        half = torch.tensor([p.half_width for p in points])
        axes.fill_between(x, mean - half, mean + half, color=colour, alpha=0.2, linewidth=0)
