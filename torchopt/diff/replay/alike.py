"""Whether a step that is taken again is the step that was taken: what would be wrong is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from torchopt.base import tree
from torchopt.base.values import describe
from torchopt.diff.replay import watch
from torchopt.diff.replay.loop import called
from torchopt.diff.replay.random_state import RandomState
from torchopt.diff.replay.writes import by_rounding


Job = Any  # which imports this file
#: Takes a step with a graph; returns its results, and what it was given.
Taken = Callable[[], tuple[list[Any], list[Tensor]]]


def refuse_unknown(job: Job, outputs: list[Any], given: list[Tensor], again: Taken) -> None:
    """Refuse a step whose graph goes back to a tensor from outside that the first did not read.

    Raises:
        RuntimeError: Naming the tensor.
    """
    if not (unknown := _unknown(job, outputs, given)):
        return
    random = RandomState.now(job.devices)
    found = {id(t) for t in _unknown(job, *again())}  # what a step makes itself is another one
    random.put_back()
    unknown = [t for t in unknown if id(t) in found]
    if not unknown:
        return
    raise unknown_error(job, unknown[0])


def unknown_error(job: Job, tensor: Tensor) -> RuntimeError:
    """Return what is said of a tensor that the first step does not read."""
    name = watch.names_in(job.loop.step).get(id(tensor))
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


def note_end(job: Job, results: Sequence[Tensor]) -> None:
    """Remember where the last step ended, to be compared on the way back."""
    if job.checks_end:
        tensors = [t.detach() for t in results]
        job.end = [(t, t._version) for t in tensors]


def refuse_other_end(job: Job, leaves: Sequence[Any]) -> None:
    """Refuse a last step that does not end where it ended the first time.

    Raises:
        RuntimeError: Naming the leaf.
    """
    names = [tree.dotted(job.loop.paths[i]) for i in job.carry_at]
    for name, new, (old, version) in zip(names, job.tensors(leaves), job.end):
        if old._version == version and not by_rounding(old, new):
            raise RuntimeError(
                f"The last step gives another value of {called(name, 'the carry')} when it is "
                "taken again for the backward pass: it reads something that has changed since, "
                "such as an attribute, or a tensor that was written to. Leave that as it was "
                "until the backward pass is over, or give it to the steps in the carry or in xs."
            )
