"""The state of a differentiable optimizer, and checks of saved ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from torchopt import hyper, tree
from torchopt.module_state import parameter_sites
from torchopt.opt_state import OptState
from torchopt.packed import Packed, PackedDict


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


def checked_state(optimizer: Any, module: nn.Module, state: OptState) -> GroupState:
    """Return the state of one group, checked entry by entry.

    Raises:
        ValueError: Naming the first entry that does not fit the optimizer or the module.
    """
    plan = optimizer.transformation.plan
    plan.check_slots(state.slots, type(optimizer).__name__)
    sites = parameter_sites(module)
    columns = {slot: dict(column) for slot, column in state.slots.items() if column}
    if not columns and state.step == 0:
        return GroupState({}, {slot: {} for slot in plan.slot_names})
    counts = state.step if isinstance(state.step, Mapping) else None
    names = list(next(iter(columns.values()), sites if counts is None else counts))
    trainable = [n for n, site in sites.items() if site.tensor.requires_grad or n in names]
    _check_names("the parameters", names, trainable)
    steps: dict[str, Any] = dict.fromkeys(names, state.step) if counts is None else dict(counts)
    for what, column in {"step": steps, **columns}.items():
        _check_names(what, list(column), names)
    for name, step in steps.items():
        if not isinstance(step, int) or step < 0:
            raise ValueError(
                f"The state does not match at step[{name!r}]: {step!r} instead of a count."
            )
    for slot in plan.slot_names:
        for name in names:
            value = columns.get(slot, {}).get(name)
            if value is None and slot in plan.optional_slots:
                continue
            shape = tuple(sites[name].tensor.shape)
            if not isinstance(value, Tensor) or tuple(value.shape) != shape:
                given = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else value
                raise ValueError(
                    f"The state does not match at {slot}[{name!r}]: {given} instead of a "
                    f"tensor of shape {shape}."
                )
    return GroupState(steps, {slot: columns.get(slot, {}) for slot in plan.slot_names})


def check_groups(optimizer: Any, groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuse saved hyperparameters of another optimizer.

    Raises:
        ValueError: Naming the hyperparameter that is missing, unknown or out of bounds.
    """
    specs = optimizer.transformation.hyper_specs()
    if len(groups) != len(optimizer.param_groups):
        raise ValueError(
            f"The state has {len(groups)} param_groups, {type(optimizer).__name__} has "
            f"{len(optimizer.param_groups)}."
        )
    for group, live in zip(groups, optimizer.param_groups):
        for name in specs:
            code = callable(live[name]) and not isinstance(live[name], Tensor)
            if name not in group and not code:  # schedules are not saved
                raise ValueError(
                    f"The state belongs to another optimizer: it lacks the hyperparameter {name!r}."
                )
        for name, value in group.items():
            if name not in specs:
                raise ValueError(
                    f"The state belongs to another optimizer: it has the hyperparameter {name!r}."
                )
            hyper.check(name, value, specs[name])


def _check_names(what: str, given: Sequence[str], wanted: Sequence[str]) -> None:
    if set(given) != set(wanted):
        difference = tree.first_difference(given, wanted)
        raise ValueError(f"The state does not match at {what}: {difference}.")
