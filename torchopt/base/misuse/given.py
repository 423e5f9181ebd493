"""What was given, in the words of an error message."""

from __future__ import annotations

import functools
import numbers
import types
from collections.abc import Iterator, Mapping, Sequence, ValuesView
from typing import Any

import torch
from torch import Tensor, nn


#: How much of a repr an error shows; networks and optimizers print as ten lines and more.
LONGEST = 80
#: How many names an error lists.
MOST_NAMES = 8


def short(value: Any, limit: int = LONGEST) -> str:
    """Return a repr on one line, cut off where it is long."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
    if is_read_once(value) or isinstance(value, nn.Module):
        return given(value)
    return clipped(_without_tensors(value), limit)


def clipped(text: str, limit: int = LONGEST) -> str:
    """Return a text on one line, cut off where it is long."""
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[: limit - 6]} [...]"


def _without_tensors(value: Any) -> str:
    """Return the repr of a plain container with its tensors in words."""
    if type(value) in (list, tuple) and len(value) <= LONGEST:
        inside = ", ".join(map(short, value))
        inside += "," if type(value) is tuple and len(value) == 1 else ""
        return f"[{inside}]" if type(value) is list else f"({inside})"
    if type(value) is dict and len(value) <= LONGEST:
        return f"{{{', '.join(f'{short(k)}: {short(v)}' for k, v in value.items())}}}"
    return repr(value)


def some(names: Sequence[Any]) -> str:
    """Return a list of names, of which a long one shows only the first."""
    names = list(names)
    if len(names) <= MOST_NAMES:
        return short(names, 2 * LONGEST)
    return f"{short(names[:MOST_NAMES], 2 * LONGEST)} and {len(names) - MOST_NAMES} more"


def given(value: Any) -> str:
    """Return what a value is, for a sentence that ends in "got ..."."""
    name = type(value).__name__
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, (types.FunctionType, types.BuiltinFunctionType)):
        return "a lambda" if value.__name__ == "<lambda>" else f"the function {value.__name__}"
    if isinstance(value, types.MethodType):
        return f"the method {value.__name__}"
    if isinstance(value, functools.partial):
        return f"a partial of {given(value.func)}"
    if isinstance(value, nn.Module):
        return f"the network {name}"
    if isinstance(value, Tensor):
        return short(value)
    if is_optimizer(value):
        return f"the optimizer {name}"
    article = "an" if name[:1] in "AEIOUaeiou" else "a"
    if isinstance(value, (list, tuple, Mapping)):
        return f"{article} {name} of length {len(value)}"
    if is_read_once(value) or " object at 0x" in repr(value):
        return f"{article} {name}"
    return f"{name}: {short(value)}" if value is not None else "None"


def is_read_once(value: Any) -> bool:
    """Whether a value is an iterator or a view of a dict, which no library takes for a tree."""
    return isinstance(value, (Iterator, ValuesView, type({}.keys()), type({}.items())))


def is_optimizer(value: Any) -> bool:
    """Whether a value is an optimizer, of torch or differentiable."""
    return isinstance(value, torch.optim.Optimizer) or hasattr(type(value), "extract_state")


def is_number(value: Any) -> bool:
    """Whether a value is a plain number."""
    return isinstance(value, numbers.Real)


def is_of_schedules(value: Any) -> bool:
    """Whether a function or class is one of ``torchopt.schedules``."""
    return f"{value.__module__}.".startswith("torchopt.schedules.")
