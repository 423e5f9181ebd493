"""Hyperparameters: how a transformation declares them, and which values they may take."""

from __future__ import annotations

import dataclasses
import functools
import numbers
from collections.abc import Mapping
from typing import Any

import torch
from typing_extensions import TypeAlias

from torchopt.base import misuse, tree


#: A bound of a number, or of a tuple of numbers: one for all of them, or one for each.
Bound: TypeAlias = Any


@dataclasses.dataclass(frozen=True)
class HyperSpec:
    """The values that a hyperparameter may take, declared with its field.

    Example:
        >>> import torchopt
        >>> torchopt.scale_by_learning_rate(0.1).hyper_specs()["lr"].allows(-0.1)
        False
    """

    ge: Bound = None
    gt: Bound = None
    le: Bound = None
    lt: Bound = None
    length: int = 0
    flag: bool = False
    integer: bool = False
    optional: bool | tuple[int, ...] = False
    choices: tuple[Any, ...] = ()
    scalar: bool = False
    shared: bool = False

    @property
    def fixed(self) -> bool:
        """Whether it is of one value for all parameters, which is no number to compute with."""
        return self.flag or self.integer or bool(self.choices)

    def allows(self, value: float) -> bool:
        """Whether a number lies within the bounds (``nan`` never does)."""
        return (
            value == value
            and (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )

    @functools.lru_cache(maxsize=256)  # noqa: B019 (specs are constants of classes)
    def of_element(self, index: int) -> HyperSpec:
        """Return what the element of a tuple may be."""
        places = self.optional if isinstance(self.optional, tuple) else ()
        own = {
            name: bound[index]
            for name in ("ge", "gt", "le", "lt")
            if isinstance(bound := getattr(self, name), tuple)
        }
        return dataclasses.replace(self, length=0, optional=index in places, **own)

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
    ge: Bound = None,
    gt: Bound = None,
    le: Bound = None,
    lt: Bound = None,
    length: int = 0,
    integer: bool = False,
    optional: bool | tuple[int, ...] = False,
    scalar: bool = False,
    shared: bool = False,
) -> Any:
    """Declare a dataclass field as a hyperparameter with bounds.

    Args:
        default: Default value.
        ge: Lower bound that a Python number must satisfy. Tensors and schedules are not checked:
            reading a tensor would synchronise its device. Of a tuple of hyperparameters a tuple
            has a bound for each, or ``None``.
        gt: The same, exclusive.
        le: Upper bound.
        lt: The same, exclusive.
        length: The value is a tuple of so many hyperparameters, such as two ``betas``.
        integer: The value is a whole number, which no tensor or schedule can stand for.
        optional: The value may be ``None``; of a tuple the entries at these places.
        scalar: A tensor has one value for a parameter, not one for each of its entries.
        shared: In a chain it is the hyperparameter of this name that an earlier part has.

    Example:
        >>> import torch, torchopt
        >>> @torchopt.transformation
        ... class Soften(torchopt.ElementwiseTransformation):
        ...     width: float = torchopt.hyper(1.0, gt=0)
        ...
        ...     def rule(self, g, p, t, slots, *, width):
        ...         return g / (g.abs() + width), slots
        >>> Soften(width=0.0)
        Traceback (most recent call last):
        ValueError: width must be > 0, got 0.0.
    """
    spec = HyperSpec(
        ge, gt, le, lt, length, integer=integer, optional=optional, scalar=scalar, shared=shared
    )
    return dataclasses.field(default=default, metadata={"hyper": spec})


def choice(default: Any, among: tuple[Any, ...]) -> Any:
    """Declare a dataclass field as a hyperparameter that is one of several values.

    Example:
        >>> import torchopt
        >>> @torchopt.transformation
        ... class Norm(torchopt.ElementwiseTransformation):
        ...     kind: str = torchopt.choice("sign", among=("sign", "none"))
        ...
        ...     def rule(self, g, p, t, slots, *, kind):
        ...         return (g.sign() if kind == "sign" else g), slots
        >>> Norm(kind="Sign")
        Traceback (most recent call last):
        ValueError: kind must be 'sign' or 'none', got 'Sign'.
    """
    return dataclasses.field(default=default, metadata={"hyper": HyperSpec(choices=among)})


def flag(default: bool = False, *, shared: bool = False) -> Any:
    """Declare a dataclass field as a hyperparameter that is ``True`` or ``False``.

    Args:
        default: Default value.
        shared: As for :func:`hyper`.

    Example:
        >>> import torchopt
        >>> @torchopt.transformation
        ... class Sign(torchopt.ElementwiseTransformation):
        ...     ascend: bool = torchopt.flag(False)
        ...
        ...     def rule(self, g, p, t, slots, *, ascend):
        ...         return (g.sign() if ascend else -g.sign()), slots
        >>> Sign(ascend=True).hyperparameters()
        {'ascend': True}
    """
    return dataclasses.field(
        default=default, metadata={"hyper": HyperSpec(flag=True, shared=shared)}
    )


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
    if type(value) is float and not (spec.length or spec.fixed) and spec.allows(value):
        return
    value = plain(value)
    if value is None and spec.optional is True:
        return
    if spec.choices:
        if value not in spec.choices:
            raise ValueError(
                f"{name} must be {' or '.join(map(repr, spec.choices))}, got {misuse.short(value)}."
            )
    elif spec.flag:
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {misuse.short(value)}.")
    elif spec.length:
        if not isinstance(value, (tuple, list)) or len(value) != spec.length:
            what = "a pair of values" if spec.length == 2 else f"a tuple of {spec.length} values"
            raise TypeError(f"{name} must be {what}, got {misuse.short(value)}.")
        for index, element in enumerate(value):
            check(f"{name}[{index}]", element, spec.of_element(index))
    elif isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}.")
    elif spec.integer and not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be a whole number, got {misuse.short(value)}.")
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

    Also inside a pair or tree. For an API that records no derivative, and may have kernels then.
    """
    if torch.compiler.is_compiling():  # there a number would be a constant
        return value
    if isinstance(value, torch.Tensor):
        return value.item() if value.numel() == 1 and value.is_cpu else value
    if isinstance(value, (Mapping, list, tuple)):
        return tree.tree_map(as_numbers, value)
    return value
