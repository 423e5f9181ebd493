"""The state of a differentiable optimizer, and checks of saved ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from torchopt.base import misuse, tree
from torchopt.core import step_count
from torchopt.core.opt_state import OptState
from torchopt.core.packed import Packed, PackedDict
from torchopt.nn.parameters import parameter_sites
from torchopt.optim.protocols import HasGroups


@dataclasses.dataclass
class GroupState:
    """Step counts, slots and counters of one group by parameter name."""

    steps: dict[str, int]
    slots: dict[str, Any]  # slot -> parameter name -> tensor
    counters: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def deepcopy(self) -> GroupState:
        """Return the same state in tensors of its own, without history."""
        copies: dict[int, Tensor] = {}

        def copied(columns: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
            found: dict[str, dict[str, Any]] = {}
            for slot, column in columns.items():
                found[slot] = {}
                for name, value in column.items():
                    if isinstance(value, Tensor) and id(value) not in copies:
                        copy = value.detach().clone().requires_grad_(value.requires_grad)
                        copies[id(value)] = copy
                    found[slot][name] = copies.get(id(value), value)
            return found

        return GroupState(dict(self.steps), copied(self.slots), copied(self.counters))

    def without(self, name: str) -> GroupState:
        """Return the state without a parameter."""

        def left(columns: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
            return {
                slot: {own: x for own, x in column.items() if own != name}
                for slot, column in columns.items()
            }

        steps = {own: step for own, step in self.steps.items() if own != name}
        return GroupState(steps, left(self.slots), left(self.counters))

    def packed_slots(self, names: Sequence[str]) -> dict[str, Packed]:
        """Return the slots that are packed for just these parameters."""
        return {
            slot: column.packed
            for slot, column in self.slots.items()
            if isinstance(column, PackedDict) and list(column.names) == list(names)
        }


def state_of(module: nn.Module, state: GroupState) -> OptState:
    """Return the state of one group by reference, as :func:`checked_state` takes it.

    If some parameters have been updated more often than others, or never (they were frozen), the
    count is a dict.
    """
    sites = parameter_sites(module) if state.steps else {}
    names = [n for n, site in sites.items() if n in state.steps or site.tensor.requires_grad]
    steps = {name: state.steps.get(name, 0) for name in names}
    if not any(name in state.steps for name in names):
        return OptState(0, {slot: {} for slot in state.slots}, {n: {} for n in state.counters})
    slots = {}
    for slot, column in state.slots.items():
        kept = {name: x for name, x in dict(column).items() if name in steps}
        if any(x is not None for x in kept.values()):
            slots[slot] = kept
    counts = set(steps.values())
    whole = len(counts) == 1 and all(name in state.steps for name in names)
    counters: dict[str, Any] = {}
    for counter, column in state.counters.items():
        values = {name: x for name, x in column.items() if name in steps}
        first = next(iter(values.values()))
        numbers = all(type(x) is float for x in values.values())
        one = all(x is first or (numbers and x == first) for x in values.values())
        counters[counter] = first if whole and one else values
    return OptState(counts.pop() if whole else steps, slots, counters)


def checked_state(
    optimizer: HasGroups, module: nn.Module, state: OptState, absent: Iterable[str] = ()
) -> GroupState:
    """Return the state of one group, checked entry by entry.

    ``absent`` names trainable parameters that it may lack, for they were frozen.

    Raises:
        ValueError: Naming the first entry that does not fit the optimizer or the module.
    """
    plan = optimizer.transformation.plan
    plan.check_slots({**state.slots, **state.counters}, type(optimizer).__name__)
    sites = parameter_sites(module)
    trainable = [name for name, site in sites.items() if site.tensor.requires_grad]
    columns = {slot: dict(column) for slot, column in state.slots.items() if column}
    if isinstance(state.step, Mapping):
        steps = {name: _count(f"step[{name!r}]", count) for name, count in state.step.items()}
    else:
        count = _count("step", state.step)
        steps = dict.fromkeys(next(iter(columns.values()), trainable if count else ()), count)
    if steps or columns:
        optional = set(sites) - set(trainable) | set(absent)
        _check_names(
            "the parameters", list(steps), [n for n in sites if n in steps or n not in optional]
        )
    given = {name for column in columns.values() for name, x in column.items() if x is not None}
    steps = {name: count for name, count in steps.items() if count or name in given}
    for slot, column in columns.items():
        columns[slot] = {n: x for n, x in column.items() if n in steps or x is not None}
        _check_names(slot, list(columns[slot]), list(steps))
    for slot in plan.slot_names:
        for name in steps:
            value = columns.get(slot, {}).get(name)
            where = f"The state does not match at {slot}[{name!r}]: it"
            plan.slot_of[slot].check(where, value, sites[name].tensor)
    counters = {name: _checked_counter(name, state.counters[name], steps) for name in plan.counters}
    return GroupState(steps, {slot: columns.get(slot, {}) for slot in plan.slot_names}, counters)


def _checked_counter(counter: str, value: Any, steps: Mapping[str, int]) -> dict[str, Any]:
    """Return a counter of each parameter that has taken a step."""
    if not isinstance(value, Mapping):
        value = dict.fromkeys(steps, value)
    found = {}
    for name in steps:
        x = step_count.read_number(value.get(name))
        one = isinstance(x, (int, float)) or (isinstance(x, Tensor) and x.numel() == 1)
        if not one or isinstance(x, bool):
            raise ValueError(
                f"The state does not match at {counter}[{name!r}]: {misuse.short(x)} instead of a "
                "number."
            )
        found[name] = x
    return found


def _count(what: str, value: Any) -> int:
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if isinstance(number, float) and number.is_integer():
        number = int(number)
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise ValueError(f"The state does not match at {what}: {value!r} instead of a count.")
    return number


def _check_names(what: str, given: Sequence[str], wanted: Sequence[str]) -> None:
    if set(given) != set(wanted):
        difference = tree.first_difference(given, wanted)
        raise ValueError(f"The state does not match at {what}: {difference}.")
