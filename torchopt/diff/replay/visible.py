"""What a function can see: tensors that its first call has not read, and what they are called."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchopt.base.captured import Captured
from torchopt.base.values import describe
from torchopt.diff.replay.watch import may_have_derivative


def unread(step: Callable[..., Any], read: Sequence[Tensor]) -> list[Tensor]:
    """Return what a function can see and its first call has not read, where it has a derivative.

    Raises:
        ValueError: If a function that torch.jit.script has made may have read one of them: nobody
            sees what its operations read.
    """
    known, captured = set(map(id, read)), Captured(step)
    found = [t for t in captured.values if id(t) not in known and may_have_derivative(t)]
    scripts = (torch.jit.ScriptFunction, torch.jit.ScriptModule)
    if found and any(isinstance(thing, scripts) for thing in captured.things):
        name = names_in(step).get(id(found[0]), f"a tensor ({describe(found[0])})")
        raise ValueError(
            "The step calls what torch.jit.script has made, and sees a tensor that may be read "
            f"there ({name}): its derivative would be missing under torch.func. Use the function "
            "as it was before torch.jit.script, or torch.autograd."
        )
    return found


def names_in(step: Callable[..., Any]) -> dict[int, str]:
    """Return what the tensors that a function can see are called there, as far as that is plain."""
    names: dict[int, str] = {}
    function: Any = step
    while isinstance(function, functools.partial):
        _name(names, "an argument of the partial", (function.args, function.keywords))
        function = function.func
    if isinstance(function, types.MethodType):
        _name(names, "self", function.__self__)
        function = function.__func__
    if not isinstance(function, types.FunctionType):
        _name(names, type(function).__name__, function)
        return names
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        try:
            _name(names, name, cell.cell_contents)
        except ValueError:  # a variable that has no value yet
            continue
    for name in function.__code__.co_names:
        if name in function.__globals__:
            _name(names, name, function.__globals__[name])
    return names


def _name(names: dict[int, str], name: str, value: Any, depth: int = 0) -> None:
    if type(value) in weakref.ProxyTypes:  # what it stands for may be gone
        return
    if isinstance(value, Tensor):
        names.setdefault(id(value), name)
    elif isinstance(value, nn.Module):
        for part, tensor in (*value.named_parameters(), *value.named_buffers()):
            names.setdefault(id(tensor), f"{name}.{part}")
    elif depth < 4 and isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            _name(names, f"{name}[{index}]", item, depth + 1)
    elif depth < 4 and isinstance(value, dict):
        for key, item in value.items():
            _name(names, f"{name}[{key!r}]", item, depth + 1)
    elif depth < 4 and isinstance(value, types.FunctionType):
        for part, cell in zip(value.__code__.co_freevars, value.__closure__ or ()):
            try:
                _name(names, part, cell.cell_contents, depth + 1)
            except ValueError:
                continue
    elif (
        depth < 4 and hasattr(value, "__dict__") and not isinstance(value, (type, types.ModuleType))
    ):
        for part, item in vars(value).items():
            _name(names, f"{name}.{part}", item, depth + 1)
