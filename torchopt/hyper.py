"""Hyperparameters: how a transformation declares them, and how each parameter gets its value."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from torchopt import tree
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
            raise TypeError(f"{name} must be True or False, got {value!r}.")
    elif spec.pair:
        if not isinstance(value, (tuple, list)) or len(value) != 2:
            raise TypeError(f"{name} must be a pair of values, got {value!r}.")
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
        for key, element in zip(tree.leaf_names(value), tree.flatten(value)[0]):
            check(f"{name}[{key!r}]", element, spec)
    elif not callable(value):
        raise TypeError(
            f"{name} must be a number, a tensor, a schedule (count -> value) or a tree of those "
            f"with one entry per parameter, got {type(value).__name__}: {value!r}."
        )


def resolve(
    values: Mapping[str, Any],
    specs: Mapping[str, HyperSpec],
    leaves: Sequence[Any],
    names: Callable[[], Sequence[str]],
    count: Step,
    known: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Return the hyperparameters of every leaf: numbers and tensors only.

    Schedules are evaluated at ``count`` (0 at the first update) and trees are matched to the
    leaves by name; their entries may also name one of ``known``. When nothing differs between
    leaves they share one dict, so that a caller can treat it once.
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
    known: Sequence[str],
) -> Any:
    """Return one value for all leaves, or a list with one value per leaf."""
    if isinstance(value, (int, float)):
        return value
    value = plain(value)
    if isinstance(value, (Mapping, list, tuple)):
        matched = match_by_name(name, value, names(), known)
        column = [
            v(count) if callable(v) and not isinstance(v, torch.Tensor) else v for v in matched
        ]
        for v, leaf, leaf_name in zip(column, leaves, names()):
            _check_shape(name, v, leaf, leaf_name)
        return column
    if callable(value) and not isinstance(value, torch.Tensor):
        value = value(count)
    if isinstance(value, torch.Tensor) and value.dim() > 0:
        for leaf, leaf_name in zip(leaves, names()):
            _check_shape(name, value, leaf, leaf_name)
    return value


def match_by_name(
    what: str, value: Any, names: Sequence[str], known: Sequence[str] = ()
) -> list[Any]:
    """Give every leaf the entry of ``value`` under its own name or its longest dotted prefix.

    So ``{"body": a, "head": b}`` gives ``a`` to ``body.0.weight``; a list is matched by position
    to a list of parameters. The key ``""`` matches every leaf that no other key names.

    Raises:
        ValueError: If a leaf has no entry, or an entry has no leaf (a misspelt name).
    """
    entries = tree.named_leaves(value)
    if isinstance(value, (list, tuple)) and len(entries) == len(names):
        return list(entries.values())  # one entry per parameter, in order
    used: set[str] = set()
    matched = []
    for name in names:
        key = name
        while key not in entries and key:
            key = key.rpartition(".")[0]
        if key not in entries:
            raise ValueError(
                f"{what} has no entry for parameter {tree.quoted(name)}; it has {list(entries)}."
            )
        used.add(key)
        matched.append(entries[key])
    unused = [key for key in entries if key not in used and not _names_any(key, known)]
    if unused:
        raise ValueError(
            f"{what} has an entry {unused[0]!r} that names no parameter; parameters: {list(names)}."
        )
    return matched


def _names_any(key: str, names: Sequence[str]) -> bool:
    return any(name == key or name.startswith(f"{key}.") for name in names)


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
        raise TypeError(f"{name} must be a number, got {type(value).__name__}: {value!r}.")
    if spec is not None:
        check(name, value, spec)


def _check_shape(name: str, value: Any, leaf: Any, leaf_name: str) -> None:
    if (
        not isinstance(value, torch.Tensor)
        or value.dim() == 0
        or not isinstance(leaf, torch.Tensor)
    ):
        return
    try:
        fits = torch.broadcast_shapes(value.shape, leaf.shape) == leaf.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, which does not broadcast to parameter "
            f"{tree.quoted(leaf_name)} of shape {tuple(leaf.shape)}. Give one value per "
            "parameter as a "
            "dict keyed by parameter name."
        )
