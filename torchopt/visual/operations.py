"""What autograd tells about one operation: its name, its results, what it has saved."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor


#: What is said of saved tensors that cannot be read.
OVERWRITTEN, FREED = "overwritten in place", "freed by an earlier backward pass"


def operation_label(name: str) -> str:
    """Return ``Mul`` for ``MulBackward0``, ``TanhBackward`` for ``TanhBackwardBackward0``."""
    short = name.rsplit("::", 1)[-1].lstrip("_")
    return re.sub(r"Backward\d*$", "", short) or short


def output_metadata(node: Any) -> list[tuple[tuple[int, ...], str]]:
    """Return shape and dtype of what an operation returned."""
    return [
        (tuple(int(n) for n in entry.shape), str(entry.dtype).removeprefix("torch."))
        for entry in getattr(node, "_input_metadata", ())
    ]


_ATTRIBUTES: WeakKeyDictionary[type, tuple[list[str], list[str]]] = WeakKeyDictionary()


def _attribute_names(node: Any) -> tuple[list[str], list[str]]:
    """Return the names of what a node has saved: plain values, and tensors."""
    kind = type(node)
    if kind not in _ATTRIBUTES:
        names = [name for name in dir(kind) if name.startswith("_saved_")]
        tensors = [name for name in names if hasattr(kind, f"_raw{name}")]
        _ATTRIBUTES[kind] = ([name for name in names if name not in tensors], tensors)
    return _ATTRIBUTES[kind]


def attributes(node: Any) -> dict[str, Any]:
    """Return the plain values that an operation has saved, such as ``dim``."""
    names = _attribute_names(node)[0]
    return {name.removeprefix("_saved_"): _signed(getattr(node, name)) for name in names}


def _signed(value: Any) -> Any:
    """Return -1 for 18446744073709551615: autograd hands out integers as if they had no sign."""
    if type(value) is int and value >= 2**63:
        return value - 2**64
    if isinstance(value, list):
        return [_signed(entry) for entry in value]
    if isinstance(value, tuple):
        return tuple(_signed(entry) for entry in value)
    return value


def saved_tensors(node: Any) -> Iterator[tuple[str, Tensor | str]]:
    """Yield the tensors that an operation has saved; a text where one is there no longer.

    Hooks of saved tensors (``checkpoint``, ``save_on_cpu``) run.
    """
    names = _attribute_names(node)[1]
    # hasattr of the node itself would read them
    for name in names or (["saved_tensors"] if hasattr(type(node), "saved_tensors") else []):
        try:
            saved = getattr(node, name)
        except RuntimeError as error:
            overwritten = "modified by an inplace operation" in str(error)
            yield name.removeprefix("_saved_"), OVERWRITTEN if overwritten else FREED
            continue
        for position, tensor in enumerate(saved if isinstance(saved, (list, tuple)) else [saved]):
            suffix = f"[{position}]" if isinstance(saved, (list, tuple)) else ""
            if isinstance(tensor, Tensor):
                yield name.removeprefix("_saved_") + suffix, tensor


def dtype_name(tensor: Tensor) -> str:
    """Return ``float32`` for ``torch.float32``."""
    return str(tensor.dtype).removeprefix("torch.")


def own_saved_tensors(node: Any) -> Iterator[Tensor]:
    """Yield the tensors that an operation keeps itself; no hooks run."""
    for name in _attribute_names(node)[1]:
        try:
            raw = getattr(node, f"_raw{name}")
            saved = getattr(node, name) if not _is_hooked(raw) else None
        except RuntimeError:  # freed, or overwritten
            continue
        for tensor in saved if isinstance(saved, (list, tuple)) else [saved]:
            if isinstance(tensor, Tensor):
                yield tensor


def _is_hooked(raw: Any) -> bool:
    entries = raw if isinstance(raw, (list, tuple)) else [raw]
    return any(getattr(entry, "unpack_hook", None) is not None for entry in entries)


def is_builtin(node: Any) -> bool:
    """Whether a node belongs to an operation of torch, such as ``MulBackward0``."""
    return re.search(r"Backward\d+$", node.name()) is not None


def is_function_of_others(node: Any) -> bool:
    """Whether a node belongs to a ``torch.autograd.Function`` that is none of this library."""
    forward = getattr(type(node), "_forward_cls", None)
    return forward is not None and not forward.__module__.startswith("torchopt.")
