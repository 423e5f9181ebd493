"""Pytrees: the only file that names the pytree library (optree).

``None`` is always a leaf here, so that a missing gradient stays aligned with its parameter.
Classes registered with optree globally or under the namespace ``"torchopt"`` are nodes.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import optree
import torch
from optree.utils import total_order_sorted

from torchopt.base import misuse
from torchopt.base.torch_internals import node_type, torch_pytree
from torchopt.typing import PyTree


NAMESPACE = "torchopt"

# torch.compile sees through optree on 2.13; below it does not: trees are walked in Python there,
# through the nodes that torch knows (a class registered with optree alone is a leaf).
_COMPILER_KNOWS_OPTREE = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 13)


def compiler_is_old() -> bool:
    """Whether a compiler is at work that has to be shown plain Python only.

    It does not see through optree, and ``is`` between dicts that hold tensors ends it.
    """
    return not _COMPILER_KNOWS_OPTREE and torch.compiler.is_compiling()


#: How the children of our own nodes are called; those of other classes are counted.
_ENTRIES: dict[type, Callable[[Any], tuple[Any, ...]]] = {}


class _Walked:
    """The structure of a tree that has been walked: what :func:`flatten` returns for ``spec``.

    Leaves stand in the order of optree whoever asks, and come with their paths from one walk: some
    of the functions here may be compiled and others not.
    """

    def __init__(self, root: Any, paths: list[tuple[Any, ...]]) -> None:
        self.root = root  # None for a leaf, or (class, context, entries, roots)
        self.paths = paths
        self.num_leaves = len(paths)


def _walk(
    node: PyTree, path: tuple[Any, ...], leaves: list[Any], paths: list[tuple[Any, ...]]
) -> Any:
    """Append the leaves of a node and their paths, and return its structure."""
    kind = node_type(node)
    if kind not in torch_pytree.SUPPORTED_NODES:
        leaves.append(node)
        paths.append(path)
        return None
    if kind in (dict, OrderedDict, defaultdict):
        given = list(node.keys())
        entries = given if kind is OrderedDict else _sorted(given)
        children = [node[key] for key in entries]
        context: Any = (given, node.default_factory if kind is defaultdict else None)
    else:
        children, context = torch_pytree.SUPPORTED_NODES[kind].flatten_fn(node)
        entries = list(_ENTRIES[kind](node) if kind in _ENTRIES else range(len(children)))
    roots = [_walk(child, (*path, entry), leaves, paths) for entry, child in zip(entries, children)]
    return kind, context, entries, roots


def _sorted(keys: list[Any]) -> list[Any]:
    """Return the keys of a dict in the order of optree."""
    return sorted(keys) if {type(key) for key in keys} <= {str} else total_order_sorted(keys)


def _rebuild(root: Any, leaves: list[Any]) -> PyTree:
    """Build a node; ``leaves`` are taken from the end."""
    if root is None:
        return leaves.pop()
    kind, context, entries, roots = root
    children = [_rebuild(child, leaves) for child in roots]
    if kind not in (dict, OrderedDict, defaultdict):
        return torch_pytree.SUPPORTED_NODES[kind].unflatten_fn(children, context)
    given, factory = context
    by_key = dict(zip(entries, children))
    items = {key: by_key[key] for key in given}  # in the order they had
    if kind is dict:
        return items
    return OrderedDict(items) if kind is OrderedDict else defaultdict(factory, items)


def flatten(tree: PyTree) -> tuple[list[Any], Any]:
    """Return the leaves of ``tree`` and its structure."""
    if compiler_is_old():
        leaves: list[Any] = []
        paths: list[tuple[Any, ...]] = []
        root = _walk(tree, (), leaves, paths)
        return leaves, _Walked(root, paths)
    leaves, spec = optree.tree_flatten(tree, none_is_leaf=True, namespace=NAMESPACE)
    return leaves, spec


def unflatten(spec: Any, leaves: Sequence[Any]) -> PyTree:
    """Build the tree with structure ``spec`` from ``leaves``."""
    if isinstance(spec, _Walked):
        return _rebuild(spec.root, list(reversed(leaves)))
    return optree.tree_unflatten(spec, leaves)


def tree_map(function: Callable[..., Any], tree: PyTree) -> PyTree:
    """Apply ``function`` to every leaf that is not ``None``."""
    leaves, spec = flatten(tree)
    return unflatten(spec, [None if leaf is None else function(leaf) for leaf in leaves])


def leaf_paths(tree: PyTree) -> list[tuple[Any, ...]]:
    """Return the path of every leaf, in the order of :func:`flatten`."""
    if compiler_is_old():
        return flatten(tree)[1].paths
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
    if type(spec) is not _Walked and type(tree_spec) is not _Walked and tree_spec == spec:
        return leaves
    paths, expected = leaf_paths(tree), leaf_paths(reference)
    if paths == expected:
        return leaves
    by_path = dict(zip(paths, leaves))
    if len(paths) != len(expected) or by_path.keys() != set(expected):
        _refuse_mismatch(tree, reference, what, like)
    return [by_path[path] for path in expected]


def _refuse_mismatch(tree: PyTree, reference: PyTree, what: str, like: str) -> NoReturn:
    misuse.check_trees({what: tree, like: reference})
    paths, expected = leaf_paths(tree), leaf_paths(reference)
    difference = f"{first_difference(paths, expected)}."
    kinds = misuse.different_kinds(what, tree, like, reference)
    if () in paths or () in expected:  # "the root is missing" says nothing to anyone
        difference, kinds = kinds[1:2].lower() + kinds[2:], ""
    verb = "do" if what.endswith("s") else "does"
    raise ValueError(f"{what} {verb} not match {like}: {difference}{kinds}")


def unflatten_like(target: PyTree, reference: PyTree, spec: Any, leaves: Sequence[Any]) -> PyTree:
    """Build a tree like ``target`` from leaves in the order of ``reference``; same leaf paths."""
    return each_unflattened_like(target, reference, spec, [leaves])[0]


def each_unflattened_like(
    target: PyTree, reference: PyTree, spec: Any, columns: Sequence[Sequence[Any]]
) -> list[PyTree]:
    """Do what :func:`unflatten_like` does with each of several lists of leaves."""
    if not columns:
        return []
    target_spec = flatten(target)[1]
    walked = type(spec) is _Walked or type(target_spec) is _Walked
    if not walked and target_spec == spec:  # dicts that are equal may differ in their order
        return [unflatten(target_spec, leaves) for leaves in columns]
    from_paths, to_paths = leaf_paths(reference), leaf_paths(target)
    result: list[PyTree] = []
    for leaves in columns:
        by_path = dict(zip(from_paths, leaves))
        result.append(unflatten(target_spec, [by_path[path] for path in to_paths]))
    return result


def first_difference(paths: Sequence[Any], expected: Sequence[Any]) -> str:
    """Say in words where two sequences of paths (or names) first differ."""
    given, wanted = set(paths), set(expected)
    if given != wanted and () in given | wanted:  # "the root is missing" says nothing to anyone
        other = [_show(path) for path in (paths if () in wanted else expected)]
        shown = ", ".join([*other[:3], *(["..."] if len(other) > 3 else [])]) or "no leaves"
        return (
            f"{shown} instead of a single leaf" if () in wanted else f"a single leaf, not {shown}"
        )
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
    torch_keys: Callable[[Any], Sequence[Any]] | None = None,
) -> None:
    """Make ``cls`` a node both for optree and for PyTorch's own pytrees (``vmap``, ``compile``).

    ``torch_keys`` returns the keys of the children in PyTorch's form; by default attributes.
    """

    def optree_flatten(node: Any) -> tuple[Any, Any, Any]:
        children, metadata = flatten_function(node)
        return tuple(children), metadata, path_entries(node)

    def flatten_with_keys(node: Any) -> tuple[list[Any], Any]:
        children, metadata = flatten_function(node)
        attributes = [torch_pytree.GetAttrKey(str(entry)) for entry in path_entries(node)]
        keys = attributes if torch_keys is None else torch_keys(node)
        return list(zip(keys, children)), metadata

    # in every namespace: a script's own optree.tree_map, or torchopt.pytree's, sees the leaves
    everywhere: Any = optree.registry.__GLOBAL_NAMESPACE  # pyright: ignore[reportAttributeAccessIssue]
    optree.register_pytree_node(cls, optree_flatten, unflatten_function, namespace=everywhere)
    _ENTRIES[cls] = path_entries
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
