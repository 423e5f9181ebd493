"""Compare sides that live in processes of their own: interleaved rounds and paired ratios."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


#: Time by the clock; processor time of all threads, which others on the machine disturb less.
CLOCKS = ("wall", "cpu")
WORKER = Path(__file__).resolve().parent / "worker.py"


@dataclasses.dataclass(frozen=True)
class Side:
    """One library under measurement.

    Attributes:
        name: How the table calls it.
        module: Its file in ``benchmarks/sides``.
        python: The interpreter of its environment.
        path: A folder whose packages it uses instead of the installed ones, or ``None``.
    """

    name: str
    module: str
    python: Path
    path: str | None = None

    @property
    def installed(self) -> bool:
        """Whether its environment exists."""
        return self.python.exists()


class WorkerError(RuntimeError):
    """A side failed; the message is its traceback."""


class WorkerProcess:
    """A side's process, asked one thing at a time."""

    def __init__(self, side: Side, threads: int) -> None:
        self.side = side
        # Libraries read these when they load; set_num_threads follows in the worker.
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        if threads > 1:
            # Threads that spin while they wait are ruinous on a busy machine: measured 16 ms for a
            # product of 64x64 matrices that takes 9 us with one thread.
            env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        command = [str(side.python), "-I", "-W", "ignore", str(WORKER), side.module]
        self._process = subprocess.Popen(
            command + ([side.path] if side.path else []),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )
        self.facts = self.ask("hello", threads=threads)

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send a request and wait for its reply.

        Raises:
            WorkerError: If the side raised, or its process has ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended; reading says so
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(f"The worker of {self.side.name} ended without a reply to {do!r}.")
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(f"The side {self.side.name} failed at {do!r}:\n{reply['error']}")
        return reply

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait(timeout=30)


def interleave(
    workers: Mapping[str, WorkerProcess], rounds: int, warmup: int, seed: int = 0
) -> dict[str, dict[str, list[float]]]:
    """Time every side once per round, in a new random order each round; by clock, then side.

    The machine's speed drifts; within a round it is about the same for all sides, so ratios are
    taken there. The order is shuffled so that no side always follows the same neighbour.
    """
    shuffled = random.Random(seed)
    order = list(workers)
    seconds: dict[str, dict[str, list[float]]] = {
        clock: {name: [] for name in order} for clock in CLOCKS
    }
    for number in range(-warmup, rounds):
        shuffled.shuffle(order)
        for name in order:
            taken = workers[name].ask("step")
            if number >= 0:
                for clock in CLOCKS:
                    seconds[clock][name].append(taken[clock])
    return seconds


@dataclasses.dataclass(frozen=True)
class Ratio:
    """Median of the ratios within rounds, and a 95 % interval of that median."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def paired_ratio(
    own: Sequence[float], reference: Sequence[float], resamples: int = 2000, seed: int = 0
) -> Ratio:
    """Return the paired ratio of one side to another, with a bootstrap interval over rounds."""
    ratios = [a / b for a, b in zip(own, reference)]
    drawn = random.Random(seed)
    medians = sorted(
        statistics.median(drawn.choices(ratios, k=len(ratios))) for _ in range(resamples)
    )
    low, high = medians[int(0.025 * resamples)], medians[int(0.975 * resamples) - 1]
    return Ratio(statistics.median(ratios), low, high)
