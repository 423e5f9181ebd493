r"""Trees as flat vectors of reals, and arithmetic of batches of such vectors.

A complex number is a pair of reals, so that every operator that is linear over the reals can be
solved with (the Hessian of a real function of complex parameters is not linear over the complex
numbers), and the inner product :math:`\mathrm{Re} \langle x, y \rangle` conjugates what has to
be. Its adjoint is what autograd computes.
"""

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


#: Relative tolerances where none is given.
RTOL = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}


class Layout:
    """How the leaves of a tree lie in one vector; ``None`` stays.

    The vector has the widest real dtype of the leaves, float32 for half precision; each leaf comes
    back in its own.

    Raises:
        TypeError: If a leaf is no tensor of floating-point or complex numbers.
        ValueError: If there is none, or they are on several devices.
    """

    def __init__(self, like: TensorTree, what: str = "b") -> None:
        self.like = like
        leaves, self.spec = tree.flatten(like)
        for k, leaf in enumerate(leaves):
            if leaf is not None and not is_inexact(leaf):
                name = tree.quoted(tree.leaf_names(like)[k])
                raise TypeError(
                    f"{what} must be tensors of floating-point or complex numbers, got "
                    f"{given(leaf)} at {name}."
                )
        present = [leaf for leaf in leaves if leaf is not None]
        devices = {leaf.device for leaf in present}
        if len(devices) != 1:
            found = f"tensors on {', '.join(map(str, devices))}" if devices else "none"
            raise ValueError(f"{what} must have tensors on one device, got {found}.")
        self.device = devices.pop()
        self.shapes = [None if leaf is None else leaf.shape for leaf in leaves]
        self.dtypes = [None if leaf is None else leaf.dtype for leaf in leaves]
        self.dtype = functools.reduce(torch.promote_types, map(_real_dtype, present))
        self.sizes = [leaf.numel() * (2 if leaf.is_complex() else 1) for leaf in present]
        self.numel = sum(self.sizes)
        self.is_real = not any(leaf.is_complex() for leaf in present)
        #: A relative tolerance that can be reached in the coarsest of their dtypes.
        self.rtol = max(RTOL[torch.empty(0, dtype=leaf.dtype).real.dtype] for leaf in present)

    def flatten(self, given_tree: TensorTree, what: str) -> Tensor:
        """Return the entries of a tree of the same structure and shapes as a new vector.

        Raises:
            ValueError: If structure or shapes differ.
            TypeError: If a leaf is of another kind: complex where it should be real, no tensor.
        """
        leaves = tree.flatten_like(given_tree, self.like, self.spec, what, "b")
        parts = []
        for k, (leaf, shape, dtype) in enumerate(zip(leaves, self.shapes, self.dtypes)):
            if shape is None and leaf is None:
                continue
            if not is_inexact(leaf) or shape is None or leaf.shape != shape:
                name = tree.quoted(tree.leaf_names(self.like)[k])
                wanted = None if shape is None else f"a tensor of shape {tuple(shape)}"
                raise ValueError(f"{what} must be like b: {wanted} at {name}, got {given(leaf)}.")
            if leaf.is_complex() and dtype is not None and not dtype.is_complex:
                name = tree.quoted(tree.leaf_names(self.like)[k])
                raise TypeError(f"{what} is complex at {name}, where b is real; make b complex.")
            parts.append(self._reals(leaf, dtype))
        return torch.cat(parts)

    def _reals(self, leaf: Tensor, dtype: torch.dtype | None) -> Tensor:
        if dtype is not None and dtype.is_complex:
            leaf = as_pairs(leaf.to(dtype))
        return leaf.reshape(-1).to(self.dtype)

    def unflatten(self, x: Tensor) -> TensorTree:
        """Return a vector as a tree, in the dtypes that its leaves had."""
        parts = iter(x.split(self.sizes))
        leaves = [
            None if shape is None or dtype is None else _shaped(next(parts), shape, dtype)
            for shape, dtype in zip(self.shapes, self.dtypes)
        ]
        return tree.unflatten(self.spec, leaves)


def is_inexact(leaf: Any) -> bool:
    """Whether something is a tensor of floating-point or complex numbers."""
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def _real_dtype(leaf: Tensor) -> torch.dtype:
    return to_compute_dtype(torch.empty(0, dtype=leaf.dtype).real).dtype


def _shaped(part: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    if dtype.is_complex:
        return from_pairs(part.reshape(*shape, 2)).to(dtype)
    return part.reshape(shape).to(dtype)


# Batches of vectors: the last dimension is that of the vector ------------------------------------


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Return the inner products, with a last dimension of one."""
    return (x * y).sum(-1, keepdim=True)


def norm(x: Tensor) -> Tensor:
    """Return the Euclidean norms, with a last dimension of one."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def over(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return the quotient, and 0 where the denominator is 0."""
    zero = denominator == 0
    return torch.where(zero, 0.0, numerator / torch.where(zero, 1.0, denominator))


def anything(mask: Tensor) -> bool:
    """Whether a mask holds anywhere; waits for the device."""
    return bool(mask.any())


def total(sizes: Sequence[int]) -> int:
    """Return the product of sizes."""
    return functools.reduce(lambda a, b: a * b, sizes, 1)
