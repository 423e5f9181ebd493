"""The process in which one side computes: JSON requests on stdin, JSON replies on stdout.

Run by path and isolated (``python -I benchmarks/worker.py SIDE THREADS [FOLDER]``): what is
installed in the side's environment must be found before this repository, where a package has the
same name. It knows no tensor library; those with torch and those with JAX run it alike.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np


# Appended, not inserted: see above. A copy of the package to compare with comes first.
sys.path[:0] = sys.argv[3:4]
sys.path.append(str(Path(__file__).resolve().parent.parent))


class Worker:
    """Answers requests; each method is one, named by the request's ``do``."""

    def __init__(self, side: str, threads: int) -> None:
        _limit_cores(threads)
        self.side = importlib.import_module(f"benchmarks.sides.{side}")
        self.torch: Any = sys.modules.get("torch")
        if self.torch is not None:
            self.torch.set_num_threads(threads)
        self.work: Any = None

    def hello(self) -> dict[str, Any]:
        """Return what is measured."""
        return {"version": self.side.version()}

    def build(self, workload: str, options: dict[str, Any]) -> dict[str, Any]:
        """Prepare the work and let go of the last one."""
        self.work = None
        problem = importlib.import_module(f"benchmarks.{workload}").problem(**options)
        self.work = getattr(self.side, workload)(problem)
        return {}

    def result(self, path: str, calls: int) -> dict[str, Any]:
        """Do the work and save the arrays that the last call returned."""
        for _ in range(calls):
            arrays = self.work()
        np.savez(path, *(_as_numpy(array) for array in arrays))
        return {}

    def numbers(self) -> dict[str, Any]:
        """Do the work and return the lists of numbers that it returned, by name."""
        return {"numbers": self.work()}

    def time(self, repeats: int) -> dict[str, Any]:
        """Return the seconds of one call, by the clock and of processor time."""
        if repeats > 1:
            self.work()
        self._finish()
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(repeats):
            self.work()
        self._finish()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return {"cpu": cpu / repeats, "wall": wall / repeats}

    def _finish(self) -> None:
        """Wait for a GPU; what runs on the processor has finished."""
        if self.torch is not None and self.torch.cuda.is_initialized():
            self.torch.cuda.synchronize()


def _limit_cores(threads: int) -> None:
    """Keep all threads of this process, whoever starts them, on so many cores."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def _as_numpy(array: Any) -> np.ndarray:
    if hasattr(array, "detach"):  # of torch
        array = array.detach().cpu()
    return np.asarray(array)


def main() -> None:
    """Answer until stdin closes."""
    # Libraries print; only replies may reach the harness.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker: Worker | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            worker = worker or Worker(sys.argv[1], int(sys.argv[2]))
            reply = getattr(worker, request.pop("do"))(**request)
        except Exception:
            reply = {"error": traceback.format_exc()}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
