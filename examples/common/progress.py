"""Progress as lines, for output that is not a terminal: a pipe, a file, the log of a job."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


EVERY = 10.0  # seconds between two lines


class Heartbeat:
    """Calls a function every ten seconds from a thread, for as long as the block is not left.

    Args:
        beat: The function. A long call into PyTorch does not hold it up.
        wait: Waits for so many seconds, or until the end; returns whether it is the end.
    """

    def __init__(
        self, beat: Callable[[], None], wait: Callable[[float], bool] | None = None
    ) -> None:
        self._beat = beat
        self._end = threading.Event()
        self._wait = wait or self._end.wait
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._wait(EVERY):
            self._beat()

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()


@contextlib.contextmanager
def said_in_lines(
    what: str,
    show: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
    wait: Callable[[float], bool] | None = None,
) -> Iterator[None]:
    """Say what is being done, at once and then every ten seconds.

    Args:
        what: It in words.
        show: Prints a line.
        clock: Tells the time in seconds.
        wait: See :class:`Heartbeat`.
    """
    began = clock()
    show(what)
    with Heartbeat(lambda: show(f"{what}, {_minutes(clock() - began)} elapsed"), wait):
        yield


@dataclass
class _Task:
    description: str
    total: float
    completed: float
    figures: str
    began: float
    at_first: float  # completed then, by a run that is resumed
    told: bool = False


class LineProgress:
    """Has what the examples use of rich's ``Progress``, and prints a line every ten seconds.

    Args:
        show: Prints a line.
        clock: Tells the time in seconds.
        wait: See :class:`Heartbeat`.
    """

    def __init__(
        self,
        show: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], bool] | None = None,
    ) -> None:
        self._show, self._clock = show, clock
        self._tasks: list[_Task] = []
        self._lock = threading.Lock()
        self._heartbeat = Heartbeat(self._beat, wait)

    def __enter__(self) -> LineProgress:
        self._heartbeat.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._heartbeat.__exit__(*error)

    def add_task(
        self, description: str, *, total: float, completed: float = 0, figures: str = ""
    ) -> int:
        """Add something that takes a while, and return its number."""
        now = self._clock()
        self._tasks.append(_Task(description, total, completed, figures, now, completed))
        return len(self._tasks) - 1

    def update(self, task: int, *, advance: float = 0, **changes: Any) -> None:
        """Change ``completed``, ``description`` or ``figures``; at its end a task says so."""
        one = self._tasks[task]
        with self._lock:
            for name, value in {"completed": one.completed + advance, **changes}.items():
                setattr(one, name, value)
            if one.completed >= one.total and not one.told:
                one.told = True
                self._show(self._line(one))

    def advance(self, task: int, advance: float = 1) -> None:
        """Add to what is completed."""
        self.update(task, advance=advance)

    def _beat(self) -> None:
        with self._lock:
            unfinished = [task for task in self._tasks if not task.told]
            if unfinished:
                self._show(self._line(unfinished[-1]))

    def _line(self, task: _Task) -> str:
        elapsed = self._clock() - task.began
        done, left = task.completed - task.at_first, task.total - task.completed
        parts = [f"{task.description.strip()} {task.completed:g}/{task.total:g}"]
        parts += [", ".join(task.figures.split("  "))] if task.figures else []
        parts += [f"{_minutes(elapsed)} elapsed"]
        parts += [f"{_minutes(elapsed / done * left)} left"] if done > 0 and left > 0 else []
        return ", ".join(parts)


def _minutes(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
