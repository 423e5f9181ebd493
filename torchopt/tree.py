"""Pytrees: the only file that names the pytree library (optree).

``None`` is always a leaf here, so that a missing gradient stays aligned with its parameter.
Classes registered with optree globally or under the namespace ``"torchopt"`` are nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import optree
import torch
from torch.utils import _pytree as torch_pytree

from torchopt import misuse
from torchopt.typing import PyTree


NAMESPACE = "torchopt"

# torch.compile sees through optree on 2.13; on 2.6 it does not, and PyTorch's own pytrees stand in
# (there, a class registered with optree alone is a leaf).
_COMPILER_KNOWS_OPTREE = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 13)


def _use_torch_pytree() -> bool:
    return not _COMPILER_KNOWS_OPTREE and torch.compiler.is_compiling()


def flatten(tree: PyTree) -> tuple[list[Any], Any]:
    """Return the leaves of ``tree`` and its structure."""
    if _use_torch_pytree():
        return torch_pytree.tree_flatten(tree)
    leaves, spec = optree.tree_flatten(tree, none_is_leaf=True, namespace=NAMESPACE)
    return leaves, spec


def unflatten(spec: Any, leaves: Sequence[Any]) -> PyTree:
    """Build the tree with structure ``spec`` from ``leaves``."""
    if _use_torch_pytree():
        return torch_pytree.tree_unflatten(leaves, spec)
    return optree.tree_unflatten(spec, leaves)


def tree_map(function: Callable[..., Any], tree: PyTree) -> PyTree:
    """Apply ``function`` to every leaf that is not ``None``."""
    leaves, spec = flatten(tree)
    return unflatten(spec, [None if leaf is None else function(leaf) for leaf in leaves])


def leaf_paths(tree: PyTree) -> list[tuple[Any, ...]]:
    """Return the path of every leaf, in the order of :func:`flatten`."""
    return optree.tree_paths(tree, none_is_leaf=True, namespace=NAMESPACE)


def leaf_names(tree: PyTree) -> list[str]:
    """Return a dotted name for every leaf, in the order of :func:`flatten`."""
    return [dotted(path) for path in leaf_paths(tree)]


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Return the leaves by dotted name.

    Plain containers are walked here: torch.compile cannot look into optree for trees of constants.
    """
    if type(tree) not in (dict, list, tuple):
        leaves = flatten(tree)[0]
        return dict(zip(leaf_names(tree), leaves))
    named: dict[str, Any] = {}
    for key, child in tree.items() if isinstance(tree, dict) else enumerate(tree):
        for name, leaf in named_leaves(child).items() if _is_plain(child) else [("", child)]:
            named[f"{key}.{name}" if name else str(key)] = leaf
    return named


def _is_plain(value: Any) -> bool:
    return not (value is None or isinstance(value, (int, float, torch.Tensor)))


def dotted(path: tuple[Any, ...]) -> str:
    """Join a path by dots, as PyTorch names parameters; the root is the empty string."""
    return ".".join(str(entry) for entry in path)


def quoted(name: str) -> str:
    """Return a leaf name as error messages show it."""
    return repr(name) if name else "the root"


def flatten_like(tree: PyTree, reference: PyTree, spec: Any, what: str, like: str) -> list[Any]:
    """Return the leaves of ``tree``, which must have the structure of ``reference``.

    Trees with the same leaf paths match, so that the tuple which ``torch.autograd.grad`` returns
    fits a list of parameters, and dicts match whatever the order of their keys.

    Raises:
        ValueError: Naming the first path at which the two structures differ.
    """
    leaves, tree_spec = flatten(tree)
    if tree_spec == spec:
        return leaves
    paths, expected = leaf_paths(tree), leaf_paths(reference)
    if paths == expected:
        return leaves
    by_path = dict(zip(paths, leaves))
    if len(paths) != len(expected) or by_path.keys() != set(expected):
        misuse.check_trees({what: tree, like: reference})
        difference = first_difference(paths, expected)
        kinds = misuse.different_kinds(what, tree, like, reference)
        raise ValueError(f"{what} do not match {like}: {difference}.{kinds}")
    return [by_path[path] for path in expected]


def unflatten_like(target: PyTree, reference: PyTree, spec: Any, leaves: Sequence[Any]) -> PyTree:
    """Build a tree like ``target`` from leaves in the order of ``reference``; same leaf paths."""
    target_spec = flatten(target)[1]
    if target_spec == spec:
        return unflatten(target_spec, leaves)  # dicts that are equal may differ in their order
    by_path = dict(zip(leaf_paths(reference), leaves))
    return unflatten(target_spec, [by_path[path] for path in leaf_paths(target)])


def first_difference(paths: Sequence[Any], expected: Sequence[Any]) -> str:
    """Say in words where two sequences of paths (or names) first differ."""
    given, wanted = set(paths), set(expected)
    for path in expected:
        if path not in given:
            return f"{_show(path)} is missing"
    for path in paths:
        if path not in wanted:
            return f"{_show(path)} was not expected"
    return "the same names stand in another order"


def _show(path: Any) -> str:
    return quoted(dotted(path) if isinstance(path, tuple) else path)


def register_node(
    cls: type,
    flatten_function: Callable[[Any], tuple[Sequence[Any], Any]],
    unflatten_function: Callable[[Any, Any], Any],
    path_entries: Callable[[Any], tuple[Any, ...]],
) -> None:
    """Make ``cls`` a node both for optree and for PyTorch's own pytrees (``vmap``, ``compile``)."""

    def optree_flatten(node: Any) -> tuple[Any, Any, Any]:
        children, metadata = flatten_function(node)
        return tuple(children), metadata, path_entries(node)

    def flatten_with_keys(node: Any) -> tuple[list[Any], Any]:
        children, metadata = flatten_function(node)
        keys = [torch_pytree.GetAttrKey(str(entry)) for entry in path_entries(node)]
        return list(zip(keys, children)), metadata

    # in every namespace: a script's own optree.tree_map, or torchopt.pytree's, sees the leaves
    everywhere: Any = optree.registry.__GLOBAL_NAMESPACE  # pyright: ignore[reportAttributeAccessIssue]
    optree.register_pytree_node(cls, optree_flatten, unflatten_function, namespace=everywhere)
    torch_pytree.register_pytree_node(
        cls,
        lambda node: (list(flatten_function(node)[0]), flatten_function(node)[1]),
        lambda children, metadata: unflatten_function(metadata, children),
        serialized_type_name=f"torchopt.{cls.__name__}",
        flatten_with_keys_fn=flatten_with_keys,
    )


def is_leaf(tree: PyTree) -> bool:
    """Whether something is a leaf and no node of a tree."""
    return optree.tree_is_leaf(tree, none_is_leaf=True, namespace=NAMESPACE)
