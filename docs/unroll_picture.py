"""Draw ``benchmarks/results/unroll_study.json``: ``python docs/unroll_picture.py``."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any


HERE = Path(__file__).resolve().parent
DATA = HERE.parent / "benchmarks" / "results" / "unroll_study.json"
PICTURE = HERE / "images" / "unroll_study.png"

#: Way -> colour, line, marker: recorded loops grey, exact ones full, approximations dashed.
STYLES = {
    "Unrolled()": ("#1f2937", "-", "o"),
    "Mixed()": ("#6b7280", "-", "v"),
    "Checkpointed()": ("#3a9dc0", "-", "o"),
    'Checkpointed("sqrt")': ("#0b5d7a", "-", "s"),
    'Checkpointed("log")': ("#2a7f62", "-", "^"),
    'Checkpointed("revolve")': ("#6f9e3c", "-", "D"),
    "Forward()": ("#7a4ea3", "-", "P"),
    "Truncated(16)": ("#c2533d", "--", "o"),
    "FirstOrder()": ("#b97d16", "--", "s"),
}
#: The least memory that is told apart: pages that come and go.
FLOOR = 0.5
#: How far apart two labels are, as a factor.
APART = {"mb": 1.5, "seconds": 1.2}


def recorded() -> dict[int, dict[str, dict[str, float]]]:
    """Return what was measured: number of steps -> way -> figures."""
    lengths = json.loads(DATA.read_text(encoding="utf-8"))["lengths"]
    return {int(length): rows for length, rows in lengths.items()}


def draw(path: Path = PICTURE) -> None:
    """Write the picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    data = recorded()
    figure, axes = pyplot.subplots(1, 2, figsize=(13, 5.2), gridspec_kw={"wspace": 0.62})
    _panel(axes[0], data, "mb", "memory above the baseline, MB")
    _panel(axes[1], data, "seconds", "time of one derivative, s")
    path.parent.mkdir(exist_ok=True)
    digest = hashlib.sha256(DATA.read_bytes()).hexdigest()  # so that a test sees what it is of
    figure.savefig(
        path, dpi=125, bbox_inches="tight", pad_inches=0.1, metadata={"Description": digest}
    )
    pyplot.close(figure)


def _panel(ax: Any, data: dict[int, dict[str, dict[str, float]]], key: str, title: str) -> None:
    """Draw a line for each way, with its name at its end."""
    ends: dict[str, float] = {}
    for way, (color, line, marker) in STYLES.items():
        lengths = [length for length, rows in data.items() if way in rows]
        values = [max(data[length][way][key], FLOOR if key == "mb" else 0.0) for length in lengths]
        ends[way] = values[-1]
        ax.plot(lengths, values, line, color=color, marker=marker, markersize=5, linewidth=1.8)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    last = max(data)
    for way, place in _spread(ends, APART[key]).items():
        ax.annotate(
            way, (last, ends[way]), (last * 1.35, place), va="center", fontsize=9,
            color=STYLES[way][0], fontweight="bold", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": STYLES[way][0], "linewidth": 0.7},
        )  # fmt: skip
    ax.set_xticks(list(data), [f"{length:,}" for length in data])
    ax.minorticks_off()
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set_title(title, fontsize=11, loc="left")
    ax.set_xlabel("steps", fontsize=10)
    ax.grid(color="#e4e4e4", linewidth=0.6)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def _spread(ends: dict[str, float], apart: float) -> dict[str, float]:
    """Return where to write names so that none covers another: near the ends, in their order."""
    order = sorted(ends, key=ends.__getitem__)
    places = dict(ends)
    for _ in range(200):  # neighbours that are too near push each other away
        for below, above in itertools.pairwise(order):
            missing = (apart * places[below] / places[above]) ** 0.5
            if missing > 1.0:
                places[below] /= missing
                places[above] *= missing
    return places


if __name__ == "__main__":
    draw()
