"""Trees of every structure, and what is in them."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from typing import Any

import optree
import pytest
from conftest import nonzero
from torch import Tensor

from torchopt.base import tree


Pair = namedtuple("Pair", ("weight", "bias"))


class Node:
    """A container that only optree knows, once it is registered."""

    def __init__(self, weight: Any, bias: Any) -> None:
        self.weight = weight
        self.bias = bias


class OwnNode(Node):
    """Registered under the namespace ``torchopt``."""


class GlobalNode(Node):
    """Registered in optree's global namespace."""


def _register(cls: type[Node], namespace: Any) -> None:
    optree.register_pytree_node(
        cls,
        lambda node: ((node.weight, node.bias), None, ("weight", "bias")),
        lambda _, children: cls(*children),
        namespace=namespace,
    )


_register(OwnNode, "torchopt")


_register(GlobalNode, optree.registry.__GLOBAL_NAMESPACE)


def w() -> Tensor:
    return nonzero(2, 3)


def b() -> Tensor:
    return nonzero(3)


TREES = {
    "tensor": lambda: w(),
    "scalar": lambda: nonzero(),
    "dict": lambda: {"w": w(), "b": b()},
    "nested": lambda: {"body": [{"w": w()}, {"w": w(), "b": b()}], "head": (b(), {"s": nonzero()})},
    "list": lambda: [w(), b()],
    "tuple": lambda: (w(), b()),
    "namedtuple": lambda: Pair(w(), b()),
    "OrderedDict": lambda: OrderedDict([("w", w()), ("b", b())]),
    "registered": lambda: OwnNode(w(), {"b": b()}),
    "registered-globally": lambda: [GlobalNode(w(), b()), b()],
    "none-leaf": lambda: {"w": w(), "nothing": None, "b": b()},
    "empty-containers": lambda: {"w": w(), "empty": {}, "also": []},
}


every_tree = pytest.mark.parametrize("make", TREES.values(), ids=TREES.keys())


def leaves_of(value: Any) -> list[Any]:
    return optree.tree_leaves(value, none_is_leaf=True, namespace="torchopt")


def structure_of(value: Any) -> Any:
    return optree.tree_structure(value, none_is_leaf=True, namespace="torchopt")


def random_like(value: Any) -> Any:
    """Return the tree with new random numbers, never zero."""
    return tree.tree_map(lambda x: nonzero(*x.shape, dtype=x.dtype), value)


def tensors_of(value: Any) -> list[Tensor]:
    return [x for x in leaves_of(value) if isinstance(x, Tensor)]
