r"""Trees as flat vectors of reals, and arithmetic of batches of such vectors.

A complex number is a pair of reals, so that every operator that is linear over the reals can be
solved with (the Hessian of a real function of complex parameters is not linear over the complex
numbers), and the inner product :math:`\mathrm{Re} \langle x, y \rangle` conjugates what has to
be. Its adjoint is what autograd computes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from torchopt.base import layout, tree
from torchopt.base.layout import is_inexact
from torchopt.base.misuse.given import given
from torchopt.typing import TensorTree


#: Relative tolerances where none is given.
RTOL = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}


class Layout(layout.Layout):
    """How the leaves of a right-hand side lie in one vector of reals."""

    def __init__(self, like: TensorTree, what: str = "b") -> None:
        super().__init__(like, what)
        self.like = like
        kinds = [dtype for dtype in self.dtypes if dtype is not None]
        self.is_real = not any(dtype.is_complex for dtype in kinds)
        #: A relative tolerance that can be reached in the coarsest of their dtypes.
        self.rtol = max(RTOL[torch.empty(0, dtype=dtype).real.dtype] for dtype in kinds)

    def flatten(self, given_tree: TensorTree, what: str) -> Tensor:
        """Return the entries of a tree of the same structure and shapes as a new vector.

        Raises:
            ValueError: If structure or shapes differ.
            TypeError: If a leaf is of another kind: complex where it should be real, no tensor.
        """
        leaves = tree.flatten_like(given_tree, self.like, self.spec, what, "b")
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
        return self.join(leaves)


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
