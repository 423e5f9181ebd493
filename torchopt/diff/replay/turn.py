"""The last steps of a loop, recorded in its first sweep: the backward pass begins with them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from torchopt.base.torch_internals import nothing_is_compiled
from torchopt.diff.replay.alike import note_end, versions_of
from torchopt.diff.replay.job import Job, cut
from torchopt.diff.replay.random_state import RandomState
from torchopt.diff.replay.schedules import Schedule
from torchopt.diff.replay.segment import Segment
from torchopt.diff.replay.watch import Watch, is_older, newest_node, reached, requires_grad


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
            note_end(job, step, job.tensors(leaves))
        row, segment = job.row(xs, step), self.segment
        if segment is not None and look and not self._is_known(job, segment, row):
            segment = self.segment = None
        elif segment is not None and not look:
            segment.take(row)
        if segment is None:
            if look:
                return job.look_again(leaves, xs, job.consts, step)
            return job.advance(leaves, job.x(xs, step), job.consts)
        found = cut(segment.leaves), cut(segment.ys[-1])
        job.held.update(map(id, (*found[0], *found[1])))  # the graph may have saved them
        return found

    def _is_known(self, job: Job, segment: Segment, row: Sequence[Tensor]) -> bool:
        """Take a step, and return whether it reads nothing that the first one does not."""
        random, given = RandomState.now(job.devices), [*segment.leaves, *row]
        with Watch() as seen:
            outputs = [t for t in segment.step(row) if t is not None]
        inside = {*map(id, given), *map(id, segment.own)}
        others = {key: t for key, t in seen.read.items() if key not in inside}
        differ = [isinstance(t, Tensor) and t.requires_grad for t in outputs]
        recorded = [t for t, d in zip(outputs, differ) if d]
        ends, alone = reached(recorded, segment.own, job.consts, self.begin)
        known = set(map(id, job.consts))
        # what an unseen operation of the step has made has a newer node
        read = [k for k, t in others.items() if requires_grad(t) and is_older(t, self.begin)]
        if not known.issuperset([*read, *map(id, ends)]) or (seen.calls and not job.calls):
            random.put_back()
            return False
        job.versions += versions_of(others.values(), seen.versions)
        job.keeps_outside |= alone
        job.results_differ = [a or b for a, b in zip(job.results_differ, differ)]
        return True

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
