"""What the table is made of: cases, which are measured, and rows, which are claimed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Case:
    """One piece of work that several sides do, each in its own process.

    Attributes:
        name: How the table calls it.
        workload: The file in ``benchmarks`` whose ``problem(**options)`` makes the numbers, and the
            function of a side that does the work with them.
        options: What the workload's ``problem`` takes.
        checks: Name of a comparison -> the options that it changes. In each, the results of all
            sides are compared with those of ``torchopt`` before anything is timed.
        check_calls: How often the work is done before its result is compared.
        repeats: How often the work is done within one timing. With more than one there is also a
            call before that does not count: a process that has waited for the others starts with
            cold caches, which is not what is measured.
        timed: Whether the work is timed; otherwise it returns lists of numbers, by name.
        needs_gpu: Whether the work needs a CUDA device.
    """

    name: str
    workload: str
    options: Mapping[str, Any]
    checks: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    check_calls: int = 1
    repeats: int = 1
    timed: bool = True
    needs_gpu: bool = False


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: a ratio of the times of two sides, or a number of one side.

    Attributes:
        key: What ``--only`` takes.
        case: What is measured.
        over: The side whose time is divided, or whose number is shown.
        under: The side whose time it is divided by; ``None`` shows the number itself.
        target: What the ratio is to reach. ``None`` marks a limit: what the ratio would be if the
            updates cost nothing.
        at_most: Whether the target is an upper bound; otherwise it is a lower one.
        factor: The ratio of times is multiplied by it: the work that ``under`` does for each unit
            of the work of ``over``, where the two differ.
        number: Which of the numbers that the work returns is shown, where ``under`` is ``None``.
        unit: What is written behind the number.
    """

    key: str
    case: Case
    over: str
    under: str | None
    target: float | None
    at_most: bool = False
    factor: float = 1.0
    number: str = ""
    unit: str = ""

    @property
    def sides(self) -> tuple[str, ...]:
        """The sides that must be measured for this row."""
        return (self.over,) if self.under is None else (self.over, self.under)

    @property
    def against(self) -> str:
        """What is divided by what."""
        return " / ".join(self.sides)

    def met_by(self, value: float) -> bool | None:
        """Whether a value reaches the target, if there is one."""
        if self.target is None:
            return None
        return value <= self.target if self.at_most else value >= self.target

    def renamed(self, old: str, new: str) -> Row:
        """Return the same row about another copy of a side."""
        over, under = (new if name == old else name for name in (self.over, self.under))
        return dataclasses.replace(self, over=over, under=under)
