"""Trees: everything that ``optree`` has, and arithmetic over trees of tensors.

Parameters, gradients and :class:`~torchopt.OptState` are trees. ``torchopt.pytree.tree_map``,
``tree_leaves``, ``tree_iter`` and all other functions of optree are found here under their names.

Example:
    >>> import torch, torchopt
    >>> from torchopt import pytree
    >>> state = torchopt.sgd(0.1, momentum=0.9).init({"w": torch.ones(2)})
    >>> doubled = pytree.tree_map(lambda x: 2 * x, pytree.tree_add(state, state))
    >>> [leaf for leaf in pytree.tree_leaves(doubled) if leaf.dim()]
    [tensor([0., 0.])]
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import optree
import torch

from torchopt.typing import PyTree, TensorTree


def __getattr__(name: str) -> Any:
    if not hasattr(optree, name):
        raise AttributeError(
            f"Neither torchopt.pytree nor optree has {name!r}; see docs/coming_from/torchopt.md."
        )
    return getattr(optree, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *optree.__all__})


def tree_flatten_as_tuple(
    tree: PyTree,
    is_leaf: Callable[[Any], bool] | None = None,
    *,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> tuple[tuple[Any, ...], Any]:
    """Return the leaves as a tuple, and the structure."""
    leaves, spec = optree.tree_flatten(
        tree, is_leaf, none_is_leaf=none_is_leaf, namespace=namespace
    )
    return tuple(leaves), spec


def tree_pos(tree: PyTree) -> PyTree:
    """Return ``+leaf`` for each leaf."""
    return optree.tree_map(operator.pos, tree)


def tree_neg(tree: PyTree) -> PyTree:
    """Return ``-leaf`` for each leaf."""
    return optree.tree_map(operator.neg, tree)


def tree_add(*trees: PyTree) -> PyTree:
    """Return the sum of trees."""
    return _folded(operator.add, trees)


def tree_add_scalar_mul(tree_x: TensorTree, tree_y: TensorTree, alpha: Any = None) -> TensorTree:
    """Return ``x + alpha * y``; ``None`` is 1."""
    factor = 1 if alpha is None else alpha
    return optree.tree_map(lambda x, y: x + factor * y, tree_x, tree_y)


def tree_sub(minuend: PyTree, subtrahend: PyTree) -> PyTree:
    """Return the difference of two trees."""
    return optree.tree_map(operator.sub, minuend, subtrahend)


def tree_sub_scalar_mul(tree_x: TensorTree, tree_y: TensorTree, alpha: Any = None) -> TensorTree:
    """Return ``x - alpha * y``; ``None`` is 1."""
    factor = 1 if alpha is None else alpha
    return optree.tree_map(lambda x, y: x - factor * y, tree_x, tree_y)


def tree_mul(*trees: PyTree) -> PyTree:
    """Return the product of trees, leaf by leaf."""
    return _folded(operator.mul, trees)


def tree_matmul(*trees: PyTree) -> PyTree:
    """Return the matrix product of trees, leaf by leaf."""
    return _folded(operator.matmul, trees)


def tree_scalar_mul(scalar: Any, tree: PyTree) -> PyTree:
    """Return ``scalar * leaf`` for each leaf."""
    return optree.tree_map(lambda x: scalar * x, tree)


def tree_truediv(dividend: PyTree, divisor: PyTree) -> PyTree:
    """Return the quotient of two trees, leaf by leaf."""
    return optree.tree_map(operator.truediv, dividend, divisor)


def tree_vdot_real(tree_x: TensorTree, tree_y: TensorTree) -> float:
    """Return the real part of the inner product of two trees taken as vectors; waits for devices.

    Example:
        >>> import torch
        >>> from torchopt import pytree
        >>> pytree.tree_vdot_real([torch.tensor([1.0, 2.0])], [torch.tensor([3.0, 4.0])])
        11.0
    """
    leaves, spec = optree.tree_flatten(tree_x)
    pairs = zip(leaves, spec.flatten_up_to(tree_y))
    return sum((_vdot_real(x, y) for x, y in pairs), 0.0)


def tree_wait(futures: PyTree) -> PyTree:
    """Return the results of a tree of :class:`torch.futures.Future`."""
    leaves, spec = optree.tree_flatten(futures)
    return optree.tree_unflatten(spec, torch.futures.wait_all(leaves))


def _folded(operation: Callable[[Any, Any], Any], trees: tuple[PyTree, ...]) -> PyTree:
    return optree.tree_map(lambda *leaves: functools.reduce(operation, leaves), *trees)


def _vdot_real(x: Any, y: Any) -> float:
    product = x.conj() * y if x.is_complex() or y.is_complex() else x * y
    return product.sum().real.item()
