"""How the leaves of a tree lie in one flat vector of reals."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchopt.base import tree
from torchopt.base.misuse.given import given
from torchopt.base.numerics import as_pairs, from_pairs, to_compute_dtype
from torchopt.typing import TensorTree


class Layout:
    """How the leaves of a tree lie in one vector, each after the other in the order of the tree.

    The vector has the widest real dtype of the leaves, float32 for half precision; complex numbers
    are pairs of reals; each leaf comes back in its own dtype. ``None`` stays ``None``.

    Args:
        like: The tree.
        what: What an error calls it.
        advice: What to do with leaves of another kind.

    Raises:
        TypeError: If a leaf is no tensor of floating-point or complex numbers.
        ValueError: If there is none, or they are on several devices.
    """

    def __init__(self, like: TensorTree, what: str, advice: str = "") -> None:
        leaves, self.spec = tree.flatten(like)
        for k, leaf in enumerate(leaves):
            if leaf is not None and not is_inexact(leaf):
                name = tree.quoted(tree.leaf_names(like)[k])
                raise TypeError(
                    f"{what} must be tensors of floating-point or complex numbers, got "
                    f"{given(leaf)} at {name}.{advice}"
                )
        present = [leaf for leaf in leaves if leaf is not None]
        devices = {leaf.device for leaf in present}
        if len(devices) != 1:
            found = f"tensors on {', '.join(map(str, devices))}" if devices else "none"
            raise ValueError(
                f"{what} must have at least one entry and be on one device, got {found}."
            )
        self.device = devices.pop()
        self.shapes = [None if leaf is None else leaf.shape for leaf in leaves]
        self.dtypes = [None if leaf is None else leaf.dtype for leaf in leaves]
        self.dtype = functools.reduce(torch.promote_types, map(_real_dtype, present))
        self.sizes = [leaf.numel() * (2 if leaf.is_complex() else 1) for leaf in present]
        self.numel = sum(self.sizes)

    def join(self, leaves: Sequence[Tensor | None]) -> Tensor:
        """Return the entries of leaves as a new vector."""
        pairs = zip(leaves, self.dtypes)
        return torch.cat([self.reals(leaf, kind) for leaf, kind in pairs if leaf is not None])

    def reals(self, leaf: Tensor, dtype: torch.dtype | None) -> Tensor:
        """Return the entries of one leaf, whose place is of a dtype, as a vector."""
        if dtype is not None and dtype.is_complex:
            leaf = as_pairs(leaf.to(dtype))
        return leaf.reshape(-1).to(self.dtype)

    def leaves(self, x: Tensor) -> list[Any]:
        """Return a vector as leaves, in the dtypes that they had."""
        parts = iter(x.split(self.sizes))
        return [
            None if shape is None or dtype is None else _shaped(next(parts), shape, dtype)
            for shape, dtype in zip(self.shapes, self.dtypes)
        ]

    def unflatten(self, x: Tensor) -> TensorTree:
        """Return a vector as a tree, in the dtypes that its leaves had."""
        return tree.unflatten(self.spec, self.leaves(x))


def is_inexact(leaf: Any) -> bool:
    """Whether something is a tensor of floating-point or complex numbers."""
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def _real_dtype(leaf: Tensor) -> torch.dtype:
    return to_compute_dtype(torch.empty(0, dtype=leaf.dtype).real).dtype


def _shaped(part: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    if dtype.is_complex:
        part = from_pairs(part.reshape(*shape, 2))
    return part.reshape(shape).to(dtype)
