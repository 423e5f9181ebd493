"""A digest of what a step computes with, to tell one run from another."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import types
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


_NUMBERS = (bool, int, float, complex, str, bytes, type(None))
_DEEPEST = 12
_LIBRARIES = {"torch", "torchopt"}  # their code is told by the versions


def digest(*values: Any) -> str:
    """Return a digest of values: tensors by their bits, functions by code and what they close over.

    Of objects that are neither data nor code only the class counts, for they may hold caches.
    """
    state = hashlib.blake2b(digest_size=16)
    _add(state, values, {}, 0)
    return state.hexdigest()


def _add(state: Any, value: Any, seen: dict[int, Any], depth: int) -> None:
    if isinstance(value, _NUMBERS):
        state.update(f"{type(value).__name__}:{value!r};".encode())
    elif isinstance(value, Tensor):
        _add_tensor(state, value)
    elif id(value) in seen or depth > _DEEPEST:
        state.update(b"again;")
    else:
        seen[id(value)] = value  # held, so that nothing else gets its id
        state.update(f"{type(value).__module__}.{type(value).__qualname__}(".encode())
        for part in _parts(value):
            _add(state, part, seen, depth + 1)
        state.update(b")")


def _add_tensor(state: Any, tensor: Tensor) -> None:
    state.update(f"{tensor.dtype}{tuple(tensor.shape)}:".encode())
    if tensor.is_meta or tensor.numel() == 0:
        return
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    memory = (ctypes.c_char * (flat.numel() * flat.element_size())).from_address(flat.data_ptr())
    state.update(memory)


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, (tuple, list)):
        return value
    if isinstance(value, dict):
        return [part for pair in value.items() for part in pair]
    if isinstance(value, (set, frozenset)):
        return sorted((x for x in value if isinstance(x, _NUMBERS)), key=repr)
    if isinstance(value, functools.partial):
        return value.func, value.args, value.keywords
    if isinstance(value, types.MethodType):
        return value.__func__, value.__self__
    if isinstance(value, types.FunctionType):
        return _parts_of_function(value)
    if isinstance(value, types.CodeType):
        return value.co_code, value.co_names, value.co_varnames, value.co_consts
    if isinstance(value, nn.Module):
        tensors = (*value.named_parameters(), *value.named_buffers())
        return [*tensors, *((name, part.training) for name, part in value.named_modules())]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, f.name) for f in dataclasses.fields(value) if f.compare]
    return (getattr(value, "__qualname__", ""),)


def _parts_of_function(function: types.FunctionType) -> list[Any]:
    library = (function.__module__ or "").partition(".")[0] in _LIBRARIES
    parts: list[Any] = [function.__qualname__, function.__defaults__, function.__kwdefaults__]
    if not library:
        parts.append(function.__code__)
    for cell in function.__closure__ or ():
        try:
            parts.append(cell.cell_contents)
        except ValueError:  # a variable that has no value yet
            parts.append(None)
    known = {} if library else function.__globals__
    names = [name for name in function.__code__.co_names if name in known]
    return [*parts, *((n, known[n]) for n in names if not isinstance(known[n], types.ModuleType))]
