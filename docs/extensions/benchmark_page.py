"""Tables and picture of the page on performance, from the figures of the benchmark."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from extensions.files import Folder, table


RESULTS = Path("benchmarks") / "results" / "benchmarks.json"


def write(root: Path, pages: Folder) -> None:
    """Write the tables and draw the picture."""
    from benchmarks.picture import draw  # needs the root on the path, and matplotlib

    figures = json.loads((root / RESULTS).read_text(encoding="utf-8"))
    pages.write("benchmark_machine.md", machine(figures))
    pages.write("benchmark_table.md", ratios(figures["rows"]))
    pages.write("benchmark_times.md", times(figures["cases"]))
    picture = pages.path / "benchmarks.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    pages.written.add(picture)
    if not picture.exists() or picture.stat().st_mtime < (root / RESULTS).stat().st_mtime:
        draw(figures["rows"], "wall", subtitle(figures), picture)


def subtitle(figures: dict[str, Any]) -> str:
    """Return on what and how it was measured, in a line."""
    machine = figures["machine"]
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {figures['threads']} threads; "
        f"{figures['rounds']} rounds over {figures['restarts']} restarts; 95 % intervals"
    )


def machine(figures: dict[str, Any]) -> str:
    """Return a sentence on the machine and the run."""
    about = figures["machine"]
    day = about["date"].partition("T")[0]
    return (
        f"Measured on {day}: {about['cpu']}, {about['cores']} cores, Python {about['python']}, "
        f"{figures['threads']} threads, {figures['rounds']} interleaved rounds over "
        f"{figures['restarts']} restarts, wall clock, with 95 % intervals.\n"
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


def _measured(row: dict[str, Any], unit: str) -> list[str]:
    from benchmarks.report import VERDICTS

    if "absent" in row:
        return [row["absent"], ""]
    found = row["wall"]
    value = f"**{found['value']:.3g}**{unit}"
    if found["low"] != found["high"]:
        value += f" [{found['low']:.3g}, {found['high']:.3g}]"
    return [value, VERDICTS[found["met"]]]


def times(cases: dict[str, Any]) -> str:
    """Return the table of medians behind the ratios, and whose results differ from ours."""
    from benchmarks.report import differing

    lines = [["work", "side", "version", "median time"]]
    for case, sides in cases.items():
        for side, figures in sides.items():
            if "wall" in figures:
                seconds = [second for run in figures["wall"]["seconds"] for second in run]
                time = _readable(statistics.median(seconds))
                lines.append([case, side, str(figures["version"]), time])
    sentences = "".join(f"* {sentence}\n" for sentence in differing(cases))
    return f"{table(lines)}\n{sentences}"


def _readable(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"
