"""Later steps, looked at: one may read what the first one does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from torchopt.base.torch_internals import nothing_is_compiled
from torchopt.diff.replay.alike import unknown_error, versions_of
from torchopt.diff.replay.job import Job, cut
from torchopt.diff.replay.probe import look
from torchopt.diff.replay.random_state import RandomState
from torchopt.diff.replay.segment import Segment
from torchopt.diff.replay.watch import Watch, depends, is_older, newest_node, reached, requires_grad


Taken = tuple[list[Any], list[Any]]


def look_again(
    job: Job, leaves: list[Any], xs: Sequence[Tensor], consts: Sequence[Tensor], index: int
) -> Taken:
    """Take a later step, and find out what the first one has not told.

    Raises:
        RuntimeError: If it reads a tensor from which another was computed that steps read.
    """
    random, begin = RandomState.now(job.devices), newest_node()
    segment = Segment(job, leaves, consts, create_graph=False)
    if not is_known(job, segment, job.row(xs, index), begin):
        return _looked(job, leaves, xs, consts, index)
    if goes_on(job):
        return cut(segment.leaves), cut(segment.ys[-1])
    random.put_back()
    return job.advance(leaves, job.x(xs, index), consts)


def goes_on(job: Job) -> bool:
    """Whether the next step may start from where one has ended that was watched."""
    return job.exact and nothing_is_compiled()  # what is watched runs as it was written


def is_known(job: Job, segment: Segment, row: Sequence[Tensor], begin: int) -> bool:
    """Take a step, and return whether it reads nothing that the first one does not.

    If it does, or changes something in place, all is as it was before; ``begin`` is the number of
    a node that is older than those of the segment.
    """
    random, given = RandomState.now(job.devices), [*segment.leaves, *row]
    with Watch() as seen:
        outputs = [t for t in segment.step(row) if t is not None]
    inside = {*map(id, given), *map(id, segment.own)}
    others = {key: t for key, t in seen.read.items() if key not in inside}
    differ = [isinstance(t, Tensor) and t.requires_grad for t in outputs]
    recorded = [t for t, d in zip(outputs, differ) if d]
    ends, alone = reached(recorded, segment.own, job.consts, begin)
    known = set(map(id, job.consts))
    # what an unseen operation of the step has made has a newer node
    read = [k for k, t in others.items() if requires_grad(t) and is_older(t, begin)]
    changed = seen.changed()
    if changed:
        seen.writes.undo()
    if changed or not known.issuperset([*read, *map(id, ends)]) or (seen.calls and not job.calls):
        random.put_back()
        return False
    job.versions += versions_of(others.values(), seen.versions)
    job.keeps_outside |= alone
    job.results_differ = [a or b for a, b in zip(job.results_differ, differ)]
    return True


def _looked(
    job: Job, leaves: list[Any], xs: Sequence[Tensor], consts: Sequence[Tensor], index: int
) -> Taken:
    """Take a step as the first one is watched, and let the loop know of what it reads."""
    seen = look(job.loop, job.devices, False, None, (leaves, index), job.consts)
    known = set(map(id, job.consts))
    new = [t for t in seen.consts if id(t) not in known]
    if new and not job.replaces and depends([*job.consts, *new]) is not None:
        raise unknown_error(job, new[0])
    job.consts = [*job.consts, *new]
    job.calls = max(job.calls, seen.calls)
    job.keeps_outside |= seen.keeps_outside
    job.versions += seen.versions
    job.results_differ = [a or b for a, b in zip(job.results_differ, seen.results_differ)]
    if not goes_on(job):
        return job.advance(leaves, job.x(xs, index), consts)
    seen.after.put_back()
    return cut(seen.leaves), cut(seen.y)
