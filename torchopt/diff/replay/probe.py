"""The first step, watched: what it closes over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchopt.base import tree
from torchopt.base.values import describe
from torchopt.diff.replay import watch
from torchopt.diff.replay.alike import Version, versions_of
from torchopt.diff.replay.loop import Loop, called
from torchopt.diff.replay.random_state import Autocast, RandomState
from torchopt.diff.replay.visible import names_in


@dataclass
class Watched:
    """What one step has told."""

    consts: list[Tensor]
    given: list[Any]  # leaves of the carry
    leaves: list[Any]
    y: list[Any]
    calls: int  # of autograd in the step
    keeps_outside: bool
    results_differ: list[bool]
    before: RandomState  #: The random states before the step.
    after: RandomState  #: Those after it.
    read: list[Tensor] = field(default_factory=list)  #: What it reads from outside.
    replaces: bool = False  #: Whether one of ``consts`` was computed from another.
    versions: list[Version] = field(default_factory=list)  #: Of all that it reads from outside.


class Once(NamedTuple):
    """A step that was taken once."""

    results: tuple[list[Any], list[Any]]  #: The leaves of the carry, and those of ``y``.
    seen: watch.Watch
    start: list[Any]  #: The leaves of the carry that it was given.
    given: list[Tensor]  #: All tensors that it was given.


def look(
    loop: Loop,
    devices: list[int],
    functional: bool,
    random: RandomState | None = None,
    at: tuple[list[Any], int] | None = None,
    known: Sequence[Tensor] = (),
) -> Watched:
    """Take the first step once, with a graph, watching what it reads; or the one at a place.

    Args:
        loop: The loop.
        devices: The GPUs whose random states count.
        functional: Whether levels of torch.func are open.
        random: A state that may be the present one, to be shared then.
        at: The leaves before a step, and which one it is.
        known: What earlier steps have read.

    Raises:
        ValueError: If it changes a tensor in place, or closes over tensors of which one was
            computed from another, and reads one where nobody can see it.
    """
    random = RandomState.now(devices, random)
    start = watch.newest_node()
    first, seen, leaves_given, given = one_step(loop, functional, at)
    after = RandomState.now(devices, random)
    _refuse_changes(loop, seen, given, random)
    inside = {id(t) for t in given}
    outside = [t for t in seen.read.values() if watch.may_have_derivative(t)]
    outside = [t for t in outside if id(t) not in inside]
    if not functional:  # what an unseen operation of the step has made has a newer node
        outside = [t for t in outside if watch.is_older(t, start)]
    old = set(map(id, known))
    if functional or any(t.grad_fn is not None for t in outside if id(t) not in old):
        # what an unseen operation of the step has made is another object each time
        random.put_back()
        again = one_step(loop, functional, at).seen
        outside = [t for t in outside if id(t) in again.read]
    random.put_back()
    leaves, y = first
    if functional:
        return Watched(outside, leaves_given, leaves, y, 0, False, [], random, after)
    results = [x for x in leaves if isinstance(x, Tensor)]
    outputs = [*results, *(t for t in y if isinstance(t, Tensor))]
    recorded = [t for t in outputs if t.requires_grad]
    consts, alone = watch.reached(recorded, given, outside, start)
    pair = watch.depends(consts)
    if pair is not None and at is None:
        random.put_back()
        _refuse_unseen(loop, consts, pair)
        random.put_back()
        alone = False
    differ = [t.requires_grad for t in results]
    differ += [isinstance(t, Tensor) and t.requires_grad for t in y if t is not None]
    replaces = pair is not None
    told = consts, leaves_given, leaves, y, seen.calls, alone, differ
    others = [t for t in seen.read.values() if id(t) not in inside]
    versions = versions_of(others, seen.versions)
    return Watched(*told, random, after, outside, replaces, versions)


def _refuse_unseen(loop: Loop, consts: list[Tensor], pair: tuple[Tensor, Tensor]) -> None:
    """Refuse tensors that depend on each other, if others cannot be read in their place.

    Raises:
        ValueError: Naming two.
    """
    others = [t.detach().requires_grad_() for t in consts]
    with watch.Substituted(consts, others):
        (leaves, y), _, _, given = one_step(loop, functional=False)
    outputs = [t for t in (*leaves, *y) if isinstance(t, Tensor) and t.requires_grad]
    if {id(t) for t in watch.reached(outputs, given, others)[0]} <= set(map(id, others)):
        return
    names = names_in(loop.step)
    shown = [_called(t, names) for t in pair]
    raise ValueError(
        f"The step closes over {shown[0]} and over {shown[1]}, from which it was computed, and "
        "replaying cannot tell their derivatives apart: a hand-written autograd.Function is "
        "given one of them. Put it into the carry, and return it unchanged."
    )


def _own(x: Any, functional: bool, fixed: bool = False) -> Any:
    """Return what a watched step is given instead of a tensor."""
    if not isinstance(x, Tensor):
        return x
    if functional:
        return x.clone()
    if fixed:
        return x.detach().clone()
    if x.is_floating_point() or x.is_complex():
        return x.detach().requires_grad_().clone()  # no leaf: autograd guards these itself
    return x.detach().clone()


def _has_derivative(x: Any) -> bool:
    return isinstance(x, Tensor) and watch.may_have_derivative(x)


def one_step(loop: Loop, functional: bool, at: tuple[list[Any], int] | None = None) -> Once:
    """Take the first step, watched."""
    leaves, index = (loop.start, 0) if at is None else at
    fixed = {i for i in loop.unchanged if not _has_derivative(loop.start[i])}
    start = [_own(x, functional, i in fixed) for i, x in enumerate(leaves)]
    row = [None if x is None else _own(x[index], functional) for x in loop.xs]
    x = tree.unflatten(loop.xs_spec, row)
    seen = watch.Watch()
    with torch.enable_grad(), Autocast().again(), seen:
        result = loop.step(tree.unflatten(loop.spec, start), x)
    given = [t for t in (*start, *row) if isinstance(t, Tensor)]
    return Once(loop.results(result), seen, start, given)


def _refuse_changes(
    loop: Loop, seen: watch.Watch, given: Sequence[Tensor], random: RandomState
) -> None:
    changed = seen.changed()
    if not changed:
        return
    seen.writes.undo()
    random.put_back()
    names = names_in(loop.step)
    at = {id(t): i for i, t in enumerate(given)}
    paths = [p for p, x in zip(loop.paths, loop.start) if isinstance(x, Tensor)]
    shown = []
    for tensor in changed:
        place = at.get(id(tensor), len(paths))
        if place < len(paths):
            shown.append(called(tree.dotted(paths[place]), "its carry"))
        elif id(tensor) in at:
            shown.append("its x")
        else:
            shown.append(_called(tensor, names))
    raise ValueError(
        f"The step changes {', '.join(shown)} in place, so that it cannot be taken again. Let it "
        "change a clone() and return that in the carry (buffers of a module: "
        "torch.func.functional_call with detach().clone() of them)."
    )


def _called(tensor: Tensor, names: dict[int, str]) -> str:
    name = names.get(id(tensor))
    return f"{name!r}" if name else f"a tensor ({describe(tensor)})"
