"""Print and compare values that may contain tensors."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import torch
from torch import Tensor

from torchopt.base import tree
from torchopt.typing import PyTree


WITH_GRAPH = " with graph"


class _Shown(str):
    """A string that is printed without quotes inside dicts and lists."""

    def __repr__(self) -> str:
        return str(self)


def describe(value: PyTree) -> str:
    """Print a tree with its tensors as dtype and shape."""
    return repr(tree.tree_map(_describe_leaf, value))


def _describe_leaf(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    dtype = str(leaf.dtype).removeprefix("torch.")
    text = f"{dtype}{list(leaf.shape)}"
    if leaf.grad_fn is not None:
        text += WITH_GRAPH
    return _Shown(text)


#: Of how many hyperparameters in a row all are printed, and how many of more.
ALL, FIRST = 4, 2


def describe_values(value: Any) -> str:
    """Print a hyperparameter: a learned number by its value, and of many the first ones."""
    if isinstance(value, Tensor):
        return _described_number(value)
    if not isinstance(value, (dict, list, tuple)) or hasattr(value, "_fields"):
        return describe(value)
    if isinstance(value, dict):
        entries = [f"{key!r}: {describe_values(x)}" for key, x in value.items()]
    else:
        entries = list(map(describe_values, value))
    numbers = all(isinstance(x, (Tensor, int, float)) for x in tree.flatten(value)[0])
    if numbers and len(entries) > ALL:
        entries[FIRST:] = [f"... {len(entries)} in all"]
    opening, closing = {dict: "{}", list: "[]"}.get(type(value), "()")
    comma = "," if closing == ")" and len(entries) == 1 else ""
    return f"{opening}{', '.join(entries)}{comma}{closing}"


def _described_number(x: Tensor) -> str:
    """Return the value of a 0-d tensor, dtype and shape of others, and whether it is learned."""
    text, is_number = repr(_describe_leaf(x)).removesuffix(WITH_GRAPH), False
    if x.dim() == 0:
        with contextlib.suppress(Exception):  # one that is mapped, traced or without data has none
            value = x.item()
            text, is_number = repr(float(f"{value:.4g}") if x.is_floating_point() else value), True
    if x.grad_fn is not None:
        return text + WITH_GRAPH
    if x.requires_grad:
        return f"{text} (learned)"
    return f"tensor({text})" if is_number else text


def same(a: Any, b: Any) -> bool:
    """Whether two hyperparameters are equal; tensors by dtype and entries."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return (
            isinstance(a, Tensor)
            and isinstance(b, Tensor)
            and (a is b or (a.dtype == b.dtype and torch.equal(a, b)))
        )
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if dataclasses.is_dataclass(a) and type(a) is type(b) and type(a).__eq__ is not object.__eq__:
        fields = [f for f in dataclasses.fields(a) if f.compare]
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields)
    return bool(a == b)


def is_plain(value: Any) -> bool:
    """Whether a value neither changes nor holds a tensor or code: numbers, text, their tuples."""
    if isinstance(value, tuple):
        return all(map(is_plain, value))
    return value is None or type(value) in (bool, int, float, str)
