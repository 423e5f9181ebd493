"""How long the first minutes take: ``python -m benchmarks.first_minutes``.

What a newcomer types, in a fresh clone in a fresh folder: the installation for the demo, the demo,
every example's ``--quick``, and the documentation. Wall-clock time; installations include their
downloads. Nothing here is a test: a busy machine or a slow network misses any limit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import machine


ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results" / "first_minutes.json"
#: What is typed -> seconds that it may take; ``None`` where a download decides.
COMMANDS: dict[str, float | None] = {
    "make .venv/.for-demo": None,
    "make demo": 90,
    "make .venv/.for-test": None,
    "make .venv/.for-docs": None,
    "make docs": 120,
}
QUICK = 20.0
#: What is no example: it runs the others.
LEFT_OUT = {"reproduce"}


def commands() -> dict[str, float | None]:
    """Return all commands with their limits, in the order in which they are run."""
    names = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))
    quick = {
        f".venv/bin/python examples/{name}.py --quick": QUICK
        for name in names
        if name not in LEFT_OUT
    }
    return {**COMMANDS, **quick}


def main() -> None:
    """Run everything in a clone, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.parse_args()
    found: dict[str, dict[str, float | None]] = {}
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "torchopt"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        about = machine.facts()
        for command, limit in commands().items():
            begin = time.monotonic()
            done = subprocess.run(command.split(), cwd=clone, capture_output=True, text=True)
            seconds = round(time.monotonic() - begin, 1)
            if done.returncode:
                sys.exit(f"{command} has failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
            found[command] = {"seconds": seconds, "limit": limit}
            promise = "" if limit is None else f"  (at most {limit:g})"
            print(f"{command:52} {seconds:7.1f} s{promise}", flush=True)
    results = {"machine": about, "commands": found}
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
