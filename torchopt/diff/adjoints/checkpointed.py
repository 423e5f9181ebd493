"""Differentiate a loop by keeping some carries and computing its steps again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Union

from torchopt.diff.replay import schedules
from torchopt.diff.replay.loop import Loop
from torchopt.diff.replay.run import replayed
from torchopt.diff.replay.store import CpuStore, MemoryStore


STORES = {"memory": MemoryStore, "cpu": CpuStore}


@dataclass(frozen=True)
class Checkpointed:
    """Differentiate a loop by keeping some carries and computing its steps again."""

    every: Union[int, str] = 1
    slots: int | None = None
    store: str = "memory"

    def plan(self, length: int, carry_bytes: int) -> schedules.Plan:
        """Return what a loop of this length costs, before anything runs."""
        return self.schedule(length).plan(carry_bytes)

    def schedule(self, length: int) -> schedules.Schedule:
        """Return which carries are kept, and what is done in which order."""
        return schedules.make(self.every, self.slots, length)

    def run(self, loop: Loop) -> tuple[list[Any], list[Any]]:
        """Run the loop as one node of the graph."""
        return replayed(loop, repr(self), self.schedule, STORES[self.store])
