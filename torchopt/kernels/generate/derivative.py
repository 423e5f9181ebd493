r"""Reverse-mode differentiation of pointwise graphs: backward kernels are derived, not written.

For :math:`y = f(a, b)` and the incoming :math:`\bar y = \partial L / \partial y` each operation
adds to :math:`\bar a` and :math:`\bar b`:

=================  ======================================================================
``a + b``          :math:`\bar a \mathrel{+}= \bar y,\; \bar b \mathrel{+}= \bar y`
``a b``            :math:`\bar a \mathrel{+}= \bar y b,\; \bar b \mathrel{+}= \bar y a`
``a / b``          :math:`\bar a \mathrel{+}= \bar y / b,\; \bar b \mathrel{-}= (\bar y / b)\, y`
``sqrt(a)``        :math:`\bar a \mathrel{+}= \bar y / (2y)`, and nothing where :math:`y = 0`
``1 / a``          :math:`\bar a \mathrel{-}= \bar y y^2`
``maximum(a, b)``  to the larger; half to each where they are equal, as torch does
``where(c, a, b)`` to the one that was chosen
``exp(a)``         :math:`\bar a \mathrel{+}= \bar y\, y`
``log(a)``         :math:`\bar a \mathrel{+}= \bar y / a`
``expm1(a)``       :math:`\bar a \mathrel{+}= \bar y\, (y + 1)`
``log1p(a)``       :math:`\bar a \mathrel{+}= \bar y / (1 + a)`
``tanh(a)``        :math:`\bar a \mathrel{+}= \bar y\, (1 - y^2)`
``sigmoid(a)``     :math:`\bar a \mathrel{+}= \bar y\, y\, (1 - y)`
``pow(a, b)``      :math:`\bar a \mathrel{+}= \bar y\, b\, a^{b-1},\;
                   \bar b \mathrel{+}= \bar y\, y \ln a`; nothing to :math:`a` where
                   :math:`b = 0`, nor to :math:`b` where :math:`a = 0 \le b`
=================  ======================================================================

The backward kernel computes the forward values again from the inputs of the forward kernel, so that
nothing has to be saved but tensors that exist anyway. There a quotient is a product with the
reciprocal, which the derivative needs too: one division instead of three.

A number :math:`n(h)` of the graph is an expression in hyperparameters. Where the derivative by one
of them is wanted, it is :math:`\bar h = \sum_n \bar n\, \partial n / \partial h` for each entry, to
be summed over all entries by whoever runs the kernel; the slopes :math:`\partial n / \partial h`
are expressions too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torchopt.kernels.generate.graph import (
    ONE,
    ZERO,
    Node,
    Number,
    constant,
    input_node,
    is_number,
    number_node,
    substitute,
    topological,
)
from torchopt.kernels.generate.learned import hypers_in, slope


HALF = constant(0.5)


def derive(
    outputs: Mapping[str, Node], incoming: str = "bar_", hypers: Collection[str] = ()
) -> dict[str, Node]:
    """Return the graph of the backward pass: input operand -> the derivative by it.

    Args:
        outputs: The graph, by output operand. The derivative by output ``s`` is the input
            ``incoming + s`` of the returned graph.
        incoming: See above.
        hypers: The hyperparameters by which derivatives are wanted, too. They follow those of the
            input operands.
    """
    order = topological(outputs.values())
    slopes = {
        node: {h: slope(_source(node), h) for h in sorted(hypers_in(_source(node)) & set(hypers))}
        for node in filter(is_number, order)
    }
    bars: dict[Node, Node] = {}

    def to(node: Node, bar: Node) -> None:
        if (not is_number(node) or slopes[node]) and bar != ZERO:
            bars[node] = add(bars[node], bar) if node in bars else bar

    for operand, node in outputs.items():
        to(node, input_node(f"{incoming}{operand}"))
    for node in reversed(order):
        if node in bars and node.op not in ("input", "number"):
            rule = RULES.get(node.op)
            if rule is not None:
                rule(node, bars[node], to)
    found = {node.args[0]: bars.get(node, ZERO) for node in order if node.op == "input"}
    for hyper in hypers:
        for node, own in slopes.items():
            if hyper in own and node in bars:
                term = mul(bars[node], _number(own[hyper]))
                found[hyper] = add(found.get(hyper, ZERO), term)
    derivatives = substitute(list(found.values()), _with_reciprocal)
    return dict(zip(found, derivatives))


def _with_reciprocal(node: Node) -> Node | None:
    if node.op == "div" and not is_number(node.args[1]):
        return mul(node.args[0], Node("reciprocal", (node.args[1],)))
    return None


# Operations that leave out what is known beforehand -----------------------------------------------


def add(a: Node, b: Node) -> Node:
    """Return ``a + b``."""
    if ZERO in (a, b):
        return b if a == ZERO else a
    return Node("add", (a, b))


def mul(a: Node, b: Node) -> Node:
    """Return ``a * b``; numbers are multiplied beforehand."""
    if ONE in (a, b):
        return b if a == ONE else a
    if is_number(a) and is_number(b):
        return _number(f"({_source(a)} * {_source(b)})")
    return Node("mul", (a, b))


def neg(a: Node) -> Node:
    """Return ``-a``."""
    return _number(f"(-{_source(a)})") if is_number(a) else Node("neg", (a,))


def _over(a: Node, b: Node) -> Node:
    if is_number(b):
        return mul(a, _number(f"(1.0 / {_source(b)})"))
    return mul(a, Node("reciprocal", (b,)))


def _where(condition: Node, a: Node, b: Node) -> Node:
    return Node("where", (condition, a, b))


def _number(source: str) -> Node:
    return number_node(Number(source))


def _source(node: Node) -> str:
    return node.args[0].source


# The table above, as code -------------------------------------------------------------------------

Collect = Callable[[Node, Node], None]


def _add_rule(y: Node, bar: Node, to: Collect) -> None:
    a, b = y.args
    to(a, bar)
    to(b, bar)


def _sub_rule(y: Node, bar: Node, to: Collect) -> None:
    a, b = y.args
    to(a, bar)
    to(b, neg(bar))


def _mul_rule(y: Node, bar: Node, to: Collect) -> None:
    a, b = y.args
    if a == b:
        to(a, mul(mul(bar, constant(2.0)), a))
        return
    to(a, mul(bar, b))
    to(b, mul(bar, a))


def _div_rule(y: Node, bar: Node, to: Collect) -> None:
    a, b = y.args
    bar_a = _over(bar, b)
    to(a, bar_a)
    to(b, neg(mul(bar_a, y)))


def _neg_rule(y: Node, bar: Node, to: Collect) -> None:
    to(y.args[0], neg(bar))


def _sqrt_rule(y: Node, bar: Node, to: Collect) -> None:
    to(y.args[0], mul(bar, Node("root_slope", (y,))))


def _reciprocal_rule(y: Node, bar: Node, to: Collect) -> None:
    to(y.args[0], neg(mul(mul(bar, y), y)))


def _abs_rule(y: Node, bar: Node, to: Collect) -> None:
    to(y.args[0], mul(bar, Node("sign", y.args)))


def _extremum_rule(y: Node, bar: Node, to: Collect) -> None:
    first, second = y.args
    # nan is smaller than nothing: its derivative passes, as in torch
    smaller = (first, second) if y.op == "maximum" else (second, first)
    if second == ZERO:  # relu: nothing where they are equal
        to(first, _where(Node("less_equal", smaller), ZERO, bar))
        return
    equal, half = Node("equal", (first, second)), mul(bar, HALF)
    to(first, _where(equal, half, _where(Node("less", smaller), ZERO, bar)))
    to(second, _where(equal, half, _where(Node("less", smaller[::-1]), ZERO, bar)))


def _where_rule(y: Node, bar: Node, to: Collect) -> None:
    condition, a, b = y.args
    to(a, _where(condition, bar, ZERO))
    to(b, _where(condition, ZERO, bar))


def _exp_rule(y: Node, bar: Node, to: Collect) -> None:
    to(y.args[0], mul(bar, y))


def _log_rule(y: Node, bar: Node, to: Collect) -> None:
    to(y.args[0], _over(bar, y.args[0]))


def _expm1_rule(y: Node, bar: Node, to: Collect) -> None:
    to(y.args[0], mul(bar, add(y, ONE)))


def _log1p_rule(y: Node, bar: Node, to: Collect) -> None:
    to(y.args[0], _over(bar, add(y.args[0], ONE)))


def _tanh_rule(y: Node, bar: Node, to: Collect) -> None:
    to(y.args[0], mul(bar, Node("sub", (ONE, mul(y, y)))))


def _sigmoid_rule(y: Node, bar: Node, to: Collect) -> None:
    to(y.args[0], mul(bar, mul(y, Node("sub", (ONE, y)))))


def _pow_rule(y: Node, bar: Node, to: Collect) -> None:
    a, b = y.args
    less = _number(f"({_source(b)} - 1.0)") if is_number(b) else Node("sub", (b, ONE))
    bar_a = mul(bar, mul(Node("pow", (a, less)), b))
    to(a, bar_a if _is_nonzero(b) else _where(Node("equal", (b, ZERO)), ZERO, bar_a))
    flat = Node("and", (Node("equal", (a, ZERO)), Node("less_equal", (ZERO, b))))
    to(b, _where(flat, ZERO, mul(bar, mul(y, Node("log", (a,))))))


def _is_nonzero(node: Node) -> bool:
    """Whether a node is a number that is written out, and not zero."""
    try:
        return is_number(node) and float(_source(node)) != 0
    except ValueError:
        return False


#: ``sign`` and what gives truth values are absent: their derivative is zero.
RULES: dict[str, Callable[[Node, Node, Collect], Any]] = {
    "add": _add_rule,
    "sub": _sub_rule,
    "mul": _mul_rule,
    "div": _div_rule,
    "neg": _neg_rule,
    "sqrt": _sqrt_rule,
    "reciprocal": _reciprocal_rule,
    "abs": _abs_rule,
    "maximum": _extremum_rule,
    "minimum": _extremum_rule,
    "where": _where_rule,
    "exp": _exp_rule,
    "log": _log_rule,
    "expm1": _expm1_rule,
    "log1p": _log1p_rule,
    "tanh": _tanh_rule,
    "sigmoid": _sigmoid_rule,
    "pow": _pow_rule,
}
