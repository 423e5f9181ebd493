"""Memory and time over the number of steps: ``python -m benchmarks.unroll_study``.

The loop ``long`` of ``unroll_memory`` (a network of 32-256-1, batches of 256, plain gradient
descent), differentiated in every way by the initial weights and the learning rate; ``Forward()``,
which is for few numbers, by the learning rate alone. Measured as there, each in a process of its
own; of several rounds the medians count. Then ``docs/unroll_picture.py`` draws the figure.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.unroll_memory import APART, PLAIN, ROOT, measured


RESULTS = Path(__file__).parent / "results" / "unroll_study.json"
LENGTHS = (16, 32, 64, 128, 256, 512, 1024)
EXACT = (
    *(PLAIN, "Mixed()", "Checkpointed()", 'Checkpointed("sqrt")'),
    *('Checkpointed("log")', 'Checkpointed("revolve")', "Forward()"),
)
WAYS = (*EXACT, "Truncated(16)", "FirstOrder()")


def studied(length: int, rounds: int) -> dict[str, dict[str, float]]:
    """Return the medians of every way for one number of steps.

    Raises:
        RuntimeError: If a way that is exact has another derivative than the plain unroll.
    """
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way, rows in found.items():
            rows.append(measured("long", way, length))
    rows = {
        way: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        for way, rows in found.items()
    }
    for way in EXACT:
        if abs(rows[way]["by_lr"] / rows[PLAIN]["by_lr"] - 1) > APART:
            raise RuntimeError(f"{way} has another derivative: {rows[way]}, {rows[PLAIN]}")
    return rows


def main() -> None:
    """Measure, print, write the figures, and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lengths", type=int, nargs="*", default=list(LENGTHS))
    arguments = parser.parse_args()
    results: dict[str, Any] = {
        "torch": torch.__version__,
        "machine": machine.facts(),
        "rounds": arguments.rounds,
        "lengths": {},
    }
    print(machine.busy(results["machine"]))
    for length in arguments.lengths:
        rows = results["lengths"][str(length)] = studied(length, arguments.rounds)
        for way, row in rows.items():
            print(f"{length:5} {way:24} {row['mb']:8.1f} MB {row['seconds']:7.2f} s", flush=True)
        RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    subprocess.run([sys.executable, str(ROOT / "docs" / "unroll_picture.py")], check=True)


if __name__ == "__main__":
    main()
