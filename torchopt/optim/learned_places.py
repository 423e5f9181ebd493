"""Where a learned hyperparameter belongs: in which group, under which name, of which parameter."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Union

import torch
from torch import Tensor
from typing_extensions import TypeAlias

from torchopt.base import misuse
from torchopt.base.misuse.given import given
from torchopt.core import hyper
from torchopt.optim.meta_optimizer import MetaOptimizer
from torchopt.optim.optimizer import Optimizer


AnyOptimizer: TypeAlias = Union[MetaOptimizer, torch.optim.Optimizer]


@dataclasses.dataclass(frozen=True)
class Place:
    """A hyperparameter of a group (``None`` if there is one only), of a parameter, or of all."""

    group: int | None
    name: str
    index: int | None
    parameter: str | None
    entries: bool = False

    @property
    def title(self) -> str:
        """Its name, for errors."""
        return self.name if self.index is None else f"{self.name}[{self.index}]"

    @property
    def key(self) -> str:
        """Its name in a ``ParameterDict``, whose keys have no dots."""
        parts = (self.group, self.name, self.index, self.parameter)
        return "/".join(str(x).replace(".", "/") for x in parts if x is not None)


def connect_to(optimizer: AnyOptimizer, values: Sequence[Mapping[str, Any]]) -> None:
    """Put tensors into the groups of a differentiable optimizer."""
    if not isinstance(optimizer, MetaOptimizer):
        raise TypeError(
            f"connect_to expects a torchopt.MetaOptimizer, got {given(optimizer)}: only a "
            "differentiable optimizer passes derivatives to its hyperparameters. For plain numbers "
            "there is write_to."
        )
    _write(_found_in(optimizer, values))


def write_numbers_to(optimizer: AnyOptimizer, values: Sequence[Mapping[str, Any]]) -> None:
    """Write plain numbers into the groups of an optimizer."""
    if not isinstance(optimizer, (MetaOptimizer, torch.optim.Optimizer)):
        raise TypeError(
            f"write_to expects an optimizer, got {given(optimizer)}. For a transformation "
            "there is transformation(detach=True)."
        )
    _write(_found_in(optimizer, values))


_Found = list[tuple[dict[str, Any], str, Any]]


def _write(found: _Found) -> None:
    for group, name, value in found:
        old = group[name]
        if isinstance(old, Tensor) and isinstance(value, float) and not old.requires_grad:
            with torch.no_grad():
                old.fill_(value)  # capturable optimizers of torch have tensors
        else:
            group[name] = value


def _found_in(optimizer: AnyOptimizer, values: Sequence[Mapping[str, Any]]) -> _Found:
    """Return what goes where; everything has been checked then."""
    groups = optimizer.param_groups
    if len(values) not in (1, len(groups)):
        raise ValueError(
            f"There are learned values for {len(values)} groups, and {type(optimizer).__name__} "
            f"has {len(groups)}."
        )
    each = values if len(values) == len(groups) else [values[0]] * len(groups)
    found: _Found = []
    placed: set[str] = set()
    for number, (group, own) in enumerate(zip(groups, each)):
        label = f"{group['label']}." if "label" in group else ""
        for name, value in own.items():
            there = name if name in group else name.removeprefix(label)
            if there not in group or (label and there == name and "." in name):
                continue
            placed.add(name)
            for_group = _of_group(optimizer, number, name, value)
            _check(optimizer, group, there, for_group)
            found.append((group, there, for_group))
    missing = [name for own in values for name in own if name not in placed]
    if missing:
        known = [name for name in groups[0] if name != "params"]
        raise ValueError(
            f"{type(optimizer).__name__} has no hyperparameter {missing[0]!r}; those of its first "
            f"group are {known}."
        )
    return found


def _check(optimizer: AnyOptimizer, group: dict[str, Any], name: str, value: Any) -> None:
    if isinstance(optimizer, MetaOptimizer):
        hyper.check(name, value, optimizer.transformation.hyper_specs()[name])
    elif isinstance(optimizer, Optimizer):
        hyper.check(name, value, optimizer.group_specs(group)[name])


def _of_group(optimizer: AnyOptimizer, number: int, name: str, value: Any) -> Any:
    """Return values as a group keeps them: by its own names, or in its order."""
    if isinstance(value, tuple):
        return tuple(_of_group(optimizer, number, name, element) for element in value)
    if not isinstance(value, Mapping) or isinstance(optimizer, MetaOptimizer):
        return value
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"{name} has a value for each parameter, and {type(optimizer).__name__} of torch.optim "
            "has one for each group: write to a torchopt.Optimizer, or to one group for each "
            "parameter."
        )
    groups = optimizer.param_groups
    own_names = groups[number].get("param_names")
    if own_names:
        absent = [own for own in own_names if own not in value]
        if absent:
            raise ValueError(
                f"{name} has no learned value of {absent[0]!r}; it has {misuse.some(list(value))}."
            )
        return {own: value[own] for own in own_names}
    counts = [len(group["params"]) for group in groups]
    if sum(counts) != len(value):
        raise ValueError(
            f"{name} has learned values of {len(value)} parameters, and {type(optimizer).__name__} "
            f"has {sum(counts)} without names. Make it over net.named_parameters()."
        )
    first = sum(counts[:number])
    return list(value.values())[first : first + counts[number]]
