"""The unknowns of a condition: a tree of tensors as a flat tuple of reals, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchopt.base import tree
from torchopt.base.misuse.given import given
from torchopt.base.numerics import as_pairs, from_pairs
from torchopt.diff.pullback import Tensors
from torchopt.typing import PyTree


class Unknowns:
    """How a solution lies in a tuple of real tensors.

    A complex tensor is one of pairs: a condition need not be holomorphic. ``None`` is no unknown.

    Args:
        solution: Any tree of floating-point or complex tensors.
        what: What an error calls it.

    Raises:
        TypeError: If a leaf is something else.
        ValueError: If there is none.
    """

    def __init__(self, solution: PyTree, what: str) -> None:
        self.solution = solution
        leaves, self.spec = tree.flatten(solution)
        self.names = tree.leaf_names(solution)
        for name, leaf in zip(self.names, leaves):
            if leaf is not None and not _is_real_or_complex(leaf):
                raise TypeError(
                    f"{what} must consist of floating-point or complex tensors, got {given(leaf)} "
                    f"at {tree.quoted(name)}. Return what is no unknown as aux: `return x, aux` "
                    "with has_aux=True."
                )
        present = [x for x in leaves if x is not None]
        if not present:
            raise ValueError(f"{what} holds no tensor, got {given(solution)}.")
        self.values: Tensors = tuple(_real(x) for x in present)
        # of one member, also where the values are a batch
        self.likes = [(x.shape, x.dtype) for x in self.values]
        self.complex = [None if x is None else x.is_complex() for x in leaves]

    def tree(self, values: Tensors) -> PyTree:
        """Return a tuple of reals as a tree like the solution."""
        parts = iter(values)
        leaves = [None if kind is None else _restored(next(parts), kind) for kind in self.complex]
        return tree.unflatten(self.spec, leaves)

    def pairs(self, values: Tensors) -> PyTree:
        """Return a tuple of reals as a tree with complex tensors left as pairs."""
        parts = iter(values)
        leaves = [None if kind is None else next(parts) for kind in self.complex]
        return tree.unflatten(self.spec, leaves)

    def flat(self, like: PyTree, what: str, advice: str = "") -> Tensors:
        """Return a tree like the solution as a tuple of reals.

        Raises:
            TypeError: If a leaf is no tensor.
            ValueError: If it has another structure or other shapes.
        """
        return self._flat(like, what, advice, pairs=False)

    def flat_pairs(self, like: PyTree, what: str) -> Tensors:
        """Return what :meth:`pairs` made as a tuple of reals."""
        return self._flat(like, what, "", pairs=True)

    def _flat(self, like: PyTree, what: str, advice: str, pairs: bool) -> Tensors:
        result: list[Tensor] = []
        for name, kind, x in zip(self.names, self.complex, self._matched(like, what, advice)):
            if kind is None:
                continue
            if not isinstance(x, Tensor):
                raise TypeError(
                    f"{what} must hold tensors, got {given(x)} at {tree.quoted(name)}.{advice}"
                )
            shape, dtype = self.likes[len(result)]
            if kind and not pairs:
                x = as_pairs(x if x.is_complex() else torch.complex(x, 0 * x))
            if x.shape != shape:
                raise ValueError(
                    f"{what} must have the shapes of the solution: {tuple(shape)} at "
                    f"{tree.quoted(name)}, got {tuple(x.shape)}.{advice}"
                )
            result.append(x.to(dtype))
        return tuple(result)

    def _matched(self, like: PyTree, what: str, advice: str) -> list[Any]:
        """Return the leaves of a tree like the solution, which may be a tuple for a list."""
        try:
            return tree.flatten_like(like, self.solution, self.spec, what, "the solution")
        except ValueError as error:
            raise ValueError(f"{error}{advice}") from None


def _is_real_or_complex(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def _real(x: Tensor) -> Tensor:
    return as_pairs(x) if x.is_complex() else x


def _restored(x: Tensor, is_complex: bool) -> Tensor:
    return from_pairs(x) if is_complex else x
