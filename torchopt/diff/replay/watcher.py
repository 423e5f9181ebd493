"""Who is told of every step that a replayed loop takes, forwards and backwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from torchopt.diff.replay.random_state import RandomState
from torchopt.diff.replay.store import Store


# What they are told of: a Job and a Back, which import this file.
Job = Any
Back = Any


@dataclass
class Reached:
    """Where the first sweep of an earlier process got to."""

    step: int
    leaves: list[Any]
    rows: list[list[Any]]
    random: RandomState


class Watcher:
    """Is told of steps, and may know of those of an earlier process. This one does nothing."""

    #: Where the first sweep keeps its carries, if not in a store like those of later ones.
    store: Store | None = None

    def start_forward(self, job: Job) -> Reached | None:
        """Return where to go on from, if not from the start."""

    def forward(self, job: Job, step: int, leaves: Sequence[Any], rows: list[list[Any]]) -> None:
        """Take note that so many steps have been taken."""

    def start_backward(
        self, back: Back, cotangents: Sequence[Tensor | None], last: bool
    ) -> int | None:
        """Return the step that an earlier process has come back to; it has filled in ``back``.

        ``last`` says whether this pass uses up the carries that are kept.
        """

    def backward(self, step: int, back: Back, whole: bool) -> None:
        """Take note that the derivative has come back through this step.

        ``whole`` says whether one could go on from here: no other step has been recorded.
        """

    def end_backward(self) -> None:
        """Take note that the backward pass is over."""


class Several(Watcher):
    """Tells several; the first may know of an earlier process."""

    def __init__(self, first: Watcher, *others: Watcher) -> None:
        self.first, self.others = first, others
        self.store = first.store

    def start_forward(self, job: Job) -> Reached | None:
        """Ask the first."""
        return self.first.start_forward(job)

    def forward(self, job: Job, step: int, leaves: Sequence[Any], rows: list[list[Any]]) -> None:
        """Tell all."""
        for watcher in (self.first, *self.others):
            watcher.forward(job, step, leaves, rows)

    def start_backward(
        self, back: Back, cotangents: Sequence[Tensor | None], last: bool
    ) -> int | None:
        """Ask the first."""
        return self.first.start_backward(back, cotangents, last)

    def backward(self, step: int, back: Back, whole: bool) -> None:
        """Tell all."""
        for watcher in (self.first, *self.others):
            watcher.backward(step, back, whole)

    def end_backward(self) -> None:
        """Tell all."""
        for watcher in (self.first, *self.others):
            watcher.end_backward()


#: What is called with "forward" or "backward", how many steps are done, and how many there are.
Report = Callable[[str, int, int], Any]


class Told(Watcher):
    """Tells a function how far a loop has got."""

    def __init__(self, report: Report, length: int) -> None:
        self.report, self.length = report, length

    def forward(self, job: Job, step: int, leaves: Sequence[Any], rows: list[list[Any]]) -> None:
        """Tell how many steps have been taken."""
        self.report("forward", step, self.length)

    def backward(self, step: int, back: Back, whole: bool) -> None:
        """Tell how many steps have been gone back through."""
        self.report("backward", self.length - step, self.length)


class Bar:
    """Shows progress in the terminal by rich; one bar for each direction.

    Raises:
        ImportError: If rich is not there.
    """

    _shown: Any = None

    def __init__(self) -> None:
        try:
            from rich import progress  # of the extra "progress"
        except ImportError as error:
            raise ImportError(
                "progress=True draws its bar with rich, which is not installed: pip install "
                '"torchopt[progress]", or give a function progress(direction, done, total).'
            ) from error
        self._new = lambda: progress.Progress(
            progress.TextColumn("{task.description:>8}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
        )
        self._task: Any = None
        self._direction = ""

    def __call__(self, direction: str, done: int, total: int) -> None:
        """Move the bar."""
        if direction != self._direction or self._shown is None:
            self._close()
            self._direction, self._shown = direction, self._new()
            self._task = self._shown.add_task(direction, total=total)
            self._shown.start()
        self._shown.update(self._task, completed=done)
        if done == total:
            self._close()

    def _close(self) -> None:
        if self._shown is not None:
            self._shown.stop()
            self._shown = None

    def __del__(self) -> None:  # a loop that an error has ended
        self._close()
