"""What is given instead of a transformation."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from torchopt.base.misuse.given import given, is_number, is_of_schedules, is_read_once


def not_a_transformation(value: Any, where: str) -> str:
    """Return the message for something that is given instead of a transformation."""
    expected = "a gradient transformation such as torchopt.adam(1e-3)"
    if where == "inner_loop":
        expected += " or a MetaOptimizer of the network"
    return f"{where} expects {expected}, got {given(value)}. {_instead(value, where)}"


def _instead(value: Any, where: str) -> str:
    """Return what to type instead."""
    cls = value if isinstance(value, type) else type(value)
    if issubclass(cls, torch.optim.Optimizer) or hasattr(cls, "extract_state"):
        return _recipe_of(value, cls)
    if isinstance(value, type) and hasattr(value, "hyper_specs"):  # a kind of transformation
        return f"Make one of the class: {value.__name__}(...)."
    if _is_schedule(value, cls):
        return (
            "A schedule replaces a number: torchopt.sgd(lr=schedule), or "
            "torchopt.scale_by_schedule(schedule)."
        )
    if isinstance(value, (list, tuple)) and value:
        return f"Take the brackets off: chain(a, b), or chain(*{type(value).__name__})."
    if where == "masked" and isinstance(value, (Mapping, bool)):
        return "The order is masked(transformation, mask)."
    if isinstance(value, nn.Module) or is_read_once(value):
        return _other_order(where)
    if value is None:
        return "Leave it out, or give torchopt.identity()."
    if callable(value):
        return _called(value)
    if is_number(value) and where == "chain":
        return "To multiply there is torchopt.scale(number)."
    return _recipe_named(value) or _ONE_OF


_ONE_OF = "There are torchopt.sgd, adam, adamw, rmsprop and others, joined by torchopt.chain."
_OWN = (
    "A rule of your own is a class with a method rule(g, p, t, slots), decorated by "
    "torchopt.transformation."
)


def _recipe_called(name: str) -> Any:
    """Return the public recipe of a name, if there is one: whoever errs has imported it."""
    found = vars(sys.modules["torchopt"]).get(name)
    return found if inspect.isfunction(found) else None


def _recipe_of(value: Any, cls: type) -> str:
    name = cls.__name__.removeprefix("Meta").lower()
    recipe = _recipe_called(name)
    if recipe is None:
        if hasattr(value, "transformation"):
            return "Give what it runs: optimizer.transformation."
        return f"{_ONE_OF} {_OWN}"
    arguments: list[str] = []
    groups = getattr(value, "param_groups", None) or [{}]
    for argument in inspect.signature(recipe).parameters.values():
        live = groups[0].get(argument.name, argument.default)
        if is_number(live) and (live != argument.default or argument.name == "lr"):
            arguments.append(f"{argument.name}={live!r}")
    return f"Give torchopt.{name}({', '.join(arguments)}), which takes no parameters."


def _recipe_named(value: Any) -> str:
    known = isinstance(value, str) and _recipe_called(value.lower()) is not None
    return f"Give torchopt.{value.lower()}(...)." if known else ""


def _other_order(where: str) -> str:
    if where == "FuncOptimizer":
        return "FuncOptimizer(tx) takes no parameters; they go to step(loss, params)."
    if where == "Optimizer":
        return "The parameters come first: Optimizer(net.parameters(), tx)."
    if where in ("chain", "masked"):
        return _ONE_OF
    return f"The network comes first: {where}(net, tx)."


def _called(value: Any) -> str:
    if isinstance(value, types.MethodType):
        return f"Give the transformation itself, without .{value.__name__}."
    if isinstance(value, functools.partial):
        return f"Call it: {value.func.__name__}(...)."
    name = getattr(value, "__name__", type(value).__name__)
    if (getattr(value, "__module__", None) or "").startswith("torchopt"):
        return f"Call it: torchopt.{name}(...)."
    if name.startswith("clip_grad_"):
        return f"Give torchopt.{name.rstrip('_')}(...)."
    return f"A function is none. {_OWN}"


def _is_schedule(value: Any, cls: type) -> bool:
    return is_of_schedules(cls) or (inspect.isfunction(value) and is_of_schedules(value))


def not_a_result(tx: object, result: Any, slots: tuple[Any, ...]) -> str:
    """Return the message for a rule that returns anything but an update and its slots."""
    name, number = type(tx).__name__, len(slots)
    what = given(result)
    if isinstance(result, (tuple, list)) and len(result) == 2:
        what = f"{given(result[0])} and {given(result[1])}"
    return (
        f"The rule of {name} must return two things, an update of the shape of its gradient and "
        f"the tuple of its new slots, of length {number}; got {what}. Write "
        f"`return update, {'(new_slot,)' if number == 1 else 'slots'}`."
    )


def no_step(tx: object) -> str:
    """Return the message for the step of a transformation that has none."""
    return (
        f"{type(tx).__name__} defines no step(leaves). To step by a loss: "
        "torchopt.FuncOptimizer(tx).step(loss, params), or torchopt.MetaOptimizer(net, tx)."
    )


def check_declarations(cls: type) -> None:
    """Refuse what slots were declared by before they were data.

    Raises:
        TypeError: With what to write.
    """
    for name in ("init_slots", "optional_slots", "constant_slots"):
        if name in vars(cls):
            raise TypeError(
                f"{cls.__name__} defines {name}; slots are declared with what they start as: "
                'slots = (torchopt.Slot("exp_avg", start=0.0, when=None),).'
            )


def check_decorated(tx: object) -> None:
    """Refuse a class with fields of its own that no decorator has seen.

    Raises:
        TypeError: With what to write.
    """
    cls = type(tx)
    if "__dataclass_fields__" in vars(cls):
        return
    left = [name for name, v in vars(cls).items() if isinstance(v, dataclasses.Field)]
    if left:
        raise TypeError(
            f"The hyperparameter {left[0]!r} of {cls.__name__} has not been declared. Write "
            f"@torchopt.transformation above `class {cls.__name__}`."
        )
