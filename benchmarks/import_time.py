"""What ``import torchopt`` costs beyond ``import torch``, in fresh processes."""

from __future__ import annotations

from benchmarks.rows import Case, Row


def problem(processes: int = 7) -> int:
    """Return how many processes to time."""
    return processes


IMPORT = Case("import torchopt, beyond torch", "import_time", {}, timed=False)
ROWS = [
    Row("import", IMPORT, "torchopt", None, 100.0, at_most=True, number="milliseconds", unit=" ms")
]
