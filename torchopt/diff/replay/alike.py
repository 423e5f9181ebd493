"""Whether a step depends on what the first one does: what would be wrong is refused."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from torchopt.base import tree
from torchopt.base.values import describe
from torchopt.diff.replay import watch
from torchopt.diff.replay.loop import called
from torchopt.diff.replay.random_state import RandomState
from torchopt.diff.replay.visible import names_in


Job = Any  # which imports this file
#: A tensor, and what its version was.
Version = tuple["weakref.ref[Tensor]", int]
#: Takes a step with a graph; returns its results, and what it was given.
Taken = Callable[[], tuple[list[Any], list[Tensor]]]


def refuse_unknown(job: Job, outputs: list[Any], given: list[Tensor], again: Taken) -> None:
    """Refuse a step whose graph goes back to a tensor from outside that the first did not read.

    Raises:
        RuntimeError: Naming the tensor.
    """
    if not (tensors := _unknown(job, outputs, given)):
        return
    random = RandomState.now(job.devices)
    found = {id(t) for t in _unknown(job, *again())}  # what a step makes itself is another one
    random.put_back()
    tensors = [t for t in tensors if id(t) in found]
    if tensors:
        raise unknown_error(job, tensors[0])


def refuse_dependent(job: Job, outputs: Sequence[Any]) -> None:
    """Refuse a leaf that the first step gave no derivative, and this one does.

    Raises:
        RuntimeError: Naming it.
    """
    given = [x for x in outputs if x is not None]
    for k, (x, differs) in enumerate(zip(given, job.results_differ)):
        if differs or not isinstance(x, Tensor) or not x.requires_grad:
            continue
        n = len(job.carry_at)
        names = [tree.dotted(job.loop.paths[i]) for i in job.carry_at]
        names += [name for name, y in zip(job.loop.y_names, outputs[n:]) if y is not None]
        raise RuntimeError(
            f"In the first step {called(names[k], 'the carry' if k < n else 'y')} is a constant, "
            "and in a later one it depends on what is differentiated by, so that its derivative "
            "would be missing. If it is only looked at, detach() it; otherwise let it depend on "
            "that in the first step too, if only times zero, or use adjoint=Unrolled()."
        )


def unknown_error(job: Job, tensor: Tensor) -> RuntimeError:
    """Return what is said of a tensor that the first step does not read."""
    name = names_in(job.loop.step).get(id(tensor))
    shown = f"{name!r}" if name else f"a tensor ({describe(tensor)})"
    return RuntimeError(
        f"A step depends on {shown}, which requires grad and which the first step does not read, "
        "so that nothing would be differentiated by it. Put it into the carry and return it "
        "unchanged, let every step read it, or use adjoint=Unrolled()."
    )


def _unknown(job: Job, outputs: list[Any], given: list[Tensor]) -> list[Tensor]:
    recorded = [t for t in outputs if isinstance(t, Tensor) and t.requires_grad]
    consts = [] if job.replaces else job.consts
    known = set(map(id, consts))
    return [t for t in watch.reached(recorded, given, consts)[0] if id(t) not in known]


def versions_of(read: Iterable[Tensor], versions: Mapping[int, int]) -> list[Version]:
    """Return what tells whether tensors have been written to; none is kept alive by it."""
    found = [t for t in read if id(t) in versions and not t.is_inference()]
    return [(weakref.ref(t), versions[id(t)]) for t in found]


def refuse_written(job: Job, when: str) -> None:
    """Refuse what would be read with other values when steps are taken again.

    Raises:
        RuntimeError: Naming the tensor.
    """
    for reference, version in job.versions:
        tensor = reference()
        if tensor is not None and tensor._version != version:
            name = names_in(job.loop.step).get(id(tensor))
            shown = f"{name!r}" if name else f"a tensor ({describe(tensor)})"
            raise RuntimeError(
                f"The steps read {shown}, which was changed in place {when}, so that they cannot "
                "be taken again. Give them a clone() of it, or let it be part of the carry."
            )
