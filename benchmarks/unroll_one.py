"""The process in which one loop is differentiated once: prints its figures as JSON.

Run by path and isolated for a peer (``python -I benchmarks/unroll_one.py PROBLEM WAY``), so that
what is installed in its environment is found before this repository.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import json
import sys
import time
from pathlib import Path

import torch


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks.unroll_problems import PROBLEMS, long


#: Those of another library; all other ways are ours.
PEERS = {"higher": "unroll_higher"}


def measure(name: str, way: str, length: int | None = None) -> dict[str, float]:
    """Return megabytes over the baseline, seconds, and the derivatives to compare."""
    torch.set_num_threads(1)
    problem = PROBLEMS[name]() if length is None else long(length)
    side = importlib.import_module(f"benchmarks.sides.{PEERS.get(way, 'unroll_torchopt')}")
    run = side.differentiated(problem, way)
    run(2)
    _give_back()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the highest so far
    before = _status("VmRSS")
    begin = time.process_time()
    grads = run(problem.length)
    seconds = time.process_time() - begin
    return {
        "mb": _status("VmHWM") - before,
        "seconds": seconds,
        "norm": float(torch.stack([g.norm() for g in grads]).norm()),
        "by_lr": float(grads[-1]),
    }


def _give_back() -> None:
    """Let the C library return what the warm-up has freed, or the loop would find it for free."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)


def _status(field: str) -> float:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def main() -> None:
    """Measure what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("problem", choices=PROBLEMS)
    parser.add_argument("way")
    parser.add_argument("--length", type=int, help="another number of steps, of the long one")
    arguments = parser.parse_args()
    if arguments.length is not None and arguments.problem != "long":
        parser.error("--length is for the problem 'long'")
    print(json.dumps(measure(arguments.problem, arguments.way, arguments.length)))


if __name__ == "__main__":
    main()
