"""The last steps of a loop, recorded in its first sweep: the backward pass begins with them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from torchopt.base.torch_internals import nothing_is_compiled
from torchopt.diff.replay.job import Job, cut
from torchopt.diff.replay.later import is_known, look_again
from torchopt.diff.replay.repeatable import note_end
from torchopt.diff.replay.schedules import Schedule
from torchopt.diff.replay.segment import Segment
from torchopt.diff.replay.watch import newest_node


class Turn:
    """What the backward pass would record first, and then need not take again.

    At the highest point of its memory this is there anyway. Before that it is extra, so only the
    latest of all loops keeps it: where many are differentiated together, such as one for each task,
    the others take these steps again.

    Args:
        first: The first of the steps.
    """

    def __init__(self, first: int) -> None:
        self.first = first
        self.segment: Segment | None = None
        self.begin = 0  # the number of a node that is older than its own

    @staticmethod
    def of(job: Job, schedule: Schedule) -> Turn | None:
        """Return that of a loop, or ``None`` if it has none."""
        _let_go()
        first = schedule.length - schedule.turning()
        # the first step has been taken already; and what is compiled would run as it was written
        if first < 1 or not job.checks_end or job.replaces or not nothing_is_compiled():
            return None
        turn = Turn(first)
        _LATEST[:] = [weakref.ref(turn)]
        return turn

    def take(
        self, job: Job, leaves: list[Any], xs: Sequence[Tensor], step: int, look: bool
    ) -> tuple[list[Any], list[Any]]:
        """Take a step; ``look`` if it may tell what the first one has not told."""
        if step == self.first:
            self.begin = newest_node()
            self.segment = Segment(job, leaves, job.consts, create_graph=False)
            note_end(job, step, leaves)
        row, segment = job.row(xs, step), self.segment
        if segment is not None and look and not is_known(job, segment, row, self.begin):
            segment = self.segment = None
        elif segment is not None and not look:
            segment.take(row)
        if segment is None:
            if look:
                return look_again(job, leaves, xs, job.consts, step)
            return job.advance(leaves, job.x(xs, step), job.consts)
        found = cut(segment.leaves), cut(segment.ys[-1])
        job.held.update(map(id, (*found[0], *found[1])))  # the graph may have saved them
        return found

    def taken(self) -> Segment | None:
        """Return the steps, once."""
        segment, self.segment = self.segment, None
        return segment


#: The loop that keeps its last steps; one for all threads.
_LATEST: list[weakref.ref[Turn]] = []


def _let_go() -> None:
    """Let the loop before take its last steps again."""
    for reference in _LATEST:
        turn = reference()
        if turn is not None:
            turn.taken()
    _LATEST.clear()
