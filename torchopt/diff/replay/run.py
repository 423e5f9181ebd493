"""Run a loop so that its derivative replays it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchopt.base.frozen_function import frozen
from torchopt.base.torch_internals import (
    TransformType,
    get_interpreter_stack,
    in_forward_mode,
    nothing_is_compiled,
    peek_interpreter_stack,
)
from torchopt.diff.replay.job import Job
from torchopt.diff.replay.loop import Loop
from torchopt.diff.replay.nodes import apply
from torchopt.diff.replay.probe import look
from torchopt.diff.replay.programs import Steps
from torchopt.diff.replay.random_state import Autocast, RandomState, cuda_devices
from torchopt.diff.replay.records import Begun, Point
from torchopt.diff.replay.repeatable import check_repeatable
from torchopt.diff.replay.schedules import Schedule
from torchopt.diff.replay.store import Store
from torchopt.diff.replay.visible import unread
from torchopt.diff.replay.watch import may_have_derivative
from torchopt.diff.replay.watcher import Watcher


def is_recorded(loop: Loop) -> bool:
    """Whether a graph may be recorded now, so that there is something to save."""
    if not torch.is_grad_enabled():
        return False
    levels = get_interpreter_stack()
    if levels is None:
        return True
    tensors = [t for t in (*loop.start, *loop.xs) if isinstance(t, Tensor)]
    return any(level.key() == TransformType.Grad for level in levels) or any(
        may_have_derivative(t) for t in tensors
    )


def refuse_levels(adjoint: object) -> None:
    """Refuse what a node of the graph cannot serve.

    Raises:
        RuntimeError: In a function that torch.compile compiles, and where forward mode is at work
            in a way whose results would be wrong.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(
            f"unroll(..., adjoint={type(adjoint).__name__}(...)) cannot be compiled as a whole, "
            "for it decides itself what is computed again. Compile the step, "
            "unroll(torch.compile(step), ...), or the whole loop with adjoint=Unrolled()."
        )
    levels = get_interpreter_stack() or ()
    forward = sum(level.key() == TransformType.Jvp for level in levels)
    if forward > 1:
        raise RuntimeError(
            f"unroll(..., adjoint={adjoint}) inside two levels of forward mode would have wrong "
            "derivatives, for PyTorch loses one of them at a hand-written node of the graph. "
            "Use adjoint=Unrolled(), or torch.func.jacrev for one of the two."
        )
    if not levels and in_forward_mode():
        raise RuntimeError(
            f"unroll(..., adjoint={adjoint}) knows no dual numbers of torch.autograd.forward_ad. "
            "Use torch.func.jvp, or adjoint=Unrolled()."
        )


def replayed(
    loop: Loop,
    adjoint: object,
    schedule: Callable[[int], Schedule],
    new_store: Callable[[], Store],
    check: bool = True,
    watcher: Callable[[], Watcher] = Watcher,
) -> tuple[list[Any], list[Any]]:
    """Run a loop of which one node of the graph remembers a few carries."""
    if not torch.is_grad_enabled():
        return loop.plain()
    refuse_levels(adjoint)
    if not is_recorded(loop):
        return loop.plain()
    told = watcher()
    job = prepared(loop, schedule, new_store, check, later=told.store is None)
    job.watcher, job.watched = told, None  # which would hold the graph of a step
    job.checks_end = check and not job.functional
    if job.functional:
        job.refused = {id(t): t for t in unread(loop.step, job.consts)}
    if not job.functional and not any(t.requires_grad for t in (*job.carry, *job.xs, *job.consts)):
        return loop.plain()
    point = Point(job.rest(loop.start), RandomState.now(job.devices))
    steps = Steps(job, point, loop.length, first=True)
    if not job.functional:  # first, for a later step may read what the node has to know of
        steps.take([t.detach() for t in (*job.carry, *job.xs, *job.consts)])
    results = apply(steps, [*job.carry, *job.xs, *job.consts])
    loop.step = frozen(loop.step)  # for the way back, at which its variables may have other values
    return results_of(job, steps, results)


def results_of(job: Job, steps: Steps, results: list[Any]) -> tuple[list[Any], list[Any]]:
    """Return the leaves of the last carry and of ``ys``, from what the node of a loop returned."""
    assert steps.end is not None
    n, rest = len(job.carry_at), iter(results[len(job.carry_at) :])
    ys = [None if like is None else next(rest) for like in job.loop.y_likes]
    return job.leaves(results[:n], steps.end), ys


def prepared(
    loop: Loop,
    schedule: Callable[[int], Schedule],
    new_store: Callable[[], Store],
    check: bool = True,
    random: RandomState | None = None,
    later: bool = False,
) -> Job:
    """Watch the first step, and return what is needed to replay it and its successors.

    ``random`` is a state that may be the present one, to be shared then. ``later`` if it may be
    left to the backward pass to find out that the step cannot be repeated.
    """
    functional = peek_interpreter_stack() is not None
    devices = cuda_devices([*loop.start, *loop.xs])
    watched = look(loop, devices, functional, random)
    job = Job(
        loop=loop,
        consts=watched.consts,
        functional=functional,
        calls=watched.calls,
        keeps_outside=watched.keeps_outside,
        devices=devices,
        autocast=Autocast(),
        schedule=schedule,
        new_store=new_store,
        results_differ=watched.results_differ,
        replaces=functional or watched.replaces,
        versions=watched.versions,
    )
    job.watched = watched
    if check and later and _is_compared_later(job):
        # each later step starts from a carry that is kept, as this one has made it
        job.begun, job.exact = Begun.of(watched), True
    elif check:
        leaves = [x.detach() if isinstance(x, Tensor) else x for x in loop.start]
        xs = [x.detach() for x in job.xs]

        def run() -> tuple[list[Any], list[Any]]:
            return job.advance(list(leaves), job.x(xs, 0), job.consts)

        results = watched.leaves, watched.y
        found = check_repeatable(loop, results, run, devices, watched.after)
        (first, y), after, job.exact = found
        if not functional:
            job.begun = Begun(leaves, first, y, after)
    return job


#: The steps of a loop so long that to know at once is worth one more.
_LONG = 64


def _is_compared_later(job: Job) -> bool:
    """Whether the first step is taken only once before the backward pass, which compares it.

    Where all carries are kept a further step costs most, and nothing is computed from a step
    that has been taken again.
    """
    length = job.loop.length
    if job.functional or length >= _LONG or not nothing_is_compiled():
        return False
    return job.schedule(length).kept() == list(range(length))
