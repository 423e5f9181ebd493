"""Functions of torch as graphs of nodes, where they are no single operation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torchopt.kernels.generate.graph import TRUTH, ZERO, Node, Number, constant, number_node


def square(a: Node) -> Node:
    """Return ``a * a``."""
    return Node("mul", (a, a))


#: Exponents, and what torch computes instead of a power.
_POWERS: dict[str, Callable[[Node], Node]] = {
    "2.0": square,
    "3.0": lambda a: Node("mul", (square(a), a)),
    "1.0": lambda a: a,
    "0.5": lambda a: Node("sqrt", (a,)),
    "-0.5": lambda a: Node("reciprocal", (Node("sqrt", (a,)),)),
    "-1.0": lambda a: Node("reciprocal", (a,)),
    "-2.0": lambda a: Node("reciprocal", (square(a),)),
}


def _power(a: Node, exponent: Node) -> Node:
    simple = _POWERS.get(exponent.args[0].source) if exponent.op == "number" else None
    return Node("pow", (a, exponent)) if simple is None else simple(a)


# Truth values -------------------------------------------------------------------------------------


def is_truth(node: Node) -> bool:
    """Whether a node stands for a tensor of truth values."""
    if node.op in ("mul", "where", "maximum", "minimum"):
        return all(map(is_truth, set(node.args[-2:])))
    return node.op in TRUTH


def _logical(op: str) -> Callable[..., Node]:
    """Return a function of numbers and truth values; numbers are true if they are not zero."""
    return lambda *args: Node(
        op, tuple(a if is_truth(a) else Node("not_equal", (a, ZERO)) for a in args)
    )


def _bitwise(op: str) -> Callable[..., Node]:
    def apply(*args: Node) -> Node:
        if not all(map(is_truth, args)):
            raise TypeError("there are numbers among the truth values")
        return Node(op, args)

    return apply


# Numbers that are not finite ----------------------------------------------------------------------

_INFINITE, _MINUS_INFINITE = (number_node(Number(f"float('{x}')")) for x in (math.inf, -math.inf))


def _is_nan(a: Node) -> Node:
    return Node("not_equal", (a, a))


def _nan_to_num(a: Node, nan: Any = 0.0, posinf: Any = None, neginf: Any = None) -> Node:
    if posinf is None or neginf is None:
        raise TypeError("without posinf and neginf, which depend on the dtype")
    chosen = a
    for condition, value in (
        (Node("equal", (a, _MINUS_INFINITE)), neginf),
        (Node("equal", (a, _INFINITE)), posinf),
        (_is_nan(a), nan),
    ):
        number = value if isinstance(value, Node) else constant(value)
        chosen = Node("where", (condition, number, chosen))
    return chosen


def _node(op: str) -> Callable[..., Node]:
    return lambda *args: Node(op, args)


def _swapped(op: str) -> Callable[..., Node]:
    return lambda a, b: Node(op, (b, a))


#: Name of a torch function, method or operator -> the graph it builds; others are in tracing.py.
MORE_FUNCTIONS: dict[str, Callable[..., Node]] = {
    "pow": _power,
    **{name: _node(name) for name in ("exp", "log", "expm1", "log1p", "tanh", "sigmoid")},
    "negative": _node("neg"),
    "absolute": _node("abs"),
    "sgn": _node("sign"),
    "logical_and": _logical("and"),
    "logical_or": _logical("or"),
    "logical_xor": _logical("not_equal"),
    "logical_not": _logical("not"),
    "bitwise_and": _bitwise("and"),
    "bitwise_or": _bitwise("or"),
    "bitwise_xor": _bitwise("not_equal"),
    "bitwise_not": _bitwise("not"),
    "isnan": _is_nan,
    "isinf": lambda a: Node("equal", (Node("abs", (a,)), _INFINITE)),
    "isfinite": lambda a: Node("less", (Node("abs", (a,)), _INFINITE)),
    "nan_to_num": _nan_to_num,
    "less": _node("less"),
    "less_equal": _node("less_equal"),
    "greater": _swapped("less"),
    "greater_equal": _swapped("less_equal"),
    "not_equal": _node("not_equal"),
}
