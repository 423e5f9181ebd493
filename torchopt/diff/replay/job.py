"""A loop that is to be replayed: what goes into its graph, and how to run some of its steps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchopt.base.torch_internals import (
    levels_of_batched_grads,
    outside_of_batched_grads,
    peek_interpreter_stack,
    temporarily_clear_interpreter_stack,
)
from torchopt.diff.replay.alike import Version, unknown_error
from torchopt.diff.replay.loop import Loop
from torchopt.diff.replay.random_state import AS_IT_IS, Autocast
from torchopt.diff.replay.records import Begun, Point
from torchopt.diff.replay.repeatable import End
from torchopt.diff.replay.schedules import Schedule
from torchopt.diff.replay.store import Store
from torchopt.diff.replay.watch import Substituted, may_have_derivative
from torchopt.diff.replay.watcher import Watcher


@dataclass
class Job:
    """A loop, and what watching its first step has told.

    Tensors travel through the graph in flat lists: those of the carry, those of ``xs``, and those
    that the step closes over (``consts``).
    """

    loop: Loop
    consts: list[Tensor]
    functional: bool  #: Whether levels of torch.func are open.
    calls: int  #: How often the step calls autograd itself; then it needs a graph in each run.
    keeps_outside: bool  #: Whether a graph from outside is part of that of each step.
    devices: list[int]
    autocast: Autocast
    schedule: Callable[[int], Schedule]
    new_store: Callable[[], Store]
    results_differ: list[bool]  #: Whether a carry's tensor, or a leaf of ys, has a derivative.
    watcher: Watcher = field(default_factory=Watcher)  #: Is told of the loop itself, not of parts.
    replaces: bool = False  #: Whether others are read instead of ``consts``.
    watched: Any = None  #: The first step, as it was watched.
    begun: Begun | None = None
    held: set[int] = field(default_factory=set)  #: Tensors that have been put into a store.
    refused: dict[int, Tensor] = field(default_factory=dict)  #: Which no step may read.
    #: Whether it makes no difference if a step is taken with a graph or without one.
    exact: bool = False
    versions: list[Version] = field(default_factory=list)
    checks_end: bool = False  #: Whether steps have to end where they did the first time.
    ends: dict[int, End] = field(default_factory=dict)  #: Where some did, by that of the next.

    def __post_init__(self) -> None:
        self.carry_at = [i for i, x in enumerate(self.loop.start) if isinstance(x, Tensor)]
        self.xs_at = [i for i, x in enumerate(self.loop.xs) if isinstance(x, Tensor)]
        self.carry = [self.loop.start[i] for i in self.carry_at]
        self.xs = [self.loop.xs[i] for i in self.xs_at]
        self.carry_differs = [
            is_smooth(x) and (i not in self.loop.unchanged or may_have_derivative(x))
            for i, x in zip(self.carry_at, self.carry)
        ]
        self.xs_differ = [is_smooth(x) and may_have_derivative(x) for x in self.xs]

    # Tensors and leaves ------------------------------------------------------------------------

    def tensors(self, leaves: Sequence[Any]) -> list[Tensor]:
        """Return the tensors among the leaves of a carry."""
        return [leaves[i] for i in self.carry_at]

    def rest(self, leaves: Sequence[Any]) -> list[Any]:
        """Return the other leaves of a carry, with ``None`` for tensors."""
        return [None if isinstance(x, Tensor) else x for x in leaves]

    def leaves(self, tensors: Sequence[Tensor], point: Point) -> list[Any]:
        """Return the leaves of a carry."""
        leaves = list(point.leaves)
        for i, tensor in zip(self.carry_at, tensors):
            leaves[i] = tensor
        return leaves

    def split(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Divide a flat list into carry, xs and what the step closes over; more may follow."""
        c, x = len(self.carry_at), len(self.xs_at)
        k = c + x + len(self.consts)
        return list(tensors[:c]), list(tensors[c : c + x]), list(tensors[c + x : k])

    def inputs(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Divide a flat list, with what a step reads instead of what it closes over.

        Unless others are read in their place these are the tensors themselves, whatever is given.
        """
        carry, xs, consts = self.split(tensors)
        return carry, xs, consts if self.replaces else self.consts

    def differs(self) -> list[bool]:
        """Return by which tensors of the flat list there are derivatives."""
        return [*self.carry_differs, *self.xs_differ, *(True for _ in self.consts)]

    def x(self, xs: Sequence[Tensor], index: int) -> Any:
        """Return the input of a step, from the tensors of ``xs``."""
        leaves: list[Any] = [None] * len(self.loop.xs)
        for i, x in zip(self.xs_at, xs):
            leaves[i] = x
        return self.loop.x(leaves, index)

    def row(self, xs: Sequence[Tensor], index: int) -> list[Tensor]:
        """Return the tensors of one step's input."""
        return [x[index] for x in xs]

    def from_row(self, row: Sequence[Tensor]) -> Any:
        """Return the input of a step, from its tensors."""
        return self.x([tensor[None] for tensor in row], 0)

    def at_its_level(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context without levels that map over cotangents only."""
        if self.functional or (peek_interpreter_stack() is None and not levels_of_batched_grads()):
            return AS_IT_IS
        return self._without_levels()

    @contextlib.contextmanager
    def _without_levels(self) -> Iterator[None]:
        with temporarily_clear_interpreter_stack(), outside_of_batched_grads():
            yield

    # Running -----------------------------------------------------------------------------------

    def reading(self, consts: Sequence[Tensor]) -> contextlib.AbstractContextManager[None]:
        """Return the context in which the step reads these tensors where it closes over others."""
        if self.replaces and (self.consts or self.refused):
            return self._instead(consts)
        return self.autocast.again()

    @contextlib.contextmanager
    def _instead(self, consts: Sequence[Tensor]) -> Iterator[None]:
        refuse = self._refuse if self.refused else None
        others = Substituted(self.consts, consts, (), refuse, self._is_refused)
        with self.autocast.again(), others:
            yield

    def _is_refused(self, tensor: Tensor) -> bool:
        return id(tensor) in self.refused

    def _refuse(self, tensor: Tensor) -> None:
        raise unknown_error(self, tensor)

    def advance(
        self, leaves: list[Any], x: Any, consts: Sequence[Tensor]
    ) -> tuple[list[Any], list[Any]]:
        """Take one step of which nothing is recorded."""
        if not self.calls:
            with torch.no_grad(), self.at_its_level(), self.reading(consts):
                return self.loop.take(leaves, x)
        with torch.enable_grad(), self.at_its_level(), self.reading(consts):
            for i, smooth in zip(self.carry_at, self.carry_differs):
                leaves[i] = leaves[i].detach().requires_grad_(smooth)
            carry, y = self.loop.take(leaves, x)
        return cut(carry), cut(y)


def is_smooth(tensor: Tensor) -> bool:
    """Whether there are derivatives by tensors of this dtype."""
    return tensor.is_floating_point() or tensor.is_complex()


def cut(leaves: Sequence[Any]) -> list[Any]:
    """Return leaves without their history."""
    return [x.detach() if isinstance(x, Tensor) else x for x in leaves]
