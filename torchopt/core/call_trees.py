"""The lists of a call as trees of the user's, for functions of the user's, and back."""

from __future__ import annotations

from typing import Any

from torchopt.base import tree
from torchopt.core.engine import Call
from torchopt.typing import PyTree


def order_of(call: Call) -> list[int] | None:
    """Return where the leaves of ``call.reference`` stand in the lists; ``None`` if in order."""
    own, names = tree.leaf_names(call.reference), list(call.names())
    if own == names or set(own) != set(names):
        return None  # in the object-oriented API names are others, and the order is the same
    places = {name: k for k, name in enumerate(names)}
    return [places[name] for name in own]


def as_tree(call: Call, values: list[Any]) -> PyTree:
    """Return values of all parameters of a call as a tree like them."""
    order = order_of(call)
    if order is not None:
        values = [values[k] for k in order]
    return tree.unflatten(tree.flatten(call.reference)[1], values)


def as_list(call: Call, values: PyTree, what: str, like: str) -> list[Any]:
    """Return a tree like the parameters of a call as a list in its order.

    Raises:
        ValueError: If it has another structure, with ``what`` and ``like`` for their names.
    """
    spec = tree.flatten(call.reference)[1]
    found = tree.flatten_like(values, call.reference, spec, what, like)
    order = order_of(call)
    if order is None:
        return found
    result: list[Any] = [None] * len(found)
    for k, value in zip(order, found):
        result[k] = value
    return result
