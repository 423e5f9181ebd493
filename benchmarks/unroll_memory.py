"""Memory and time of a loop's adjoints: ``python -m benchmarks.unroll_memory``.

Each measurement has a process of its own. It warms up with a loop of two steps, and then
differentiates the loop once: memory is the highest resident memory over that before, time that of
the processor, which includes what it costs to get fresh memory. Ratios are to the plain unroll of
the same round, and the median of several rounds counts. ``higher`` does the same work on the same
network; that its derivative is ours is compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.registry import SIDES, how_to_install
from benchmarks.unroll_one import PEERS
from benchmarks.unroll_problems import PROBLEMS


ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results" / "unroll_memory.json"
PLAIN = "Unrolled()"
LATER = "few-shot, 10,000 steps"

#: What is measured of each problem.
OF = {
    "deep": [PLAIN, "higher", "Checkpointed()"],
    "long": [
        *(PLAIN, "higher", "Checkpointed()"),
        *('Checkpointed("sqrt")', 'Checkpointed("log")', 'Checkpointed("revolve")'),
        *('Checkpointed("sqrt", graphs=1)', 'Checkpointed("revolve", graphs=4)'),
    ],
    "few-shot, 1,000 steps": [
        *(PLAIN, "Checkpointed()", 'Checkpointed("sqrt")', 'Checkpointed("revolve")'),
        'inner_loop, Checkpointed("sqrt")',
    ],
    LATER: ['Checkpointed("revolve")'],
}

#: What is promised: at most so much of the memory and of the time of the plain unroll ...
LIMITS = {
    ("deep", "Checkpointed()"): (0.3, 1.2),
    ("long", 'Checkpointed("sqrt")'): (0.1, 1.5),
    ("long", 'Checkpointed("log")'): (0.06, 2.5),
    ("long", 'Checkpointed("revolve")'): (0.06, 2.5),
}
#: ... and at most so many megabytes, of every way but the plain one.
MEGABYTES = {"few-shot, 1,000 steps": 2048, LATER: 2048}

#: How far derivatives in float32 may be apart, of the same steps added up in another order.
APART = 1e-2


def measured(name: str, way: str, length: int | None = None) -> dict[str, float]:
    """Measure in a process of its own."""
    if way in PEERS:
        script = str(ROOT / "benchmarks" / "unroll_one.py")
        command = [str(SIDES[way].python), "-I", "-W", "ignore", script]
    else:
        command = [sys.executable, "-m", "benchmarks.unroll_one"]
    command += [name, way, *(() if length is None else ("--length", str(length)))]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    return json.loads(result.stdout.splitlines()[-1])


def here(ways: list[str]) -> list[str]:
    """Return the ways that can be measured; say in a line what to install for each other one."""
    found = [way for way in ways if way not in PEERS or SIDES[way].installed]
    for way in ways:
        if way not in found:
            print(f"{way} is not installed: {how_to_install(way)}", flush=True)
    return found


def compared(name: str, ways: list[str], rounds: int) -> dict[str, dict[str, float]]:
    """Return medians over rounds, with ratios to the plain unroll of the same round."""
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, rows in found.items():
            row = measured(name, way)
            if way != PLAIN and found.get(PLAIN):
                plain = found[PLAIN][-1]
                row["memory"] = row["mb"] / plain["mb"]
                row["time"] = row["seconds"] / plain["seconds"]
                row["apart"] = abs(row["norm"] / plain["norm"] - 1)
            rows.append(row)
    return {
        way: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        for way, rows in found.items()
    }


def line(name: str, way: str, row: Mapping[str, Any]) -> str:
    """Return a row as text."""
    text = f"{name}  {way:34} {row['mb']:8.1f} MB {row['seconds']:7.2f} s"
    if "memory" in row:
        text += f"  {row['memory']:.3f} of the memory, {row['time']:.2f} of the time"
    if (name, way) in LIMITS:
        memory, seconds = LIMITS[name, way]
        text += f"  (at most {memory} and {seconds})"
    if name in MEGABYTES and way != PLAIN:
        text += f"  (at most {MEGABYTES[name]} MB)"
    if row.get("apart", 0) > APART:
        text += f"  another derivative: {row['apart']:.1e}"
    return text


def main() -> None:
    """Measure, print a table, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    short = [name for name in PROBLEMS if name != LATER]
    parser.add_argument(
        "--problem", choices=PROBLEMS, nargs="*", default=short, help=f"default: all but {LATER}"
    )
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    results["torch"] = torch.__version__
    results["machine"] = machine.facts()
    print(machine.busy(results["machine"]))
    for name in arguments.problem:
        results[name] = compared(name, here(OF[name]), arguments.rounds)
        for way, row in results[name].items():
            print(line(name, way, row), flush=True)
        RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
