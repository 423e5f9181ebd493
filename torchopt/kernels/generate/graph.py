"""Pointwise graphs: what a rule computes for one entry of a tensor, as data.

A kernel is generated from such a graph, and found by it. Tensors are nodes; plain numbers (the
hyperparameters, the step count and what a rule computes of them) are Python expressions that are
evaluated once per call, outside of the loop over entries.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakValueDictionary


class Number(NamedTuple):
    """A number of a graph: an expression in ``h`` (the hyperparameters) and ``t`` (the step)."""

    source: str


def logarithm_or_error(x: float) -> float:
    """Return a logarithm; as divisions and powers do, it fails with an ``ArithmeticError``."""
    try:
        return math.log(x)
    except ValueError:
        raise ArithmeticError(f"the logarithm of {x}") from None


#: What an expression may call.
CALLS: dict[str, Callable[..., Any]] = {"abs": abs, "float": float, "log": logarithm_or_error}


class Node:
    """One value per entry. Equal nodes are one object, so that shared values are seen at once.

    Attributes:
        op: A key of :data:`OPERATIONS`, or ``"input"`` or ``"number"``.
        args: Nodes; for ``"input"`` the name of the operand, for ``"number"`` a :class:`Number`.
    """

    __slots__ = ("__weakref__", "args", "op")

    op: str
    args: tuple[Any, ...]

    def __new__(cls, op: str, args: tuple[Any, ...]) -> Node:  # noqa: D102
        node = _NODES.get((op, args))
        if node is None:
            node = super().__new__(cls)
            node.op, node.args = op, args
            _NODES[op, args] = node
        return node

    def __repr__(self) -> str:
        return f"Node({self.op!r}, {self.args!r})"

    def __reduce__(self) -> Any:
        return Node, (self.op, self.args)


_NODES: WeakValueDictionary[tuple[str, tuple[Any, ...]], Node] = WeakValueDictionary()

#: Operations of a graph and how many arguments they take. Those of :data:`TRUTH` give a truth
#: value, which is 1 or 0 where it is computed with. ``root_slope`` is the derivative of ``sqrt`` by
#: its value: 1/(2x), 0 at 0.
OPERATIONS = {
    "add": 2,
    "sub": 2,
    "mul": 2,
    "div": 2,
    "neg": 1,
    "sqrt": 1,
    "root_slope": 1,
    "reciprocal": 1,
    "abs": 1,
    "sign": 1,
    "maximum": 2,
    "minimum": 2,
    "less": 2,
    "less_equal": 2,
    "equal": 2,
    "not_equal": 2,
    "where": 3,
    "and": 2,
    "or": 2,
    "not": 1,
    "exp": 1,
    "log": 1,
    "expm1": 1,
    "log1p": 1,
    "tanh": 1,
    "sigmoid": 1,
    "pow": 2,
}
TRUTH = frozenset({"less", "less_equal", "equal", "not_equal", "and", "or", "not"})


def input_node(operand: str) -> Node:
    """Return the entry of an input operand: ``"g"``, ``"p"``, ``"s0"``, ..."""
    return Node("input", (operand,))


def number_node(number: Number) -> Node:
    """Return a number as an operand of a node."""
    return Node("number", (number,))


def constant(value: float) -> Node:
    """Return a number that is the same at every call."""
    return number_node(Number(repr(float(value))))


ZERO, ONE = constant(0.0), constant(1.0)


def is_number(node: Node) -> bool:
    """Whether a node is the same for all entries."""
    return node.op == "number"


def topological(outputs: Iterable[Node]) -> list[Node]:
    """Return every node that the outputs need, arguments first; the order depends on them only."""
    order: dict[Node, None] = {}
    stack = [(output, False) for output in reversed(list(outputs))]
    while stack:
        node, arguments_done = stack.pop()
        if node in order:
            continue
        if arguments_done or node.op in ("input", "number"):
            order[node] = None
            continue
        stack.append((node, True))
        stack += [(argument, False) for argument in reversed(node.args)]
    return list(order)


def substitute(outputs: Sequence[Node], replace: Callable[[Node], Node | None]) -> list[Node]:
    """Rebuild nodes with some replaced; ``replace`` sees a node after its arguments were."""
    rebuilt: dict[Node, Node] = {}
    for node in topological(outputs):
        new = node
        if node.op not in ("input", "number"):
            new = Node(node.op, tuple(rebuilt[argument] for argument in node.args))
        replacement = replace(new)
        rebuilt[node] = new if replacement is None else replacement
    return [rebuilt[output] for output in outputs]


class Listing(NamedTuple):
    """A graph in the order of its computation, with a name for every value.

    Attributes:
        inputs: The input operands that are read, which are also the names of their values.
        numbers: The expressions of its numbers; number ``k`` is named ``n<k>``.
        statements: ``(name, operation, names of its arguments)``.
        results: Output operand -> the name of its value.
    """

    inputs: list[str]
    numbers: list[str]
    statements: list[tuple[str, str, list[str]]]
    results: dict[str, str]


def listing(outputs: Mapping[str, Node]) -> Listing:
    """Name the values of a graph."""
    names: dict[Node, str] = {}
    numbers: dict[str, int] = {}
    inputs: list[str] = []
    statements: list[tuple[str, str, list[str]]] = []
    for node in topological(outputs.values()):
        if node.op == "input":
            names[node] = node.args[0]
            inputs.append(node.args[0])
        elif node.op == "number":
            source = node.args[0].source
            names[node] = f"n{numbers.setdefault(source, len(numbers))}"
        else:
            names[node] = f"x{len(statements)}"
            statements.append((names[node], node.op, [names[a] for a in node.args]))
    return Listing(inputs, list(numbers), statements, {s: names[n] for s, n in outputs.items()})


@dataclasses.dataclass(frozen=True, eq=False)
class Kernel:
    """A graph ready to be generated, and found, by its text.

    Numbers appear in the text by position, not by expression: a kernel does not know what its
    numbers mean, so graphs that differ only in them share it.

    Attributes:
        outputs: Operand -> node, in order.
        listing: The graph in the order of its computation.
        text: The graph as text: two kernels with the same text compute the same.
        name: A name made of the text, under which a backend keeps the kernel.
        inputs: The input operands that are read, in order.
        numbers: The expressions of the numbers, in the order in which the kernel takes them.
        output_operands: The keys of ``outputs``.
    """

    outputs: dict[str, Node]
    listing: Listing
    text: str
    name: str
    inputs: list[str]
    numbers: tuple[str, ...]
    output_operands: list[str]


def make_kernel(outputs: Mapping[str, Node]) -> Kernel:
    """Return the kernel of a graph."""
    listed = listing(outputs)
    lines = [f"{name} = {op} {' '.join(args)}" for name, op, args in listed.statements]
    lines += [f"{operand} <- {name}" for operand, name in listed.results.items()]
    text = "\n".join(lines)
    digest = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
    return Kernel(
        dict(outputs),
        listed,
        text,
        f"k{digest[:16]}",
        listed.inputs,
        tuple(listed.numbers),
        list(outputs),
    )
