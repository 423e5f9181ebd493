"""A compiled step beside an eager one: ``python -m benchmarks.unroll_compiled``.

``unroll(torch.compile(step), ...)`` of the loop ``long`` of ``unroll_memory``. Each measurement has
a process of its own, with an empty cache of the compiler; a second one with the cache that the
first has filled shows what a later start costs. The loop is differentiated with a few steps until
nothing is compiled any more: what these calls take beyond what they take later is the compiling.
Then whole loops are timed, and graphs are counted again: there are none for more steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.sides.unroll_torchopt import ADJOINTS, differentiated
from benchmarks.unroll_problems import long


ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results" / "unroll_compiled.json"
WAYS = ("Unrolled()", 'Checkpointed("sqrt")')
#: Steps of the loops that are compiled, enough for each way in which a step is run.
FEW = 9


def measure(way: str, compiled: bool, length: int, repeats: int) -> dict[str, Any]:
    """Return seconds of compiling and of a loop, and how many graphs there were."""
    from torch._dynamo.utils import counters

    assert way in ADJOINTS
    torch.set_num_threads(1)
    run = differentiated(long(), way, torch.compile if compiled else lambda step: step)
    first = _seconds(lambda: run(FEW))
    graphs = counters["stats"]["unique_graphs"]
    few = min(_seconds(lambda: run(FEW)) for _ in range(3))
    times = [_seconds(lambda: run(length)) for _ in range(repeats)]
    grads = run(length)
    return {
        "compiling": first - few if compiled else 0.0,
        "loop": statistics.median(times),
        "graphs": graphs,
        "graphs later": counters["stats"]["unique_graphs"] - graphs,
        "norm": float(torch.stack([g.norm() for g in grads]).norm()),
    }


def _seconds(work: Callable[[], list[Tensor]]) -> float:
    begin = time.perf_counter()  # the C++ compiler is another process
    work()
    return time.perf_counter() - begin


def measured(way: str, compiled: bool, length: int, repeats: int, cache: str) -> dict[str, Any]:
    """Measure in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.unroll_compiled", "--only", way]
    command += ["--length", str(length), "--repeats", str(repeats)]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
    result = subprocess.run(
        command + (["--compiled"] if compiled else []),
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    return json.loads(result.stdout.splitlines()[-1])


def compared(way: str, length: int, repeats: int) -> dict[str, Any]:
    """Return the figures of both, with the seconds that a later start takes to compile."""
    with tempfile.TemporaryDirectory() as cache:
        eager = measured(way, False, length, repeats, cache)
        compiled = measured(way, True, length, repeats, cache)
        again = measured(way, True, length, 1, cache)
    apart = abs(compiled["norm"] / eager["norm"] - 1)
    return {
        "steps": length,
        "eager loop": eager["loop"],
        "compiled loop": compiled["loop"],
        "compiling": compiled["compiling"],
        "compiling, from the cache": again["compiling"],
        "graphs": compiled["graphs"],
        "graphs later": compiled["graphs later"],
        "apart": apart,
    }


def main() -> None:
    """Measure, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", metavar="ADJOINT")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    length, repeats = arguments.length, arguments.repeats
    if arguments.only:
        print(json.dumps(measure(arguments.only, arguments.compiled, length, repeats)))
        return
    results: dict[str, Any] = {"torch": torch.__version__, "machine": machine.facts()}
    results["ways"] = {}
    for way in WAYS:
        row = results["ways"][way] = compared(way, length, repeats)
        print(
            f"{way:22} {length} steps: eager {row['eager loop']:.2f} s, compiled "
            f"{row['compiled loop']:.2f} s; compiling {row['compiling']:.1f} s, with a full cache "
            f"{row['compiling, from the cache']:.1f} s; {row['graphs']} graphs, "
            f"{row['graphs later']} more for more steps; apart by {row['apart']:.0e}",
            flush=True,
        )
        RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
