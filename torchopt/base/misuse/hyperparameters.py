"""What is given instead of a hyperparameter."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchopt.base.misuse.given import (
    clipped,
    given,
    is_number,
    is_of_schedules,
    is_read_once,
    short,
)


def check_schedule(name: str, value: Any) -> None:
    """Refuse what can be called, but is no schedule: a class, a function of other arguments.

    Raises:
        TypeError: With what to give.
    """
    if torch.compiler.is_compiling():
        return
    if isinstance(value, nn.Module) and type(value).__module__.startswith("torch.nn."):
        raise TypeError(
            f"{name} must be a number, a tensor or a schedule (count -> value), got "
            f"{given(value)}. A transformation takes no network: torchopt.MetaAdam(net, lr=0.1) "
            "and torchopt.MetaOptimizer(net, tx) do, and torchopt.Adam(net.parameters(), lr=0.1) "
            "takes its parameters."
        )
    if isinstance(value, type) or (
        isinstance(value, types.FunctionType) and is_of_schedules(value)
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
    if is_of_schedules(cls):
        return f"Call it: torchopt.schedules.{cls.__name__}(...)."
    if isinstance(cls, type) and issubclass(cls, torch.optim.lr_scheduler.LRScheduler):
        return _scheduler(cls.__name__)
    return f"Give a value, or an object that is called with the count: {cls.__name__}(...)."


def _scheduler(name: str) -> str:
    return (
        f"A scheduler of torch.optim is built on an optimizer, {name}(torchopt.SGD(...), ...); a "
        "transformation takes those of torchopt.schedules."
    )


def not_a_value(name: str, value: Any) -> str:
    """Return the message for something that is given instead of a hyperparameter."""
    advice = ""
    if isinstance(value, torch.optim.lr_scheduler.LRScheduler):
        advice = f" {_scheduler(type(value).__name__)}"
    elif is_read_once(value):
        advice = (
            " A transformation takes no parameters; an optimizer takes them first: "
            "torchopt.Adam(net.parameters(), lr=0.1), torchopt.Optimizer(net.parameters(), tx)."
        )
    elif isinstance(value, str) or type(value).__module__ == "numpy":
        place = f"{name}=" if len(name) < 20 else ""
        advice = f" Write {place}float(value), or torch.as_tensor(value)."
    return (
        f"{name} must be a number, a tensor, a schedule (count -> value) or a tree of those with "
        f"one entry per parameter, got {given(value)}.{advice}"
    )


def scheduled(name: str, schedule: Callable[[Any], Any], count: Any) -> Any:
    """Return the value of a schedule.

    Raises:
        TypeError: If it returned neither a number nor a tensor.
    """
    if isinstance(schedule, type):
        check_schedule(name, schedule)
    if isinstance(schedule, nn.Module):
        return _learned(name, schedule, count)
    value = schedule(count)
    if not isinstance(value, (int, float, Tensor)) and not is_number(value):
        raise TypeError(
            f"The schedule {name} must return a number or a tensor, but at count {short(count)} "
            f"it returned {given(value)}."
        )
    return value


def _learned(name: str, schedule: nn.Module, count: Any) -> Any:
    """Return the value of a schedule that is a module, unless it is a network that cannot be."""
    try:
        return schedule(count)
    except Exception as error:
        raise TypeError(
            f"{name} was asked for its value at count {short(count)}, as schedules are, but it is "
            f"{given(schedule)}, which failed ({clipped(str(error))}). A "
            "transformation takes no network; torchopt.MetaOptimizer(net, tx) does."
        ) from error


def stray_comma(name: str, value: Any) -> str:
    """Return one more sentence for a tuple of one number, which a comma at the end makes."""
    if isinstance(value, tuple) and len(value) == 1:
        return f" Is there a comma too much? Write {name}={short(value[0])}."
    return ""


def check_values(**values: Any) -> None:
    """Refuse what a schedule cannot compute with.

    Raises:
        TypeError: Naming what was given.
    """
    for name, value in values.items():
        if not isinstance(value, (int, float, Tensor)) and not is_number(value):
            raise TypeError(f"{name} must be a number or a tensor, got {given(value)}.")


def check_joined(schedules: Any, owner: str = "join") -> None:
    """Refuse anything but several schedules.

    Raises:
        TypeError: With what to give.
    """
    if not isinstance(schedules, (list, tuple)):
        raise TypeError(f"{owner} expects a list of schedules, got {given(schedules)}.")
    for schedule in schedules:
        check_schedule("An entry of schedules", schedule)
        if not callable(schedule) or isinstance(schedule, Tensor):
            raise TypeError(
                f"{owner} expects a list of schedules, got {given(schedule)} in it. Give "
                "torchopt.schedules.constant(value)."
            )


def unknown_hyperparameter(name: str, owner: Any, known: Sequence[str]) -> str:
    """Return the message for a hyperparameter that an optimizer has not."""
    return f"{name!r} is no hyperparameter of {type(owner).__name__}; those are {list(known)}."


#: What to type where a kernel is required and there is none.
WITHOUT_KERNEL = (
    "Pass use_accelerated_op=None (not fused=True) to use kernels where they are available."
)


def without_number(name: str) -> str:
    """Return what to type where a kernel of a compiler is required, and a number is a tensor."""
    return (
        f"Inside of a compiler kernels take numbers: pass {name}=float(...) to have one. "
        f"{WITHOUT_KERNEL} Learned and tensor-valued hyperparameters are then computed by the rule."
    )


def refuse_switches(title: str, capturable: bool, differentiable: bool) -> None:
    """Refuse switches of ``torch.optim`` that a class in place has not.

    Raises:
        ValueError: Saying what to use instead.
    """
    if differentiable:
        raise ValueError(
            f"{title} changes its parameters in place. To differentiate through its steps use "
            f"torchopt.Meta{title}(module, ...) or the functional API with inplace=False."
        )
    if capturable:
        raise ValueError(f"{title} has no capturable form yet; leave capturable=False.")
