"""Compare sides that live in processes of their own: interleaved rounds and ratios of medians."""

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
        same_work: Whether its results are those of the other sides.
    """

    name: str
    module: str
    python: Path
    path: str | None = None
    same_work: bool = True

    @property
    def installed(self) -> bool:
        """Whether its environment exists."""
        return self.python.exists()


class WorkerError(RuntimeError):
    """A side failed; the message is its traceback."""

    def __init__(self, side: str, message: str) -> None:
        super().__init__(message)
        self.side = side


class WorkerProcess:
    """A side's process, asked one thing at a time."""

    def __init__(self, side: Side, threads: int) -> None:
        self.side = side
        command = [str(side.python), "-I", "-W", "ignore", str(WORKER), side.module, str(threads)]
        self._process = subprocess.Popen(
            command + ([side.path] if side.path else []),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(threads),
        )
        self.facts = self.ask("hello")

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send a request and wait for its reply.

        Raises:
            WorkerError: If the side raised, or its process has ended.
        """
        name = self.side.name
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended; reading says so
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(name, f"The worker of {name} ended without a reply to {do!r}.")
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(name, f"The side {name} failed at {do!r}:\n{reply['error']}")
        return reply

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait(timeout=30)


def environment(threads: int) -> dict[str, str]:
    """Return the environment in which every library uses this number of threads.

    Libraries read it when they load. ``NPROC`` is what XLA sizes its pool by; its flags
    ``intra_op_parallelism_threads`` and ``xla_cpu_multi_thread_eigen`` change nothing in jax 0.10.
    How threads wait (``OMP_WAIT_POLICY``) is left as users have it: ``PASSIVE`` steadies a busy
    machine, but makes ``torch.optim.Adam(fused=True)`` over 100 small tensors ten times slower.
    """
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NPROC")
    return {**os.environ, **dict.fromkeys(names, str(threads))}


def interleave(
    workers: Mapping[str, WorkerProcess], rounds: int, warmup: int, repeats: int = 1, seed: int = 0
) -> dict[str, dict[str, list[float]]]:
    """Time every side once per round, in a new random order each round; by clock, then side.

    The machine's speed drifts; within a round it is about the same for all sides. The order is
    shuffled so that no side always follows the same neighbour.
    """
    shuffled = random.Random(seed)
    order = list(workers)
    seconds: dict[str, dict[str, list[float]]] = {
        clock: {name: [] for name in order} for clock in CLOCKS
    }
    for number in range(-warmup, rounds):
        shuffled.shuffle(order)
        for name in order:
            taken = workers[name].ask("time", repeats=repeats)
            if number >= 0:
                for clock in CLOCKS:
                    seconds[clock][name].append(taken[clock])
    return seconds


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if self.low == self.high:
            return f"{self.value:.3g}"
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


def ratio_of_medians(
    over: Sequence[Sequence[float]],
    under: Sequence[Sequence[float]],
    factor: float = 1.0,
    resamples: int = 2000,
) -> Estimate:
    """Return the ratio of the medians of two sides over all rounds, with a bootstrap interval.

    The seconds come as one list per restart. Restarts are drawn first and rounds within them
    second, since what a process has laid out in memory makes all its rounds alike; and a round is
    drawn for both sides together, since the machine was equally fast for both.
    """
    pairs = [list(zip(a, b)) for a, b in zip(over, under)]

    def ratio(rounds: list[tuple[float, float]]) -> float:
        first, second = zip(*rounds)
        return factor * statistics.median(first) / statistics.median(second)

    drawn = random.Random(0)
    ratios = []
    for _ in range(resamples):
        rounds: list[tuple[float, float]] = []
        for restart in drawn.choices(pairs, k=len(pairs)):
            rounds += drawn.choices(restart, k=len(restart))
        ratios.append(ratio(rounds))
    return _estimate(ratio([pair for restart in pairs for pair in restart]), ratios)


def median_of(values: Sequence[float], resamples: int = 2000) -> Estimate:
    """Return a median with its bootstrap interval."""
    drawn = random.Random(0)
    medians = [statistics.median(drawn.choices(values, k=len(values))) for _ in range(resamples)]
    return _estimate(statistics.median(values), medians)


def _estimate(value: float, resampled: list[float]) -> Estimate:
    ordered, count = sorted(resampled), len(resampled)
    return Estimate(value, ordered[int(0.025 * count)], ordered[int(0.975 * count) - 1])
