"""The steps of a loop in a row, from the first to the last."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from torchopt.diff.replay.job import Job
from torchopt.diff.replay.later import look_again
from torchopt.diff.replay.random_state import RandomState
from torchopt.diff.replay.records import Point
from torchopt.diff.replay.repeatable import note_end
from torchopt.diff.replay.store import Carry, Store
from torchopt.diff.replay.turn import Turn
from torchopt.diff.replay.watcher import Watcher


def sweep(
    job: Job,
    tensors: Sequence[Tensor],
    point: Point,
    xs: Sequence[Tensor],
    consts: Sequence[Tensor],
    length: int,
    keep: tuple[Store, Sequence[int]] | None = None,
    watcher: Watcher | None = None,
    turn: Turn | None = None,
) -> tuple[list[Any], list[list[Any]]]:
    """Take steps; return the last leaves and each step's ``y``.

    Nothing is recorded but the steps of ``turn``. Carries before the steps of ``keep`` are put into
    its store; ``watcher`` is told of the loop itself.
    """
    leaves, rows, random, first = job.leaves(tensors, point), [], point.random, 0
    kept, begun = set(keep[1]) if keep else set(), None
    looks: set[int] = set()
    noted = 0
    if watcher is not None:
        begun, job.begun = job.begun, None
        noted = job.schedule(length).parts(0, length)[1]  # the second derivative ends there too
        # a run that goes on in another process may not take these steps there
        if job.checks_end and watcher.store is None:
            looks = {1, length - 1} - {0}
    if watcher is not None and (reached := watcher.start_forward(job)) is not None:
        first, leaves, rows, random = reached.step, reached.leaves, reached.rows, reached.random
        random.put_back()
    for t in range(first, length):
        if keep and t in kept:
            random = RandomState.now(job.devices, random)
            keep[0].put(t, Carry(list(leaves), random))
            job.held.update(map(id, leaves))
        if begun is not None and t == 0:
            leaves, y = begun.from_here(leaves)
            if begun.watched:
                note_end(job, 1, leaves, y, watched=True)
        elif turn is not None and t >= turn.first:
            leaves, y = turn.take(job, leaves, xs, t, t in looks)
        elif t in looks:
            leaves, y = look_again(job, leaves, xs, consts, t)
        else:
            leaves, y = job.advance(leaves, job.x(xs, t), consts)
        rows.append(y)
        if t + 1 == noted < length:
            note_end(job, noted, leaves)
        if watcher is not None:
            watcher.forward(job, t + 1, leaves, rows)
    return leaves, rows
