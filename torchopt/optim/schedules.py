"""Schedules given to an object-oriented optimizer: its groups hold their numbers.

Whatever reads ``group["lr"]`` (schedulers, monitors, checkpoints) expects a number. So the schedule
is taken out of the group, and the number that the next step will take is written in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from torchopt.base import misuse, tree
from torchopt.core import hyper


#: In a saved group: the names of those hyperparameters whose schedule a number has replaced.
REPLACED = "replaced_schedules"


class LiveSchedules:
    """The schedules of all parameter groups.

    A schedule is in force as long as the group holds what was written for it. Another number there
    (a scheduler's, a user's, the zero by which ``torch.distributed.checkpoint`` makes a first step
    harmless) takes its place for as long as it stands.
    """

    def __init__(self) -> None:
        self._live: list[_Live] = []

    @property
    def any(self) -> bool:
        """Whether there is one."""
        return len(self._live) > 0

    def adopt(self, groups: Sequence[dict[str, Any]], names: Sequence[str], count: Any) -> None:
        """Take the schedules out of groups, and write their values; ``count(group)`` says when."""
        for group in groups:
            for name in names:
                value = group.get(name)
                if type(value) not in (int, float, bool) and hyper.has_schedule(value):
                    live = _Live(group, name, value)
                    live.write(count(group))  # first, for a schedule may raise
                    self._live = [x for x in self._live if not x.is_of(group, name)] + [live]

    def write(self, groups: Sequence[dict[str, Any]], count: Any, soon: bool = False) -> None:
        """Write the values of the schedules that are in force.

        Args:
            groups: The parameter groups as they are now.
            count: A function from a group to the number of its updates so far.
            soon: The step that needs the value is not being taken yet: a schedule that has none
                (a list of rates at its end) may raise when it is.
        """
        self._live = [x for x in self._live if any(x.group is group for group in groups)]
        for live in self._live:
            if not live.in_force:
                continue
            try:
                live.write(count(live.group))
            except Exception:
                if not soon:
                    raise

    def has(self, group: dict[str, Any], name: str) -> bool:
        """Whether there is a schedule for a hyperparameter of a group."""
        return any(live.is_of(group, name) for live in self._live)

    def replaced(self, group: dict[str, Any]) -> list[str]:
        """Return the names of the hyperparameters of a group whose schedule is out of force."""
        return [x.name for x in self._live if x.group is group and not x.in_force]

    def keep_through_load(
        self, groups: Sequence[dict[str, Any]], given: Sequence[Mapping[str, Any]]
    ) -> Callable[[Sequence[dict[str, Any]], Any], None]:
        """Return what puts the schedules into the groups that a loaded state brings.

        Args:
            groups: The groups before loading.
            given: The saved groups, which name the schedules that a number had replaced.
        """
        kept = [
            (position, live, live.name not in given[position].get(REPLACED, ()))
            for position, group in enumerate(groups)
            for live in self._live
            if live.group is group
        ]

        def restore(new: Sequence[dict[str, Any]], count: Any) -> None:
            self._live = [live.moved_to(new[position], force) for position, live, force in kept]
            self.write(new, count, soon=True)

        return restore


class _Live:
    """One schedule (or a pair or tree with some), and what it has written."""

    def __init__(self, group: dict[str, Any], name: str, schedule: Any) -> None:
        self.group, self.name, self.schedule = group, name, schedule
        self.written: Any = None
        self.versions: list[int] = []

    def is_of(self, group: dict[str, Any], name: str) -> bool:
        return self.group is group and self.name == name

    @property
    def in_force(self) -> bool:
        """Whether the group holds what was written, and nobody has changed it in place."""
        value = self.group.get(self.name)
        if isinstance(value, (int, float)):
            return type(self.written) in (int, float) and value == self.written
        return value is self.written and _versions(value) == self.versions

    def write(self, count: int) -> None:
        value = _at(self.name, self.schedule, count)
        self.group[self.name] = self.written = value
        self.versions = _versions(value)

    def moved_to(self, group: dict[str, Any], force: bool) -> _Live:
        """Return the same for another group; in force there, or replaced by its number."""
        moved = _Live(group, self.name, self.schedule)
        if force:
            moved.written = group.get(self.name)
            moved.versions = _versions(moved.written)
        return moved


def _at(name: str, schedule: Any, count: int) -> Any:
    """Return the value of a schedule, or of the schedules in a pair or tree."""
    if isinstance(schedule, (list, tuple, Mapping)):
        return tree.tree_map(lambda leaf: _at(name, leaf, count), schedule)
    if callable(schedule) and not isinstance(schedule, Tensor):
        return misuse.scheduled(name, schedule, count)
    return schedule


def _versions(value: Any) -> list[int]:
    leaves = [value] if isinstance(value, Tensor) else tree.flatten(value)[0]
    return [x._version for x in leaves if isinstance(x, Tensor) and not x.is_inference()]
