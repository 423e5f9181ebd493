"""Match hyperparameters to parameters: by name, by position, or one for all."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from torchopt.base import misuse, tree
from torchopt.core.hyper import HyperSpec, plain
from torchopt.typing import Step


@dataclasses.dataclass(frozen=True)
class Known:
    """The parameters around those that take part now.

    Attributes:
        names: All of them by name, in order, frozen ones as well.
        others: The further names of those that have some (tied weights).
    """

    names: Sequence[str] = ()
    others: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)


def resolve(
    values: Mapping[str, Any],
    specs: Mapping[str, HyperSpec],
    leaves: Sequence[Any],
    names: Callable[[], Sequence[str]],
    count: Step,
    known: Sequence[str] | Callable[[], Known] = (),
) -> list[dict[str, Any]]:
    """Return the hyperparameters of every leaf: numbers and tensors only.

    Schedules are evaluated at ``count`` (0 at the first update) and trees are matched to the
    leaves by name; their entries may also name one of ``known`` (a function is called only if
    they do). When nothing differs between leaves they share one dict, so that a caller can treat
    it once.
    """
    shared: dict[str, Any] = {}
    columns: dict[str, list[Any]] = {}
    for name, spec in specs.items():
        value = values[name]
        if spec.length:
            each = [_column(name, v, leaves, names, count, known, spec) for v in value]
            if any(isinstance(x, list) for x in each):
                filled = [x if isinstance(x, list) else [x] * len(leaves) for x in each]
                columns[name] = list(zip(*filled))
            else:
                shared[name] = tuple(each)
            continue
        column = value if spec.fixed else _column(name, value, leaves, names, count, known, spec)
        if isinstance(column, list):
            columns[name] = column
        else:
            shared[name] = column
    if not columns:
        return [shared] * len(leaves)
    return [
        {**shared, **{name: column[index] for name, column in columns.items()}}
        for index in range(len(leaves))
    ]


def _column(
    name: str,
    value: Any,
    leaves: Sequence[Any],
    names: Callable[[], Sequence[str]],
    count: Step,
    known: Sequence[str] | Callable[[], Known],
    spec: HyperSpec,
) -> Any:
    """Return one value for all leaves, or a list with one value per leaf."""
    if value is None or isinstance(value, (int, float)):  # None where the check lets it through
        return value
    value = plain(value)
    if isinstance(value, (Mapping, list, tuple)):
        matched = match_by_name(name, value, names(), known)
        column = [
            misuse.scheduled(name, v, count)
            if callable(v) and not isinstance(v, torch.Tensor)
            else v
            for v in matched
        ]
        each = zip(column, leaves, names())
        return [_fitting(name, v, leaf, leaf_name, spec) for v, leaf, leaf_name in each]
    if callable(value) and not isinstance(value, torch.Tensor):
        value = misuse.scheduled(name, value, count)
    if isinstance(value, torch.Tensor):
        if value.dim() > 0:
            for leaf, leaf_name in zip(leaves, names()):
                value = _fitting(name, value, leaf, leaf_name, spec)
    elif not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(misuse.not_a_value(name, value))  # param_groups may have been changed
    return value


def match_by_name(
    what: str,
    value: Any,
    names: Sequence[str],
    known: Sequence[str] | Callable[[], Known] = (),
) -> list[Any]:
    """Give every leaf the entry of ``value`` under its own name or its longest dotted prefix.

    So ``{"body": a, "head": b}`` gives ``a`` to ``body.0.weight``; a list is matched by position
    to a list of parameters. The key ``""`` matches every leaf that no other key names. Entries of
    other known parameters are left out, and a tied weight may have any of its names.

    Raises:
        ValueError: If a leaf has no entry, or an entry has no leaf (a misspelt name).
    """
    entries = tree.named_leaves(value)
    by_position = isinstance(value, (list, tuple))
    if by_position and len(entries) == len(names):
        return list(entries.values())  # one entry per parameter, in order
    keys: list[Any] = [_key_of(name, entries) for name in names]
    used = set(keys)
    if None not in used and all(key in used for key in entries):
        return [entries[key] for key in keys]
    around = known() if callable(known) else Known(known)
    if by_position and len(entries) == len(around.names):
        every = dict(zip(around.names, entries.values()))
        return [every[name] for name in names]
    keys = [_first_key(name, around.others.get(name, ()), entries) for name in names]
    for name, key in zip(names, keys):
        if key is None:
            raise ValueError(
                f"{what} has no entry for parameter {tree.quoted(name)}; it has "
                f"{misuse.some(list(entries))}.{misuse.stray_comma(what, value)}"
            )
    used = set(keys)
    accepted = [*around.names, *(other for more in around.others.values() for other in more)]
    unused = [key for key in entries if key not in used and not _names_any(key, accepted)]
    if unused:
        raise ValueError(
            f"{what} has an entry {unused[0]!r} that names no parameter; parameters: "
            f"{misuse.some(around.names or names)}."
        )
    return [entries[key] for key in keys]


def _key_of(name: str, entries: Mapping[str, Any]) -> str | None:
    """Return the longest dotted prefix of a name that has an entry."""
    while name not in entries:
        if not name:
            return None
        name = name.rpartition(".")[0]
    return name


def _first_key(name: str, others: Sequence[str], entries: Mapping[str, Any]) -> str | None:
    """Return the key for a parameter by its first name that has one; ``""`` comes last."""
    found = [_key_of(one, entries) for one in (name, *others)]
    named = [key for key in found if key]
    return named[0] if named else found[0]


def _names_any(key: str, names: Sequence[str]) -> bool:
    return any(not key or name == key or name.startswith(f"{key}.") for name in names)


def _fitting(name: str, value: Any, leaf: Any, leaf_name: str, spec: HyperSpec) -> Any:
    """Return a value that broadcasts to a leaf; one entry always does, whatever its dimensions.

    Raises:
        ValueError: If the value is a tensor that does not broadcast.
    """
    if (
        not isinstance(value, torch.Tensor)
        or value.dim() == 0
        or not isinstance(leaf, torch.Tensor)
        or (value.shape == leaf.shape and not spec.scalar)
    ):
        return value
    try:
        fits = torch.broadcast_shapes(value.shape, leaf.shape) == leaf.shape
    except RuntimeError:
        fits = False
    if value.numel() == 1 and (not fits or spec.scalar):
        return value.reshape(())
    if fits and spec.scalar:
        raise ValueError(
            f"{name} is of a parameter as a whole, got one value for each entry of "
            f"{tree.quoted(leaf_name)}: shape {tuple(value.shape)}. Give one per parameter as a "
            "dict keyed by parameter name."
        )
    if not fits:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, which does not broadcast to parameter "
            f"{tree.quoted(leaf_name)} of shape {tuple(leaf.shape)}. Give one value per "
            "parameter as a "
            "dict keyed by parameter name."
        )
    return value
