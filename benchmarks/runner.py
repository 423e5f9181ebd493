"""Measure a case: start its sides, compare their results, time them in turn."""

from __future__ import annotations

import dataclasses
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.pairing import CLOCKS, Side, WorkerError, WorkerProcess, interleave
from benchmarks.registry import OURS, how_to_install
from benchmarks.rows import Case


#: Why a row that needs a device has no figures.
NO_GPU = "no GPU here"


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much is measured."""

    rounds: int = 12
    restarts: int = 3
    warmup: int = 2
    threads: int = 2


def measure(case: Case, sides: Sequence[Side], effort: Effort) -> dict[str, dict[str, Any]]:
    """Return the figures of every side, or why it has none; a side that fails is left out."""
    if case.needs_gpu and not gpu_here():
        return {side.name: {"absent": NO_GPU} for side in sides}
    figures = {
        side.name: {"absent": f"is not installed: {how_to_install(side.name)}"}
        for side in sides
        if not side.installed
    }
    remaining = [side for side in sides if side.installed]
    while remaining:
        try:
            return {**figures, **_measure(case, remaining, effort)}
        except WorkerError as error:
            print(error, file=sys.stderr)
            figures[error.side] = {"absent": "fails here; its traceback is above"}
            remaining = [side for side in remaining if side.name != error.side]
    return figures


def _measure(case: Case, sides: Sequence[Side], effort: Effort) -> dict[str, dict[str, Any]]:
    """Return the figures of every side.

    The rounds are spread over fresh processes: how a process has laid out its memory alone makes
    one and the same side up to 20 % faster or slower for as long as that process lives.
    """
    figures: dict[str, dict[str, Any]] = {}
    for restart in range(effort.restarts if case.timed else 1):
        with started(sides, effort.threads) as workers:
            if restart == 0:
                figures = {name: dict(worker.facts) for name, worker in workers.items()}
                for name, differences in compare(workers, case).items():
                    figures[name]["relative_difference"] = differences
            for worker in workers.values():
                worker.ask("build", workload=case.workload, options=dict(case.options))
            if case.timed:
                _time(workers, case, effort, restart, figures)
            else:
                for name, worker in workers.items():
                    figures[name].update(worker.ask("numbers"))
    _add_medians(figures)
    return figures


@contextmanager
def started(sides: Sequence[Side], threads: int) -> Iterator[dict[str, WorkerProcess]]:
    """Yield a fresh process for every side, and end them at last."""
    workers: dict[str, WorkerProcess] = {}
    try:
        for side in sides:
            workers[side.name] = WorkerProcess(side, threads)
        yield workers
    finally:
        for worker in workers.values():
            worker.close()


def compare(workers: Mapping[str, WorkerProcess], case: Case) -> dict[str, dict[str, float]]:
    """Return how far each side's result is from that of this library, for each check."""
    same_work = {name: w for name, w in workers.items() if w.side.same_work}
    differences: dict[str, dict[str, float]] = {name: {} for name in same_work if name != OURS}
    if OURS not in same_work:
        return differences
    for check, changed in case.checks.items():
        results = {}
        with tempfile.TemporaryDirectory() as folder:
            for name, worker in same_work.items():
                path = str(Path(folder) / "result.npz")
                options = {**case.options, **changed}
                worker.ask("build", workload=case.workload, options=options)
                worker.ask("result", path=path, calls=case.check_calls)
                with np.load(path) as arrays:
                    results[name] = [arrays[key] for key in arrays.files]
        for name, of_side in differences.items():
            of_side[check] = relative_difference(results[name], results[OURS])
    return differences


def relative_difference(own: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> float:
    """Return the norm of the difference of two results over the norm of the second."""
    flat, wanted = (
        np.concatenate([array.astype("float64").ravel() for array in arrays])
        for arrays in (own, other)
    )
    return float(np.linalg.norm(flat - wanted) / np.linalg.norm(wanted))


def gpu_here() -> bool:
    """Whether torch finds a CUDA device."""
    import torch  # only here: the harness itself computes nothing

    return torch.cuda.is_available()


def _time(
    workers: Mapping[str, WorkerProcess],
    case: Case,
    effort: Effort,
    restart: int,
    figures: dict[str, dict[str, Any]],
) -> None:
    """Add the seconds of one restart to the figures."""
    rounds = -(-effort.rounds // effort.restarts)
    timed = interleave(workers, rounds, effort.warmup, case.repeats, seed=restart)
    for clock in CLOCKS:
        for name, seconds in timed[clock].items():
            of_clock = figures[name].setdefault(clock, {"seconds": []})
            of_clock["seconds"].append([float(f"{s:.5g}") for s in seconds])


def _add_medians(figures: Mapping[str, dict[str, Any]]) -> None:
    for of_side in figures.values():
        for clock in CLOCKS:
            if clock in of_side:
                every = [s for restart in of_side[clock]["seconds"] for s in restart]
                of_side[clock]["median_ms"] = statistics.median(every) * 1000
