"""Draw speed and memory from the results of the benchmarks: ``python docs/speed_picture.py``.

It writes ``docs/images/speed_and_memory.png``, for README; the page on performance begins with
:func:`draw_speed`, drawn when the site is built.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "images" / "speed_and_memory.png"
SPEED = ROOT / "benchmarks" / "results" / "benchmarks.json"
MEMORY = SPEED.with_name("unroll_memory.json")

#: Row of the benchmark and its two sides -> what stands beside the bar: whom we are compared with,
#: and at what.
PEERS = {
    ("meta-wide", "higher / torchopt"): ("higher", "MAML step"),
    ("meta-wide", "torchopt-0.7.3 / torchopt"): ("TorchOpt 0.7.3", "MAML step"),
    ("meta-wide", "optax / torchopt"): ("Optax", "MAML step"),
    ("adam-small", "torch fused / torchopt"): ("torch.optim, fused", "Adam.step"),
    ("update", "torchopt unfused / torchopt"): ("TorchOpt, unfused", "update, differentiated"),
}
#: Key of the benchmark of memory -> what stands beside the bar.
LOOPS = {
    "higher": "higher",
    "Unrolled()": "plain unroll",
    "Checkpointed()": "Checkpointed()",
    'Checkpointed("sqrt")': 'Checkpointed("sqrt")',
    'Checkpointed("revolve")': 'Checkpointed("revolve")',
}
PEER, OURS, INK, FAINT = "#b6bcc6", "#0b5d7a", "#1f2937", "#6b7280"


def ratios(figures: dict[str, Any] | None = None) -> list[tuple[str, str, float]]:
    """Return whom, at what work, and how many times as long as ours it takes them.

    Raises:
        KeyError: If the results have no such row.
    """
    results: Any = figures or json.loads(SPEED.read_text(encoding="utf-8"))
    found = {
        (row["key"], row["against"]): row["wall"]["value"]
        for row in results["rows"]
        if "wall" in row
    }
    return [(peer, work, found[row]) for row, (peer, work) in PEERS.items()]


def megabytes() -> list[tuple[str, float]]:
    """Return the memory of a loop of 256 steps, for each way to differentiate it."""
    rows = json.loads(MEMORY.read_text(encoding="utf-8"))["long"]
    return [(title, rows[way]["mb"]) for way, title in LOOPS.items()]


def digest() -> str:
    """Return what tells whether a picture shows the results that are there."""
    return hashlib.sha256(json.dumps([ratios(), megabytes()]).encode()).hexdigest()


def draw(path: Path = PICTURE) -> None:
    """Write the picture of README: speed on the left, memory on the right."""
    figure, (left, right) = _figure(9.6, 3.3, 2)
    _speed(left, ratios(), 11)
    rows = megabytes()
    ours = [0 if way in ("higher", "Unrolled()") else 1 for way in LOOPS]
    texts = [f"{mb:.0f} MB" if mb >= 10 else f"{mb:.1f} MB" for _, mb in rows]
    _bars(right, [title for title, _ in rows], [mb for _, mb in rows], texts, ours, 11)
    right.set_title("Memory of a 256-step loop", fontsize=12.5, color=INK, loc="left")
    figure.savefig(path, dpi=160, metadata={"Description": digest()})


def draw_speed(figures: dict[str, Any], path: Path) -> None:
    """Write the first picture of the page on performance."""
    figure, (axes,) = _figure(8.0, 3.4, 1)
    _speed(axes, ratios(figures), 12)
    figure.savefig(path, dpi=160)


def _figure(width: float, height: float, panels: int) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _speed(axes: Any, rows: list[tuple[str, str, float]], size: float) -> None:
    names = ["TorchOpt", *(f"{peer}\n{work}" for peer, work, _ in rows)]
    values = [1.0, *(ratio for _, _, ratio in rows)]
    texts = ["1", *(f"{ratio:.1f} \u00d7" for ratio in values[1:])]
    _bars(axes, names, values, texts, [1, *(0 for _ in rows)], size)
    axes.axvline(1, color=OURS, linewidth=1, linestyle=":")
    axes.set_title("Time, as a multiple of ours", fontsize=size + 1.5, color=INK, loc="left")


def _bars(
    axes: Any,
    names: list[str],
    values: list[float],
    texts: list[str],
    ours: list[int],
    size: float,
) -> None:
    places = range(len(names), 0, -1)
    axes.barh(places, values, height=0.62, color=[OURS if own else PEER for own in ours])
    for place, name, value, text in zip(places, names, values, texts):
        first, _, second = name.partition("\n")
        lift = 0.17 if second else 0.0
        at = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "center"}
        axes.annotate(first, (-0.02, place + lift), fontsize=size, color=INK, **at)
        if second:
            axes.annotate(second, (-0.02, place - 0.22), fontsize=size - 2, color=FAINT, **at)
        axes.annotate(
            text,
            (value, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=size,
            color=INK,
        )
    axes.set_xlim(0, max(values) * 1.27)
    axes.set_ylim(0.5, len(names) + 0.5)
    axes.set_yticks([])
    axes.set_xticks([])
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    axes.spines["left"].set_color(FAINT)


if __name__ == "__main__":
    draw()
    print(f"{PICTURE.relative_to(ROOT)} drawn")
