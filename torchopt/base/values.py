"""Print and compare values that may contain tensors."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from torchopt.base import tree
from torchopt.typing import PyTree


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
        text += " with graph"
    return _Shown(text)


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
