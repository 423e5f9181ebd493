"""What is remembered of a moment between steps, of the first step, and of a node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from torchopt.diff.replay.probe import Watched
from torchopt.diff.replay.random_state import RandomState


@dataclass
class Point:
    """A moment between two steps, without the tensors: other leaves, and the random states."""

    leaves: list[Any]  # None where a tensor stands
    random: RandomState


@dataclass
class Begun:
    """The first step, as it was watched or taken to be compared: the sweep goes on from there."""

    given: list[Any]
    leaves: list[Any]
    y: list[Any]
    random: RandomState
    watched: bool = False  #: Whether the backward pass is to compare it.

    @staticmethod
    def of(watched: Watched) -> Begun:
        """Return the first step as it was watched, without its graph."""
        handed_on = set(map(id, watched.given))
        leaves, y = (
            [x.detach() if isinstance(x, Tensor) and id(x) not in handed_on else x for x in part]
            for part in (watched.leaves, watched.y)
        )
        return Begun(watched.given, leaves, y, watched.after, watched=True)

    def from_here(self, leaves: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """Return its results, as they would be of these leaves: what it hands on is theirs."""
        own = {id(old): new for old, new in zip(self.given, leaves)}
        self.random.put_back()
        return [own.get(id(x), x) for x in self.leaves], [own.get(id(x), x) for x in self.y]


@dataclass
class Scope:
    """What a node of the graph has to know of the tensors that it is given.

    They are some of its own (``carry_at`` and ``xs_at`` say how many), and those closed over.
    """

    consts: list[Tensor]
    functional: bool  #: Whether levels of torch.func are open.
    keeps_outside: bool  #: Whether a graph from outside is part of its own.
    devices: list[int]
    carry_at: list[int]
    xs_at: list[int]
    replaces: bool  #: Whether other tensors are read instead of those closed over.
