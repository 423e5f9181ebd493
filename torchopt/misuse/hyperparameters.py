"""What stands in the place of a hyperparameter."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchopt.misuse.given import given, is_number, is_read_once, short


def check_schedule(name: str, value: Any) -> None:
    """Refuse what can be called, but is no schedule: a class, a function of other arguments.

    Raises:
        TypeError: With what to give.
    """
    if torch.compiler.is_compiling():
        return
    if isinstance(value, type) or (
        isinstance(value, types.FunctionType) and value.__module__ == "torchopt.schedules"
    ):
        raise TypeError(
            f"{name} must be a number, a tensor or a schedule (count -> value), got "
            f"{given(value)}. {_of_class(name, value)}"
        )
    if isinstance(value, types.FunctionType):
        takes, many = value.__code__.co_argcount, bool(value.__code__.co_flags & 0x04)
        needs = takes - len(value.__defaults__ or ())
        if needs > 1 or not (takes or many):
            raise TypeError(
                f"{name} must be a number, a tensor or a schedule (count -> value), got "
                f"{given(value)} of {needs} arguments. A schedule takes the number of updates so "
                f"far: {name}=lambda count: 0.1 * 0.9**count."
            )


def _of_class(name: str, cls: Any) -> str:
    if cls.__module__ == "torchopt.schedules":
        return f"Call it: {name}=torchopt.schedules.{cls.__name__}(...)."
    if isinstance(cls, type) and issubclass(cls, torch.optim.lr_scheduler.LRScheduler):
        return _scheduler(cls.__name__)
    return f"Give a value, or an object that is called with the count: {cls.__name__}(...)."


def _scheduler(name: str) -> str:
    return (
        f"A scheduler of torch.optim is built on an optimizer, {name}(torchopt.SGD(...), ...); a "
        "transformation takes those of torchopt.schedules."
    )


def not_a_value(name: str, value: Any) -> str:
    """Return the message for something that stands in the place of a hyperparameter."""
    advice = ""
    if isinstance(value, torch.optim.lr_scheduler.LRScheduler):
        advice = f" {_scheduler(type(value).__name__)}"
    elif is_read_once(value):
        advice = (
            " If these are parameters: torchopt.sgd(lr=...) takes none, and "
            "torchopt.SGD(net.parameters(), lr=...) takes them first."
        )
    elif isinstance(value, str) or type(value).__module__ == "numpy":
        advice = f" Write {name}=float(value), or torch.as_tensor(value)."
    return (
        f"{name} must be a number, a tensor, a schedule (count -> value) or a tree of those with "
        f"one entry per parameter, got {given(value)}.{advice}"
    )


def scheduled(name: str, schedule: Callable[[Any], Any], count: Any) -> Any:
    """Return the value of a schedule.

    Raises:
        TypeError: If it returned neither a number nor a tensor.
    """
    value = schedule(count)
    if not isinstance(value, (int, float, Tensor)) and not is_number(value):
        raise TypeError(
            f"The schedule {name} must return a number or a tensor, but at count {short(count)} "
            f"it returned {given(value)}."
        )
    return value


def unknown_hyperparameter(name: str, owner: Any, known: Sequence[str]) -> str:
    """Return the message for a hyperparameter that an optimizer has not."""
    return f"{name!r} is no hyperparameter of {type(owner).__name__}; those are {list(known)}."


def no_number(row: Mapping[str, Any]) -> str:
    """Return the reason for a kernel that cannot be: kernels take numbers."""
    for name, value in row.items():
        for entry in value if isinstance(value, tuple) else (value,):
            if not is_number(entry):
                return f"the hyperparameter {name} is a tensor"
    return "a hyperparameter is a tensor"


def without_kernel(reason: str) -> str:
    """Return what to type where a kernel is required and there is none."""
    words = "Pass use_accelerated_op=None (not fused=True) to use kernels where they are available."
    if "hyperparameter" in reason and reason.endswith("is a tensor"):
        name = reason.split()[-4]
        return (
            f"Kernels take numbers: pass {name}=float(...) to have one. {words} Learned and "
            "tensor-valued hyperparameters are then computed by the rule."
        )
    return words
