"""The state of a differentiable optimizer, and checks of saved ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from torchopt.base import misuse, tree
from torchopt.core.opt_state import OptState
from torchopt.core.packed import Packed, PackedDict
from torchopt.nn.parameters import parameter_sites


@dataclasses.dataclass
class GroupState:
    """Step counts and slots of one group by parameter name."""

    steps: dict[str, int]
    slots: dict[str, Any]  # slot -> parameter name -> tensor

    def deepcopy(self) -> GroupState:
        """Return the same state in tensors of its own, without history."""
        copies: dict[int, Tensor] = {}
        slots = {}
        for slot, column in self.slots.items():
            slots[slot] = {}
            for name, value in column.items():
                if isinstance(value, Tensor) and id(value) not in copies:
                    copy = value.detach().clone().requires_grad_(value.requires_grad)
                    copies[id(value)] = copy
                slots[slot][name] = copies.get(id(value), value)
        return GroupState(dict(self.steps), slots)

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
        return OptState(0, {slot: {} for slot in state.slots})
    slots = {}
    for slot, column in state.slots.items():
        kept = {name: x for name, x in dict(column).items() if name in steps}
        if any(x is not None for x in kept.values()):
            slots[slot] = kept
    counts = set(steps.values())
    whole = len(counts) == 1 and all(name in state.steps for name in names)
    return OptState(counts.pop() if whole else steps, slots)


def checked_state(
    optimizer: Any, module: nn.Module, state: OptState, absent: Iterable[str] = ()
) -> GroupState:
    """Return the state of one group, checked entry by entry.

    ``absent`` names trainable parameters that it may lack, for they were frozen.

    Raises:
        ValueError: Naming the first entry that does not fit the optimizer or the module.
    """
    plan = optimizer.transformation.plan
    plan.check_slots(state.slots, type(optimizer).__name__)
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
            _check_slot(plan, slot, name, columns.get(slot, {}).get(name), sites[name].tensor)
    return GroupState(steps, {slot: columns.get(slot, {}) for slot in plan.slot_names})


def _count(what: str, value: Any) -> int:
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if isinstance(number, float) and number.is_integer():
        number = int(number)
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise ValueError(f"The state does not match at {what}: {value!r} instead of a count.")
    return number


def _check_slot(plan: Any, slot: str, name: str, value: Any, param: Tensor) -> None:
    if value is None and slot in plan.optional_slots:
        return
    shape = tuple(param.shape)
    if not isinstance(value, Tensor) or tuple(value.shape) != shape:
        given = misuse.short(value)
        raise ValueError(
            f"The state does not match at {slot}[{name!r}]: {given} instead of a tensor of shape "
            f"{shape}."
        )


def _check_names(what: str, given: Sequence[str], wanted: Sequence[str]) -> None:
    if set(given) != set(wanted):
        difference = tree.first_difference(given, wanted)
        raise ValueError(f"The state does not match at {what}: {difference}.")
