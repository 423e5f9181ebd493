"""Differentiate a loop by keeping some carries and computing its steps again."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Union

from torchopt.base.torch_internals import peek_interpreter_stack
from torchopt.diff.adjoints.block import InBlock
from torchopt.diff.replay import schedules
from torchopt.diff.replay.folder import Folder
from torchopt.diff.replay.loop import Loop
from torchopt.diff.replay.run import replayed
from torchopt.diff.replay.store import CpuStore, MemoryStore
from torchopt.diff.replay.tape import Tape
from torchopt.diff.replay.thinning import Thinning
from torchopt.diff.replay.watcher import Bar, Report, Several, Told, Watcher


STORES = {"memory": MemoryStore, "cpu": CpuStore}


@dataclass(frozen=True)
class Checkpointed:
    """Differentiate a loop by keeping some carries and computing its steps again."""

    every: Union[int, str] = 1
    slots: int | None = None
    store: Union[str, os.PathLike[str]] = "memory"
    progress: Union[bool, Report] = field(default=False, repr=False, compare=False)

    def plan(self, length: int, carry_bytes: int) -> schedules.Plan:
        """Return what a loop of this length costs, before anything runs."""
        return self.schedule(length).plan(carry_bytes)

    def schedule(self, length: int) -> schedules.Schedule:
        """Return which carries are kept, and what is done in which order."""
        return schedules.make(self.every, self.slots, length)

    def run(self, loop: Loop) -> tuple[list[Any], list[Any]]:
        """Run the loop as one node of the graph."""
        new_store = STORES.get(str(self.store), MemoryStore)
        return replayed(
            loop, repr(self), self.schedule, new_store, watcher=lambda: self._watcher(loop)
        )

    def in_block(self) -> InBlock:
        """Return a tape for a block whose length nobody knows.

        Raises:
            ValueError: If carries are to be in a folder, or the length has to be known.
        """
        if self.every == "revolve":
            raise ValueError(
                "The binomial schedule divides a number of steps that is known beforehand, and a "
                'block tells its steps one by one: Checkpointed("log") keeps about as few carries.'
            )
        if str(self.store) not in STORES:
            raise ValueError(
                "A block cannot go on after a kill, for what happens between its steps is not "
                "known: store='memory' or 'cpu', or torchopt.diff.unroll for a folder."
            )
        if self.progress:
            raise ValueError("A block does not know how far it has got: progress is for unroll.")
        name = repr(self)
        return InBlock(Tape(name, Thinning(self.every), STORES[str(self.store)]()))

    def _watcher(self, loop: Loop) -> Watcher:
        told: list[Watcher] = []
        report: Union[Callable[..., Any], bool] = self.progress
        if report is True:
            report = Bar()
        if callable(report):
            told.append(Told(report, loop.length))
        if str(self.store) in STORES:
            return told[0] if told else Watcher()
        if peek_interpreter_stack() is not None:
            raise RuntimeError(
                f"{self!r} keeps its carries in a folder, and inside torch.func nobody could say "
                "when they are no longer needed. Use torch.autograd, or store='memory' or 'cpu'."
            )
        settings = f"every={self.every!r}, slots={self.slots!r}"
        folder = Folder(os.fspath(self.store), loop, settings)
        return Several(folder, *told)
