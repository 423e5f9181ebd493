"""What ``import torchopt`` costs beyond ``import torch``."""

from __future__ import annotations

import statistics
import subprocess
from pathlib import Path


#: Promised to users; see docs.
LIMIT_MS = 100.0


def import_milliseconds(python: Path, repetitions: int = 7) -> list[float]:
    """Return the cumulative import time of ``torchopt`` in fresh processes that have torch.

    Raises:
        RuntimeError: If the import fails.
    """
    return [_once(python) for _ in range(repetitions)]


def summary(milliseconds: list[float]) -> dict[str, float | bool]:
    """Return the median and whether it keeps the promise."""
    median = statistics.median(milliseconds)
    return {
        "median_ms": median,
        "min_ms": min(milliseconds),
        "max_ms": max(milliseconds),
        "limit_ms": LIMIT_MS,
        "ok": median <= LIMIT_MS,
    }


def _once(python: Path) -> float:
    command = [str(python), "-I", "-X", "importtime", "-c", "import torch; import torchopt"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"import torchopt failed in {python}:\n{done.stderr[-2000:]}")
    for line in reversed(done.stderr.splitlines()):
        # "import time: self [us] | cumulative | package", nested packages indented
        fields = line.removeprefix("import time:").split("|")
        if len(fields) == 3 and fields[2].rstrip() == " torchopt":
            return int(fields[1]) / 1000
    raise RuntimeError(f"{python} reported no import time of torchopt.")
