"""What the runs of the examples share: folder, finished work, intervals."""

from __future__ import annotations

import contextlib
import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import EXTRA
from common.checkpoints import check_settings, write_atomically
from common.endings import plain_endings as plain_endings
from common.endings import refuse
from common.lock import FolderInUseError, FolderLock
from common.options import device as device
from common.options import non_negative_float as non_negative_float
from common.options import parser as parser
from common.options import positive_float as positive_float
from common.options import positive_int as positive_int
from common.options import two_or_more as two_or_more


def prepare_folder(
    folder: Path, markers: Sequence[Path], resume: bool, overwrite: bool
) -> FolderLock:
    """Make the output folder and lock it, before time is spent.

    Args:
        folder: The folder.
        markers: Files in it of which one exists if it holds a run, of whatever example.
        resume: Whether to continue that run; if there is none, a line says that one is started.
        overwrite: Whether to replace that run.

    Returns:
        The lock, to be kept as long as the run writes there.

    Raises:
        SystemExit: If it cannot be written to, is in use by another run, or holds a run and neither
            option was given.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "writable", lambda path: path.write_text(""))
        (folder / "writable").unlink()
        lock = FolderLock(folder)
    except OSError as error:
        in_the_way = isinstance(error, (FileExistsError, NotADirectoryError))
        reason = "there is a file in its place" if in_the_way else error.strerror
        refuse(f"Cannot write to the output folder {folder}: {reason}.", error)
    except FolderInUseError as error:
        refuse(str(error), error)
    held = any(marker.exists() for marker in markers)
    if resume and not held:  # perhaps another folder was meant, and a run takes minutes
        print(f"{folder} holds no run yet; starting one.", flush=True)
    if held and not (resume or overwrite):
        lock.release()
        refuse(
            f"{folder} holds a run already. Pass --resume to continue it, --overwrite "
            "to start over, or another --output."
        )
    return lock


class Jobs:
    """Independent parts of a run (a method and a seed, say), the finished ones kept on disk.

    Metrics are JSON lines in ``metrics.jsonl``. A job's lines are written when it has ended, so
    that an interrupted run loses at most the job it was in.

    Args:
        folder: The output folder; :func:`prepare_folder` is called on it.
        settings: What determines the numbers; a run is resumed with the same ones only.
        resume: Whether to keep the jobs that are finished.
        overwrite: Whether to replace the run in the folder.

    Raises:
        SystemExit: If the folder cannot be used.
        ValueError: If the run in it had other settings.
    """

    def __init__(
        self, folder: Path, settings: dict[str, Any], resume: bool, overwrite: bool
    ) -> None:
        self.folder, self.path = folder, folder / "metrics.jsonl"
        # a checkpoint without metrics is of another example
        markers = [self.path, folder / "results.json", folder / "checkpoint.pt"]
        self._lock = prepare_folder(folder, markers, resume, overwrite)
        self.rows: list[dict[str, Any]] = []
        settings = json.loads(json.dumps(settings))  # tuples become lists, as in the file
        self._head = {"settings": settings}
        if resume and self.path.exists():
            head, *self.rows = _whole_lines(self.path)
            check_settings(head["settings"], settings, self.path)
        self._write([self._head, *self.rows])

    def finished(self, **job: Any) -> bool:
        """Whether there are lines of this job."""
        return any(all(row.get(k) == v for k, v in job.items()) for row in self.rows)

    def run(
        self, job: dict[str, Any], work: Callable[[], Iterable[dict[str, Any]]]
    ) -> list[dict[str, Any]]:
        """Return the lines of a job, from the disk if it is finished.

        Args:
            job: What names it, such as ``{"method": "maml", "seed": 3}``; part of each line.
            work: Does it and returns its metrics.
        """
        if not self.finished(**job):
            self.rows += [{**job, **row} for row in work()]
            self._write([self._head, *self.rows])
        return [row for row in self.rows if all(row.get(k) == v for k, v in job.items())]

    def run_all(
        self,
        jobs: Sequence[dict[str, Any]],
        work: Callable[[dict[str, Any]], list[dict[str, Any]]],
        workers: int,
        ended: Callable[[dict[str, Any]], None],
    ) -> None:
        """Do the jobs that are not finished, several at once in processes of their own.

        Args:
            jobs: What names each.
            work: Does one and returns its metrics. Must be picklable for more workers than one.
            workers: How many are done at once; a single one is this process.
            ended: Called for each job when its lines are on the disk, in the order of ``jobs``.

        Raises:
            ImportError: If joblib is not installed.
        """
        try:
            from joblib import Parallel, delayed
        except ImportError as error:
            raise ImportError(f"Jobs in processes of their own need joblib: {EXTRA}") from error
        left = [job for job in jobs if not self.finished(**job)]
        pool = Parallel(n_jobs=workers, return_as="generator")
        results: Any = pool(delayed(work)(job) for job in left)  # a list for other `return_as`
        with contextlib.closing(results):  # an interrupted run ends its processes
            for job in jobs:
                self.run(job, lambda: next(results))
                ended(job)

    def save_results(self, results: dict[str, Any]) -> None:
        """Write ``results.json``: what the run gave, for the table of the examples."""
        text = json.dumps(results, indent=2) + "\n"
        write_atomically(self.folder / "results.json", lambda path: path.write_text(text))

    def _write(self, rows: Sequence[dict[str, Any]]) -> None:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_atomically(self.path, lambda path: path.write_text(text))


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    try:
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    except ValueError as error:  # of the text or of JSON
        raise ValueError(f"{path} is damaged ({error}); start over with --overwrite.") from error
    whole = all(isinstance(row, dict) for row in rows)
    if not whole or not rows or not isinstance(rows[0].get("settings"), dict):
        raise ValueError(f"{path} is not of this example; start over with --overwrite.")
    return rows


def counted(count: int, what: str) -> str:
    """Return a number of things in words: 1 seed, 2 seeds."""
    return f"{count} {what}{'s' * (count != 1)}"


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with half the width of its 95 % interval (Student's t)."""

    mean: float
    half_width: float
    count: int

    def __str__(self) -> str:
        if math.isnan(self.half_width):
            return f"{self.mean:.3g}"
        return f"{self.mean:.3g} ± {self.half_width:.2g}"

    def __format__(self, spec: str) -> str:
        """Return both in one format; without an interval, the mean."""
        if not spec:
            return str(self)
        if math.isnan(self.half_width):
            return format(self.mean, spec)
        return f"{self.mean:{spec}} ± {self.half_width:{spec}}"

    def above(self, bound: float) -> bool | None:
        """Whether the whole interval lies above a bound; unknown if there is none."""
        if math.isnan(self.half_width):
            return None
        return self.mean - self.half_width > bound

    def below(self, bound: float) -> bool | None:
        """Whether the whole interval lies below a bound; unknown if there is none."""
        if math.isnan(self.half_width):
            return None
        return self.mean + self.half_width < bound


#: 97.5 % quantiles of Student's t for 1 to 30 degrees of freedom, from any statistics table.
T_QUANTILES = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


def estimate(values: Sequence[float]) -> Estimate:
    """Return mean and 95 % interval; the interval of a single value is unknown (nan)."""
    count = len(values)
    if count < 2:
        return Estimate(values[0], float("nan"), count)
    quantile = T_QUANTILES[count - 2] if count <= 31 else 1.960
    half_width = quantile * statistics.stdev(values) / count**0.5
    return Estimate(statistics.fmean(values), half_width, count)
