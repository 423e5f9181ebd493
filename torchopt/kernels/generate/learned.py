"""Hyperparameters that are tensors: as symbols for a rule, and the derivative by them.

A rule asks whether a hyperparameter is a tensor (then its term is kept, even where it is zero), so
these symbols are tensors. One with a single entry is a number to a kernel: an expression, as
``SymbolicNumber`` is, but one that a derivative is wanted by. Any other is read entry by entry, as
a gradient is.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from torchopt.base.torch_internals import make_subclass, temporarily_clear_interpreter_stack
from torchopt.kernels.generate.graph import (
    Node,
    Number,
    input_node,
    logarithm_or_error,
    number_node,
    topological,
)
from torchopt.kernels.generate.tracing import (
    BINARY,
    COMPARE,
    Guards,
    Symbol,
    SymbolicTensor,
    UntraceableError,
    call,
    source_of,
    value_of,
)


#: Kinds of hyperparameters: a number, a tensor with one entry, a tensor with more of them.
NUMBER, SINGLE, ENTRIES = "number", "single", "entries"

_REFLECTED = {f"__r{name}__": name for name in ("add", "sub", "mul", "truediv", "div", "pow")}
_SYMBOLS: dict[str, str] = dict.fromkeys(["div", "divide", "true_divide", "truediv"], "/")
_SYMBOLS |= {"add": "+", "sub": "-", "subtract": "-", "mul": "*", "multiply": "*", "pow": "**"}
_COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_ALONE: dict[str, Callable[[Any], Any]] = {
    "neg": lambda x: x * -1.0,
    "abs": lambda x: LearnedNumber.of(abs(x.value), f"abs({x.source})"),
    "log": lambda x: LearnedNumber.of(_log_of(x.value), f"log({x.source})"),
    "positive": lambda x: x,
    "clone": lambda x: x,
    "square": lambda x: x * x,
    "sqrt": lambda x: x**0.5,
    "reciprocal": lambda x: 1.0 / x,
    "rsqrt": lambda x: x**-0.5,
}


def hyper_operand(position: int) -> str:
    """Return the name of the operand of a hyperparameter: of its derivative, or of its entries."""
    return f"h{position}"


def is_hyper(operand: str) -> bool:
    """Whether a operand is that of a hyperparameter."""
    return operand[0] == "h"


class _Symbolic(Tensor):
    """A tensor of which only the type is real; everything done with it comes to ``_apply``.

    It requires grad, so that torch refuses to read it as a number where it wants one.
    """

    @classmethod
    def _made(cls) -> Any:
        with temporarily_clear_interpreter_stack():
            return make_subclass(cls, torch.zeros(()), True)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        if name in _REFLECTED:
            name, args = _REFLECTED[name], args[::-1]
        return _apply(name.removeprefix("__").removesuffix("__"), args, kwargs or {})

    def __repr__(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"<symbol {vars(self)}>"

    def __hash__(self) -> int:
        raise UntraceableError("it keeps a hyperparameter as a key")


class LearnedNumber(Symbol, _Symbolic):
    """A hyperparameter with one entry, or what a rule computed of it and of numbers."""

    value: float
    source: str

    @classmethod
    def of(cls, value: float, source: str) -> LearnedNumber:
        """Return an expression and the value that it has in this trace."""
        made = cls._made()
        made.value, made.source = value, source
        return made

    @property
    def node(self) -> Node:
        """The number as an operand."""
        return number_node(Number(self.source))


class LearnedEntries(Symbol, _Symbolic):
    """A hyperparameter with a value for each entry, or what a rule computed of it alone."""

    _own: Node

    @classmethod
    def of(cls, node: Node) -> LearnedEntries:
        """Return the symbol of a node."""
        made = cls._made()
        made._own = node
        return made

    @property
    def node(self) -> Node:
        """Its node."""
        return self._own


def symbol(value: float, position: int, kind: str) -> LearnedNumber | LearnedEntries:
    """Return the symbol of a hyperparameter that is a tensor."""
    if kind == SINGLE:
        return LearnedNumber.of(value, f"h[{position}]")
    return LearnedEntries.of(input_node(hyper_operand(position)))


def _apply(name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """Do what a torch function of this name does to symbols."""
    if name in ("float", "int", "index", "complex", "item", "tolist", "numpy", "array"):
        raise UntraceableError("it turns a hyperparameter that is a tensor into a number")
    if any(isinstance(x, (SymbolicTensor, LearnedEntries)) for x in args):
        if name == "bool":
            raise UntraceableError("it branches on the entries of a tensor")
        result = call("div" if name == "truediv" else name, args, kwargs)
        alone = not any(isinstance(x, SymbolicTensor) for x in args)
        return LearnedEntries.of(result.node) if alone else result
    if not kwargs and all(isinstance(x, (int, float, LearnedNumber)) for x in args):
        if name == "bool":
            return _compared("!=", args[0], 0.0)
        if name in _ALONE and len(args) == 1:
            return _ALONE[name](*args)
        if name in _SYMBOLS and len(args) == 2:
            return _computed(_SYMBOLS[name], *args)
        if name in _COMPARISONS and len(args) == 2:
            return _compared(_COMPARISONS[name], *args)
    raise UntraceableError(f"it calls {name!r} of a hyperparameter, which has no form here")


def _computed(sign: str, left: Any, right: Any) -> LearnedNumber:
    try:
        value = BINARY[sign](value_of(left), value_of(right))
    except ArithmeticError:
        value = float("nan")
    if isinstance(value, complex):
        value = float("nan")
    if sign == "*" and source_of(right) == "-1.0":
        return LearnedNumber.of(value, f"(-{source_of(left)})")
    return LearnedNumber.of(value, f"({source_of(left)} {sign} {source_of(right)})")


def _log_of(value: float) -> float:
    try:
        return logarithm_or_error(value)
    except ArithmeticError:
        return float("nan")


def _compared(sign: str, left: Any, right: Any) -> bool:
    outcome = COMPARE[sign](value_of(left), value_of(right))
    if Guards.active is not None:
        Guards.active.append((f"{source_of(left)} {sign} {source_of(right)}", outcome))
    return outcome


# Derivatives of expressions -----------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def hypers_in(source: str) -> frozenset[str]:
    """Return the operands of the hyperparameters that an expression reads."""
    return frozenset(hyper_operand(int(k)) for k in re.findall(r"\bh\[(\d+)\]", source))


def hypers_of(outputs: Iterable[Node]) -> frozenset[str]:
    """Return the operands of the hyperparameters that a graph reads, numbers and tensors."""
    found: set[str] = set()
    for node in topological(outputs):
        if node.op == "number":
            found |= hypers_in(node.args[0].source)
        elif node.op == "input" and is_hyper(node.args[0]):
            found.add(node.args[0])
    return frozenset(found)


def slope(source: str, operand: str) -> str:
    """Return the derivative of an expression by a hyperparameter, as an expression.

    Raises:
        UntraceableError: If it has none that is an expression.
    """
    return _slope(ast.parse(source, mode="eval").body, int(operand[1:])) or "0.0"


def _slope(node: ast.expr, position: int) -> str:
    """Return the derivative, empty where it is zero."""
    text = f"({ast.unparse(node)})"
    match node:
        case ast.Subscript(slice=ast.Constant(value=index)):
            return "1.0" if index == position else ""
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            inner = _slope(operand, position)
            return inner and f"(-{inner})"
        case ast.Call(func=ast.Name(id="abs"), args=[operand]):
            inner = _slope(operand, position)
            return inner and f"(({ast.unparse(operand)}) / {text} * {inner})"
        case ast.Call(func=ast.Name(id="log"), args=[operand]):
            inner = _slope(operand, position)
            return inner and f"({inner} / ({ast.unparse(operand)}))"
        case ast.BinOp(left=left, op=op, right=right):
            return _slope_of_two(node, left, right, position) if op else ""
    return ""


def _slope_of_two(whole: ast.BinOp, left: ast.expr, right: ast.expr, position: int) -> str:
    a, b, text = (f"({ast.unparse(node)})" for node in (left, right, whole))
    da, db = _slope(left, position), _slope(right, position)
    match whole.op:
        case ast.Add():
            return f"({da} + {db})" if da and db else da or db
        case ast.Sub():
            return f"({da} - {db})" if da and db else da or (db and f"(-{db})")
        case ast.Mult():
            terms = [f"({x} * {y})" for x, y in ((da, b), (a, db)) if x and y]
            return f"({' + '.join(terms)})" if terms else ""
        case ast.Div():
            terms = [da and f"{da} / {b}", db and f"-{text} / {b} * {db}"]
            return f"({' + '.join(x for x in terms if x)})" if da or db else ""
        case ast.Pow():
            terms = [da and f"{b} * {a} ** ({b} - 1.0) * {da}", db and f"{text} * log({a}) * {db}"]
            return f"({' + '.join(x for x in terms if x)})" if da or db else ""
    raise UntraceableError(f"there is no derivative of {text}")
