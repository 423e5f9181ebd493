"""Hyperparameters: how a transformation declares them, and how each parameter gets its value."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from torchopt import misuse, tree
from torchopt.typing import Step


@dataclasses.dataclass(frozen=True)
class HyperSpec:
    """What values a hyperparameter may take; stands beside the field as data."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    pair: bool = False
    flag: bool = False

    def allows(self, value: float) -> bool:
        """Whether a number lies within the bounds (``nan`` never does)."""
        return (
            value == value
            and (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )

    def __str__(self) -> str:
        signs = (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
        bounds = [
            f"{sign} {getattr(self, name)}"
            for name, sign in signs
            if getattr(self, name) is not None
        ]
        return " and ".join(bounds) or "any number"


@dataclasses.dataclass(frozen=True)
class Known:
    """The parameters around those that take part now.

    Attributes:
        names: All of them by name, in order, frozen ones as well.
        others: The further names of those that have some (tied weights).
    """

    names: Sequence[str] = ()
    others: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)


def hyper(
    default: Any = dataclasses.MISSING,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    pair: bool = False,
) -> Any:
    """Declare a dataclass field as a hyperparameter with bounds.

    Args:
        default: Default value.
        ge: Lower bound that a Python number must satisfy. Tensors and schedules are not checked:
            reading a tensor would synchronise its device.
        gt: The same, exclusive.
        le: Upper bound.
        lt: The same, exclusive.
        pair: The value is a tuple of two hyperparameters, such as ``betas``.
    """
    spec = HyperSpec(ge=ge, gt=gt, le=le, lt=lt, pair=pair)
    return dataclasses.field(default=default, metadata={"hyper": spec})


def flag(default: bool = False) -> Any:
    """Declare a dataclass field as a hyperparameter that is ``True`` or ``False``."""
    return dataclasses.field(default=default, metadata={"hyper": HyperSpec(flag=True)})


def specs_of(transformation: Any) -> dict[str, HyperSpec]:
    """Return the declared hyperparameters of a dataclass, by field name."""
    fields = dataclasses.fields(transformation)
    return {field.name: field.metadata["hyper"] for field in fields if "hyper" in field.metadata}


def plain(value: Any) -> Any:
    """Return the dict or list that a ``ParameterDict`` or ``ParameterList`` stands for."""
    if isinstance(value, torch.nn.ParameterDict):
        return dict(value.items())
    return list(value) if isinstance(value, torch.nn.ParameterList) else value


def check(name: str, value: Any, spec: HyperSpec) -> None:
    """Refuse a hyperparameter of the wrong type or out of bounds.

    Raises:
        TypeError: For a value that is no number, tensor, schedule or tree of those.
        ValueError: For a number out of bounds.
    """
    value = plain(value)
    if spec.flag:
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {misuse.short(value)}.")
    elif spec.pair:
        if not isinstance(value, (tuple, list)) or len(value) != 2:
            raise TypeError(f"{name} must be a pair of values, got {misuse.short(value)}.")
        for index, element in enumerate(value):
            check(f"{name}[{index}]", element, dataclasses.replace(spec, pair=False))
    elif isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}.")
    elif isinstance(value, numbers.Real):
        if not spec.allows(float(value)):
            raise ValueError(f"{name} must be {spec}, got {value!r}.")
    elif isinstance(value, torch.Tensor):
        if value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"{name} must be a real tensor, got dtype {value.dtype}.")
    elif isinstance(value, (Mapping, list, tuple)):
        entries = value.values() if isinstance(value, Mapping) else value
        if all(isinstance(x, torch.Tensor) and x.is_floating_point() for x in entries):
            return
        for key, element in zip(tree.leaf_names(value), tree.flatten(value)[0]):
            check(f"{name}[{misuse.short(key)}]", element, spec)
    elif not callable(value):
        raise TypeError(misuse.not_a_value(name, value))
    else:
        misuse.check_schedule(name, value)


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
        if spec.pair:
            first, second = (_column(name, v, leaves, names, count, known) for v in value)
            if isinstance(first, list) or isinstance(second, list):
                first = first if isinstance(first, list) else [first] * len(leaves)
                second = second if isinstance(second, list) else [second] * len(leaves)
                columns[name] = list(zip(first, second))
            else:
                shared[name] = (first, second)
            continue
        column = value if spec.flag else _column(name, value, leaves, names, count, known)
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
) -> Any:
    """Return one value for all leaves, or a list with one value per leaf."""
    if isinstance(value, (int, float)):
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
        return [_fitting(name, v, *leaf) for v, *leaf in zip(column, leaves, names())]
    if callable(value) and not isinstance(value, torch.Tensor):
        value = misuse.scheduled(name, value, count)
    if isinstance(value, torch.Tensor):
        if value.dim() > 0:
            for leaf, leaf_name in zip(leaves, names()):
                value = _fitting(name, value, leaf, leaf_name)
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


def has_schedule(value: Any) -> bool:
    """Whether a hyperparameter is a schedule, or a pair or tree that holds one."""
    leaves = [value] if isinstance(value, torch.Tensor) else tree.flatten(plain(value))[0]
    return any(callable(leaf) and not isinstance(leaf, torch.Tensor) for leaf in leaves)


def check_number(name: str, value: Any, spec: HyperSpec | None = None) -> None:
    """Refuse a field that must be a plain number.

    Raises:
        TypeError: If it is none.
        ValueError: If it is out of bounds.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(
            f"{name} must be a number, got {type(value).__name__}: {misuse.short(value)}."
        )
    if spec is not None:
        check(name, value, spec)


def numbers_in(value: Any) -> list[Any]:
    """Return the plain numbers in a hyperparameter: itself, or those in a pair or tree."""
    leaves = [value] if isinstance(value, torch.Tensor) else tree.flatten(value)[0]
    return [leaf for leaf in leaves if isinstance(leaf, numbers.Real)]


def as_numbers(value: Any) -> Any:
    """Return the number in a tensor with one entry, if reading it does not wait for a device.

    Also inside a pair or tree. For a face that records no derivative, and may have kernels then.
    """
    if torch.compiler.is_compiling():  # there a number would be a constant
        return value
    if isinstance(value, torch.Tensor):
        return value.item() if value.numel() == 1 and value.is_cpu else value
    if isinstance(value, (Mapping, list, tuple)):
        return tree.tree_map(as_numbers, value)
    return value


def _fitting(name: str, value: Any, leaf: Any, leaf_name: str) -> Any:
    """Return a value that broadcasts to a leaf; one entry always does, whatever its dimensions.

    Raises:
        ValueError: If the value is a tensor that does not broadcast.
    """
    if (
        not isinstance(value, torch.Tensor)
        or value.dim() == 0
        or not isinstance(leaf, torch.Tensor)
        or value.shape == leaf.shape
    ):
        return value
    try:
        fits = torch.broadcast_shapes(value.shape, leaf.shape) == leaf.shape
    except RuntimeError:
        fits = False
    if not fits and value.numel() == 1:
        return value.reshape(())
    if not fits:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, which does not broadcast to parameter "
            f"{tree.quoted(leaf_name)} of shape {tuple(leaf.shape)}. Give one value per "
            "parameter as a "
            "dict keyed by parameter name."
        )
    return value
