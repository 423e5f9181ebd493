"""Whether a step that is taken again gives the same values, bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from torchopt.base import tree
from torchopt.base.torch_internals import nothing_is_compiled
from torchopt.diff.replay.loop import Loop, called
from torchopt.diff.replay.random_state import RandomState
from torchopt.diff.replay.writes import by_rounding, same


Job = Any  # which imports this file
#: What a step gives: the leaves of the carry, and those of ``y``.
Results = tuple[list[Any], list[Any]]

_UNREPEATABLE = (
    "Does it draw from a torch.Generator of its own, from numpy or random, count its calls, or "
    "read the next batch? Put such things into the carry or xs, or differentiate with "
    "adjoint=Unrolled()."
)


# At the start ------------------------------------------------------------------------------------


def check_repeatable(
    loop: Loop,
    watched: Results,
    run: Callable[[], Results],
    devices: list[int],
    after: RandomState,
) -> tuple[Results, RandomState, bool]:
    """Take the first step again, and compare all bits.

    Return its results, the state after it (``after``, if that is the same), and whether a graph
    makes no difference.

    Raises:
        RuntimeError: If anything differs, naming the leaf.
    """
    random = RandomState.now(devices)
    try:
        first = run()
        after = RandomState.now(devices, after)
        difference = _difference(loop, first, watched)
        # what is watched runs as it was written, and later steps as they were compiled
        exact = difference is None and nothing_is_compiled()
        if difference is not None:  # with a graph and without it is not the same to the last bit:
            # by rounding, or because this step is another one
            difference = _difference(loop, first, watched, by_rounding)
            if difference is None:
                random.put_back()
                difference = _difference(loop, first, run())
    finally:
        random.put_back()
    if difference is not None:
        raise RuntimeError(
            f"The step gives another {difference} when it is taken again with the same carry, x "
            f"and random state, so it cannot be replayed. {_UNREPEATABLE}"
        )
    return first, after, exact


def _difference(
    loop: Loop, one: Results, two: Results, equal: Callable[[Any, Any], bool] = same
) -> str | None:
    for k, (x, y) in enumerate(zip((*one[0], *one[1]), (*two[0], *two[1]))):
        if not equal(x, y):
            return _named(loop, k)
    return None


def _named(loop: Loop, k: int) -> str:
    n = len(loop.paths)
    if k < n:
        return f"value of {called(tree.dotted(loop.paths[k]), 'the carry')}"
    return f"value of {called(loop.y_names[k - n], 'y')}"


# On the way back ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class End:
    """Where a step ended the first time.

    Attributes:
        values: The leaves of its carry, and those of its ``y`` where they count.
        versions: Those that the tensors had: what is written to afterwards is not compared.
        watched: Whether it was taken as it was watched, which may round otherwise.
    """

    values: list[Any]
    versions: list[int]
    watched: bool = False

    def difference(
        self, loop: Loop, found: Results, equal: Callable[[Any, Any], bool] = same
    ) -> str | None:
        """Return which leaf is another one now."""
        pairs = zip(self.values, self.versions, (*found[0], *found[1]))
        for k, (old, version, new) in enumerate(pairs):
            if _version(old) == version and not equal(old, new):
                return _named(loop, k)
        return None


def note_end(
    job: Job, step: int, leaves: Sequence[Any], y: Sequence[Any] = (), watched: bool = False
) -> None:
    """Remember where a step ended, by the number of the next, to be compared on the way back.

    What has no derivative may be buffers: BatchNorm writes to them without counting it.
    """
    if not job.checks_end or step in job.ends:
        return
    differ = iter(job.results_differ)
    values = [_held(x, next(differ)) if isinstance(x, Tensor) else x for x in leaves]
    values += [x if x is None else _held(x, next(differ)) for x in y]
    job.ends[step] = End(values, [_version(x) for x in values], watched)


def _held(x: Any, differs: bool) -> Any:
    if not isinstance(x, Tensor):
        return x
    return x.detach() if differs else x.clone()


def _version(x: Any) -> int:
    return x._version if isinstance(x, Tensor) else 0


def refuse_other_end(
    job: Job, step: int, found: Results, again: Callable[[], Results] | None = None
) -> None:
    """Refuse a step that does not end where it ended the first time, bit by bit.

    ``again`` takes it without a graph, as the first time, if a graph makes a difference. Where
    there is none, and it is not known that a graph makes no difference, rounding is none.

    Raises:
        RuntimeError: Naming the leaf.
    """
    end: End = job.ends[step + 1]
    difference = end.difference(job.loop, found)
    if difference is not None and again is not None:
        difference = end.difference(job.loop, again())
    rounds = end.watched if again is not None else not job.exact or _is_unchecked(job)
    if difference is not None and rounds:
        difference = end.difference(job.loop, found, by_rounding)
        if difference is None and again is not None:
            difference = _difference(job.loop, again(), again())
    if difference is not None:
        raise RuntimeError(
            f"Step {step + 1} of {job.loop.length} gives another {difference} when it is taken "
            "again for the backward pass. Has something changed that it reads, such as an "
            "attribute, or a tensor that was written to? Leave that as it was until the backward "
            f"pass is over, or give it to the steps in the carry or in xs. {_UNREPEATABLE}"
        )


def _is_unchecked(job: Job) -> bool:
    """Whether the first step was not taken a second time before the backward pass."""
    return 1 in job.ends and job.ends[1].watched
