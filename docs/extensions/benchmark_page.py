"""Tables and picture of the page on performance, from the figures of the benchmark."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from extensions.files import Folder, table


RESULTS = Path("benchmarks") / "results" / "benchmarks.json"
EACH = RESULTS.with_name("each_optimizer.json")
#: Rows of the benchmark -> the columns of the table of all optimizers.
COLUMNS = {
    "each-small": "step, 100 x 32x32",
    "each-large": "step, 10 x a million",
    "each-update": "differentiable update",
}


def write(root: Path, pages: Folder) -> None:
    """Write the tables and draw the picture."""
    from speed_picture import draw_speed

    from benchmarks.picture import draw  # needs the root on the path, and matplotlib

    figures = json.loads((root / RESULTS).read_text(encoding="utf-8"))
    pages.write("benchmark_machine.md", machine(figures))
    pages.write("benchmark_summary.md", summary(figures))
    pages.write("benchmark_table.md", ratios(figures["rows"]))
    pages.write("benchmark_times.md", times(figures["cases"]))
    pages.write("benchmark_differences.md", differences(figures["cases"]))
    each = json.loads((root / EACH).read_text(encoding="utf-8"))
    pages.write("benchmark_each.md", f"{machine(each, 'cpu')}\n{each_optimizer(each['rows'])}")
    for name, make in (
        ("peers.png", lambda path: draw_speed(figures, path)),
        ("benchmarks.png", lambda path: draw(figures["rows"], "wall", subtitle(figures), path)),
    ):
        picture = pages.path / name
        picture.parent.mkdir(parents=True, exist_ok=True)
        pages.written.add(picture)
        if not picture.exists() or picture.stat().st_mtime < (root / RESULTS).stat().st_mtime:
            make(picture)


def summary(figures: dict[str, Any]) -> str:
    """Return in plain words what the first picture shows."""
    found = {(r["key"], r["against"]): r["wall"]["value"] for r in figures["rows"] if "wall" in r}
    small = found["meta-mlp", "higher / torchopt"]
    large = found["adam-large", "torch fused / torchopt"]
    return (
        "How long the same work takes, as a multiple of our time, on "
        f"{figures['machine']['cores']} CPU cores. A *MAML step* is five differentiable steps of "
        "Adam for each of four tasks and the backward pass to the initial weights, here of a "
        "network with two layers of 1,024 units; with eight layers of 64, `higher` takes "
        f"{small:.1f} times as long as we do. *Adam.step* updates 100 matrices of 32 x 32; with "
        "ten tensors of a million entries, where memory is the limit, `torch.optim` takes "
        f"{large:.1f} times as long. The last bar is one differentiable update and its backward "
        "pass, computed by our own rules without their kernels.\n"
    )


#: Side -> why its results are not ours. ``tests/test_speed_picture.py`` holds the first to the
#: figures.
REASONS = {
    "higher": "Its Adam adds $\\epsilon$ to the root of the second moment before the correction of "
    "that moment's bias; ours adds it after, as `torch.optim` and Optax do. In the first step its "
    "$\\epsilon$ is therefore 32 times as large, and the derivative depends on it wherever a "
    "gradient is about as small. With that larger $\\epsilon$ our own Adam changes by exactly this "
    "amount; and where the two definitions coincide ($\\beta_2 = 0$), `higher` agrees "
    "with us to the last digit.",
    "torchopt-0.7.3": "Its meta-gradient is `nan`: behind a unit that no sample activates the "
    "second moment is exactly zero, where the derivative of its root is infinite. The time is that "
    "of the same operations.",
}


def differences(cases: dict[str, Any]) -> str:
    """Return whose results are not ours, by how much, and why."""
    from benchmarks.report import TOLERANCE
    from benchmarks.report import differences as found_differences

    found: dict[str, dict[str, float]] = {}
    for case, side, _, difference in found_differences(cases):
        found.setdefault(side, {})[case] = difference
    text = f"In double precision all results agree with ours to one part in {1 / TOLERANCE:,.0f}"
    if not found:
        return f"{text}.\n"
    lines = [f"{text}, except for:", ""]
    for side, amounts in found.items():
        places = [
            f"on *{case}*" if math.isnan(amount) else f"by {amount:.2g} on *{case}*"
            for case, amount in amounts.items()
        ]
        lines.append(f"* **{side}**, {', '.join(places)}. {REASONS.get(side, '')}".rstrip())
    return "\n".join(lines) + "\n"


def subtitle(figures: dict[str, Any]) -> str:
    """Return on what and how it was measured, in a line."""
    machine = figures["machine"]
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {figures['threads']} threads; "
        f"{figures['rounds']} rounds over {figures['restarts']} restarts; 95 % intervals"
    )


def machine(figures: dict[str, Any], clock: str = "wall") -> str:
    """Return a sentence on the machine and the run."""
    time = {"wall": "wall clock", "cpu": "processor time"}[clock]
    about = figures["machine"]
    day = about["date"].partition("T")[0]
    threads, rounds, restarts = (figures[of] for of in ("threads", "rounds", "restarts"))
    return (
        f"Measured on {day}: {about['cpu']}, {about['cores']} cores, Python {about['python']}, "
        f"{threads} thread{'s' * (threads > 1)}, {rounds} interleaved rounds over "
        f"{restarts} restart{'s' * (restarts > 1)}, {time}, with 95 % intervals.\n"
    )


def ratios(rows: list[dict[str, Any]]) -> str:
    """Return the table of all rows: what was measured, and the target set beforehand."""
    lines = [["work", "ratio of", "measured", "target", "met"]]
    for row in rows:
        sign = "≤" if row["at_most"] else "≥"
        limit = row["target"] is None
        unit = f" {row['unit']}" if row["unit"] else ""
        lines.append([row["row"], row["against"].replace(" / ", " over "), *_measured(row, unit)])
        lines[-1].insert(3, "a limit" if limit else f"{sign} {row['target']:g}{unit}")
    return table(lines)


def each_optimizer(rows: list[dict[str, Any]]) -> str:
    """Return a table with one line for each optimizer and one column for each kind of work."""
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        name = row["row"].partition(",")[0].removesuffix(".step")
        value, verdict = _measured(row, "", "cpu")
        over = " (fused)" if "torch fused" in row["against"] else ""
        missed = f", not {row['target']:g}" if verdict == "no" else ""
        found.setdefault(name, {})[row["key"]] = value + over + missed
    lines = [["optimizer", *COLUMNS.values()]]
    lines += [[name, *(cells.get(key, "") for key in COLUMNS)] for name, cells in found.items()]
    return table(lines)


def _measured(row: dict[str, Any], unit: str, clock: str = "wall") -> list[str]:
    from benchmarks.report import VERDICTS

    if "absent" in row:
        return [row["absent"], ""]
    found = row[clock]
    value = f"**{found['value']:.3g}**{unit}"
    if found["low"] != found["high"]:
        value += f" [{found['low']:.3g}, {found['high']:.3g}]"
    return [value, VERDICTS[found["met"]]]


def times(cases: dict[str, Any]) -> str:
    """Return the table of medians behind the ratios."""
    lines = [["work", "side", "version", "median time"]]
    for case, sides in cases.items():
        for side, figures in sides.items():
            if "wall" in figures:
                seconds = [second for run in figures["wall"]["seconds"] for second in run]
                time = _readable(statistics.median(seconds))
                lines.append([case, side, str(figures["version"]), time])
    return table(lines)


def _readable(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"
