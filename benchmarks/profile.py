"""Show where the time of one piece of work goes: ``python -m benchmarks.profile update``.

Python's own profiler over this library's side, in this process: what each function takes by itself,
as a share of the whole. The profiler slows down calls of Python functions, so shares of those are
upper bounds. For times and ratios run ``python -m benchmarks``.
"""

from __future__ import annotations

import argparse
import cProfile
import importlib
import pstats
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.claims import ROWS
from benchmarks.install_peers import ROOT
from benchmarks.registry import OURS, SIDES
from benchmarks.rows import Case


CASES: dict[str, Case] = {
    row.key: row.case for row in ROWS if row.case.timed and not row.case.needs_gpu
}


def prepared(case: Case, side: str) -> Callable[[], Any]:
    """Return a piece of work that has been done a few times."""
    module = importlib.import_module(f"benchmarks.sides.{SIDES[side].module}")
    problem = importlib.import_module(f"benchmarks.{case.workload}").problem(**case.options)
    work = getattr(module, case.workload)(problem)
    for _ in range(3):
        work()
    return work


def page_faults(work: Callable[[], Any], calls: int) -> float | None:
    """Return how many pages of memory a piece of work gets afresh, where the system counts them."""
    try:
        import resource
    except ImportError:
        return None  # Windows

    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(calls):
        work()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / calls


def profile(work: Callable[[], Any], calls: int) -> list[tuple[str, float, float]]:
    """Return, by the time that it takes itself: function, calls per piece of work, milliseconds."""
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(calls):
        work()
    profiler.disable()
    entries = pstats.Stats(profiler).stats.items()  # pyright: ignore[reportAttributeAccessIssue]
    found = [
        (_name(*place), count / calls, 1e3 * own / calls)
        for place, (_, count, own, _, _) in entries
    ]
    return sorted(found, key=lambda entry: -entry[2])


def _name(file: str, line: int, function: str) -> str:
    if file == "~":  # not of Python
        return function.removeprefix("<").removesuffix(">")
    path = Path(file)
    known = path.relative_to(ROOT) if path.is_relative_to(ROOT) else Path(*path.parts[-3:])
    return f"{known.as_posix()}:{line} {function}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the profile of one side of one piece of work."""
    own = [name for name, side in SIDES.items() if side.python == SIDES[OURS].python]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.profile", description=__doc__.splitlines()[0]
    )
    parser.add_argument("work", choices=CASES)
    parser.add_argument("--side", choices=own, default=OURS)
    parser.add_argument("--calls", type=int, default=50, help="how often the work is done")
    parser.add_argument("--lines", type=int, default=25, help="how many functions are shown")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    work = prepared(CASES[options.work], options.side)
    faults, found = page_faults(work, options.calls), profile(work, options.calls)
    total = sum(milliseconds for _, _, milliseconds in found)
    print(f"{CASES[options.work].name}, {options.side}: {total:.3g} ms under the profiler")
    if faults is not None:
        print(f"{faults:.0f} page faults")
    print(f"{'share':>6} {'ms':>8} {'calls':>7}  function")
    for name, count, milliseconds in found[: options.lines]:
        share = milliseconds / total
        print(f"{share:6.1%} {milliseconds:8.3f} {count:7.4g}  {name}")


if __name__ == "__main__":
    main()
