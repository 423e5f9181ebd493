"""The process in which one side computes: JSON requests on stdin, JSON replies on stdout.

Run by path and isolated (``python -I benchmarks/worker.py SIDE``): what is installed in the
side's environment must be found before this repository, where a package has the same name.
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


# Appended, not inserted: see above. A copy of the package to compare with comes first.
sys.path[:0] = sys.argv[2:3]
sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from benchmarks import problems  # noqa: E402


class Worker:
    """Answers requests; each method is one, named by the request's ``do``."""

    def __init__(self, side: str) -> None:
        self.side = importlib.import_module(f"benchmarks.sides.{side}")
        self.meta_step: Any = None

    def hello(self, threads: int) -> dict[str, Any]:
        """Set the number of threads; return what is measured."""
        torch.set_num_threads(threads)
        return {"version": self.side.version(), "torch": torch.__version__}

    def build(self, problem: str, dtype: str, adam: str) -> dict[str, Any]:
        """Build a problem and let go of the last one."""
        self.meta_step = None
        built = problems.build(problem, getattr(torch, dtype), getattr(problems, adam))
        self.meta_step = self.side.prepare(built)
        return {}

    def gradient(self, path: str) -> dict[str, Any]:
        """Compute a meta-gradient and save it."""
        torch.save([g.detach() for g in self.meta_step()], path)
        return {}

    def step(self) -> dict[str, Any]:
        """Run one meta-step, return seconds by the clock and of processor time."""
        wall, cpu = time.perf_counter(), time.process_time()
        self.meta_step()
        return {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}


def main() -> None:
    """Answer until stdin closes."""
    # Libraries print; only replies may reach the harness.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker: Worker | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            worker = worker or Worker(sys.argv[1])
            reply = getattr(worker, request.pop("do"))(**request)
        except Exception:
            reply = {"error": traceback.format_exc()}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
