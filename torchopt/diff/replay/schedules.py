r"""Which carries are kept, and which steps are taken again: pure functions with exact counts.

A backward pass needs the carry before each step, from the last step to the first. A schedule says
which ones the first sweep keeps, and then, as a list of actions, how those in between are made
again. ``Plan`` counts the actions of the same list that is later run.

For :math:`T` steps, with all carries that are kept at a time and all steps that are taken once
more without a graph (each step is also recorded once):

======================  ========================  ==================================================
schedule                carries kept              steps taken once more
======================  ========================  ==================================================
every step              :math:`T`                 0
every n steps           :math:`T/n + n - 1`       :math:`T - T/n`
... recorded together   :math:`T/n`               0
binomial, c kept        :math:`c`                 about :math:`(r - 1) T`, where r is the least
                                                  number with :math:`\binom{c + r}{c} \ge T`
======================  ========================  ==================================================

Reference:
    Griewank and Walther, Algorithm 799: Revolve, ACM Transactions on Mathematical Software 2000.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple


Kind = Literal["load", "advance", "keep", "drop", "record", "pull"]


class Action(NamedTuple):
    """One thing that a backward pass does; there is one current carry, and there are kept ones.

    ``load``: go to the kept carry ``step``. ``advance``: take ``step``, without a graph.
    ``keep``: keep the current carry, which is that before ``step``. ``drop``: forget it.
    ``record``: take ``step`` with a graph of its own. ``pull``: differentiate it, and let that go.
    """

    kind: Kind
    step: int


@dataclass(frozen=True)
class Plan:
    """What a schedule costs, before anything runs.

    Example:
        >>> from torchopt.diff import Checkpointed
        >>> print(Checkpointed("sqrt").plan(256, carry_bytes=4_000_000))
        256 steps: 0 taken once more, at most 64 carries kept, 256.0 MB, and the graphs of 4 steps
    """

    steps: int  #: The length of the loop.
    advances: int  #: Steps taken once more without a graph.
    carries: int  #: The most carries that are kept at one time, that of the start included.
    bytes: int  #: What these take.
    graphs: int = 1  #: The most steps that are recorded at one time.

    def __str__(self) -> str:
        text = (
            f"{self.steps} steps: {self.advances} taken once more, at most {self.carries} carries "
            f"kept, {size(self.bytes)}"
        )
        return text if self.graphs == 1 else f"{text}, and the graphs of {self.graphs} steps"


def size(number: int) -> str:
    """Return a number of bytes as one reads it."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= scale:
            return f"{number / scale:.1f} {unit}"
    return f"{number} bytes"


class Schedule(abc.ABC):
    """Says what to keep and what to compute again, for one length.

    ``graphs`` is how many steps are recorded before they are differentiated.
    """

    def __init__(self, length: int, graphs: int = 1) -> None:
        self.length, self.graphs = length, min(graphs, length)

    @abc.abstractmethod
    def kept(self) -> list[int]:
        """Return the steps before which the first sweep keeps the carry; 0 is the first."""

    @abc.abstractmethod
    def backward(self) -> Iterator[Action]:
        """Yield the actions of the backward pass."""

    @abc.abstractmethod
    def parts(self, low: int, high: int) -> list[int]:
        """Return where to divide an interval of steps of which derivatives are derived again."""

    def turning(self) -> int:
        """Return how many steps, the last ones, are recorded before the first is pulled."""
        recorded = 0
        for kind, _ in self.backward():
            if kind == "pull":
                break
            recorded += kind == "record"
        return recorded

    def plan(self, carry_bytes: int) -> Plan:
        """Count the actions."""
        kept = most = len(self.kept())
        advances = recorded = graphs = 0
        for kind, _ in self.backward():
            advances += kind == "advance"
            kept += (kind == "keep") - (kind == "drop")
            recorded += (kind == "record") - (kind == "pull")
            most, graphs = max(most, kept), max(graphs, recorded)
        return Plan(self.length, advances, most, most * carry_bytes, graphs)

    def _last(self, low: int, high: int) -> Iterator[Action]:
        """Yield how to go back through a few steps of which the first carry is kept."""
        yield Action("load", low)
        yield Action("drop", low)
        for step in range(low, high):
            yield Action("record", step)
        for step in range(high - 1, low - 1, -1):
            yield Action("pull", step)


class Segments(Schedule):
    """Keep every n-th carry; refill one segment at a time."""

    def __init__(self, length: int, every: int, graphs: int = 1) -> None:
        super().__init__(length, graphs)
        self.every = every

    def kept(self) -> list[int]:
        """Return the steps before which the first sweep keeps the carry."""
        return list(range(0, self.length, self.every))

    def backward(self) -> Iterator[Action]:
        """Yield the actions of the backward pass."""
        for low in reversed(self.kept()):
            high = min(low + self.every, self.length)
            starts = range(low, high, self.graphs)
            if len(starts) > 1:
                yield Action("load", low)
            for start in starts[1:]:
                for step in range(start - self.graphs, start):
                    yield Action("advance", step)
                yield Action("keep", start)
            for start in reversed(starts):
                yield from self._last(start, min(start + self.graphs, high))

    def parts(self, low: int, high: int) -> list[int]:
        """Return where to divide an interval."""
        every = self.every if high - low > self.every else 1
        return [*range(low, high, every), high]


class Binomial(Schedule):
    """Keep a given number of carries, and take as few steps again as that allows (revolve)."""

    def __init__(self, length: int, slots: int, graphs: int = 1) -> None:
        super().__init__(length, graphs)
        self.slots = min(slots, length)

    def kept(self) -> list[int]:
        """Return the steps before which the first sweep keeps the carry."""
        return [low for low, _ in self._first_gaps()]

    def _first_gaps(self) -> list[tuple[int, int]]:
        """Return, from left to right, the gaps that the first sweep leaves: start, slots."""
        low, slots, gaps = 0, self.slots, [(0, self.slots)]
        while slots > 1 and self.length - low > self.graphs:
            low += self._advance(self.length - low, slots)
            slots -= 1
            gaps.append((low, slots))
        return gaps

    def backward(self) -> Iterator[Action]:
        """Yield the actions of the backward pass."""
        gaps = self._first_gaps()
        ends = [*(low for low, _ in gaps[1:]), self.length]
        for (low, slots), high in zip(reversed(gaps), reversed(ends)):
            yield from self._gap(low, high, slots)

    def _gap(self, low: int, high: int, slots: int) -> Iterator[Action]:
        if high - low <= self.graphs:
            yield from self._last(low, high)
            return
        if slots == 1:
            yield from self._from_one(low, high)
            return
        middle = low + self._advance(high - low, slots)
        yield Action("load", low)
        for step in range(low, middle):
            yield Action("advance", step)
        yield Action("keep", middle)
        yield from self._gap(middle, high, slots - 1)
        yield from self._gap(low, middle, slots)

    def _from_one(self, low: int, high: int) -> Iterator[Action]:
        """Yield how to go back where no other carry can be kept than the first."""
        end = high
        while end - low > self.graphs:
            start = end - self.graphs
            yield Action("load", low)
            for step in range(low, start):
                yield Action("advance", step)
            for step in range(start, end):
                yield Action("record", step)
            for step in range(end - 1, start - 1, -1):
                yield Action("pull", step)
            end = start
        yield from self._last(low, end)

    def _advance(self, length: int, slots: int) -> int:
        """Return how far to go before the next carry is kept, in whole parts."""
        return _advance(-(-length // self.graphs), slots) * self.graphs

    def parts(self, low: int, high: int) -> list[int]:
        """Return where to divide an interval."""
        return [low, (low + high) // 2, high]


def _advance(length: int, slots: int) -> int:
    r"""Return where, of so many steps, the next carry is best kept, with so many slots left.

    With :math:`\binom{s + r - 1}{s} < n \le \binom{s + r}{s}` the left part must be reversible
    in r - 1 repetitions with s slots, and the right one in r repetitions with s - 1.
    """
    r = repetitions(length, slots)
    left = math.comb(slots + r - 1, slots)
    right = math.comb(slots + r - 2, slots - 1)
    return max(1, min(left, length - right))


def repetitions(length: int, slots: int) -> int:
    """Return the least r with ``comb(slots + r, slots) >= length``."""
    r = 0
    while math.comb(slots + r, slots) < length:
        r += 1
    return r


def log_slots(length: int) -> int:
    """Return how many carries are about the logarithm of a length."""
    return max(1, length - 1).bit_length() + 1


def make(every: int | str, slots: int | None, length: int, graphs: int | None = None) -> Schedule:
    """Return the schedule of this name."""
    if every == "sqrt":
        root = max(1, math.isqrt(length))
        if graphs is not None:
            return Segments(length, root, graphs)
        # the graph of a step takes some sixteen times what a carry takes, so there are fewer
        segment = -(-root // 4)
        return Segments(length, segment, segment)
    if isinstance(every, int):
        return Segments(length, every, graphs or 1)
    if slots is None:
        slots = log_slots(length) * (2 if every == "revolve" else 1)
    return Binomial(length, slots, graphs or 1)
