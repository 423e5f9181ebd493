"""Run rules on symbols instead of tensors, to learn the pointwise graph they compute."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

from torchopt.kernels.generate.graph import (
    ONE,
    ZERO,
    Node,
    Number,
    constant,
    is_number,
    logarithm_or_error,
    number_node,
)
from torchopt.kernels.generate.node_functions import MORE_FUNCTIONS, is_truth, square


class UntraceableError(Exception):
    """A rule does something that has no pointwise graph; the message says what."""

    guards: Guards


class Guards(list):
    """The comparisons of numbers that a rule has made: expressions, with their outcome."""

    active: Guards | None = None

    def __enter__(self) -> Guards:
        Guards.active = self
        return self

    def __exit__(self, *_: object) -> None:
        Guards.active = None


class Symbol:
    """Stands for something in a rule, and knows its node."""

    @property
    def node(self) -> Node:
        """What it is in the graph."""
        raise NotImplementedError


class SymbolicNumber(float):
    """A number that knows how it was computed from hyperparameters and the step count.

    It is a ``float``, as rules and torch ask for one, but what is stored in it as such is a decoy:
    whatever turns it into a plain number behind our back (``math.sqrt``) computes with the decoy.
    A rule is traced with two decoys, and is refused if that makes a difference. What can be seen
    (``int``, ``%``, a dictionary key) is refused at once. Every comparison is remembered as a
    guard: the graph holds for all numbers for which the comparisons come out the same.
    """

    #: Far from each other and from all numbers that occur.
    decoys = (7.1e150, 3.3e-150)
    decoy = decoys[0]

    value: float
    source: str

    def __new__(cls, value: float, source: str) -> SymbolicNumber:  # noqa: D102
        number = super().__new__(cls, cls.decoy)
        number.value, number.source = value, source
        return number

    def _lost(self, *_: Any) -> Any:
        raise UntraceableError("it computes with its numbers in a way that cannot be followed")

    __float__ = __int__ = __index__ = __trunc__ = __round__ = __floor__ = __ceil__ = _lost
    as_integer_ratio = is_integer = hex = _lost
    __mod__ = __rmod__ = __floordiv__ = __rfloordiv__ = __divmod__ = __rdivmod__ = _lost
    __hash__ = __format__ = __repr__ = __str__ = __complex__ = _lost

    def __abs__(self) -> SymbolicNumber:
        return SymbolicNumber(abs(self.value), f"abs({self.source})")

    def log(self) -> SymbolicNumber:
        """Return the logarithm; what asks for it is ``torchopt.base.numerics.logarithm``."""
        return SymbolicNumber(logarithm_or_error(self.value), f"log({self.source})")

    def __pos__(self) -> SymbolicNumber:
        return self

    def _binary(self, other: Any, symbol: str, swap: bool = False) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        left, right = (other, self) if swap else (self, other)
        value = BINARY[symbol](value_of(left), value_of(right))
        return SymbolicNumber(value, f"({source_of(left)} {symbol} {source_of(right)})")

    def __add__(self, other: Any) -> Any:
        return self._binary(other, "+")

    def __radd__(self, other: Any) -> Any:
        return self._binary(other, "+", swap=True)

    def __sub__(self, other: Any) -> Any:
        return self._binary(other, "-")

    def __rsub__(self, other: Any) -> Any:
        return self._binary(other, "-", swap=True)

    def __mul__(self, other: Any) -> Any:
        return self._binary(other, "*")

    def __rmul__(self, other: Any) -> Any:
        return self._binary(other, "*", swap=True)

    def __truediv__(self, other: Any) -> Any:
        return self._binary(other, "/")

    def __rtruediv__(self, other: Any) -> Any:
        return self._binary(other, "/", swap=True)

    def __pow__(self, other: Any, modulo: None = None) -> Any:
        return self._binary(other, "**")

    def __rpow__(self, other: Any, modulo: None = None) -> Any:
        return self._binary(other, "**", swap=True)

    def __neg__(self) -> SymbolicNumber:
        return SymbolicNumber(-self.value, f"(-{self.source})")

    def _compare(self, other: Any, symbol: str) -> bool:
        if not isinstance(other, (int, float)):
            return NotImplemented
        outcome = COMPARE[symbol](self.value, value_of(other))
        if Guards.active is not None:
            Guards.active.append((f"{self.source} {symbol} {source_of(other)}", outcome))
        return outcome

    def __eq__(self, other: object) -> bool:
        return self._compare(other, "==")

    def __ne__(self, other: object) -> bool:
        return self._compare(other, "!=")

    def __lt__(self, other: Any) -> bool:
        return self._compare(other, "<")

    def __le__(self, other: Any) -> bool:
        return self._compare(other, "<=")

    def __gt__(self, other: Any) -> bool:
        return self._compare(other, ">")

    def __ge__(self, other: Any) -> bool:
        return self._compare(other, ">=")

    def __bool__(self) -> bool:
        return self._compare(0.0, "!=")


BINARY: dict[str, Callable[[float, float], float]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "**": operator.pow,
}
COMPARE: dict[str, Callable[[float, float], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def source_of(number: Any) -> str:
    """Return the expression of a number."""
    if type(number) is SymbolicNumber or isinstance(number, Symbol):
        return number.source  # pyright: ignore[reportAttributeAccessIssue]
    number = float(number)
    return repr(number) if math.isfinite(number) else f"float('{number}')"


def value_of(number: Any) -> float:
    """Return the value that a number has in this trace."""
    if type(number) is SymbolicNumber or isinstance(number, Symbol):
        return number.value  # pyright: ignore[reportAttributeAccessIssue]
    return float(number)


class SymbolicTensor(Symbol):
    """Stands for a tensor in a rule; its operations build a graph.

    Torch functions arrive in :meth:`__torch_function__`; methods and operators are looked up by
    name in the same table.
    """

    is_sparse = False  # no kernel takes one that is

    def __init__(self, node: Node) -> None:
        self._node = node

    @property
    def node(self) -> Node:
        """Its node."""
        return self._node

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = getattr(function, "__name__", str(function))
        return call(name, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        if name in FUNCTIONS:
            return lambda *args, **kwargs: call(name, (self, *args), kwargs)
        raise UntraceableError(f"it reads {name!r} of a tensor")

    def __bool__(self) -> bool:
        raise UntraceableError("it branches on the entries of a tensor")

    def __iter__(self) -> Any:
        raise UntraceableError("it iterates over a tensor")

    def __hash__(self) -> int:
        return hash(self.node)


def call(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> SymbolicTensor:
    """Do to symbols what a torch function of this name does to tensors."""
    if name not in FUNCTIONS:
        raise UntraceableError(f"it calls {name!r}, which has no pointwise form here")
    try:
        return SymbolicTensor(FUNCTIONS[name](*map(_node_of_value, args), **kwargs))
    except TypeError as error:
        raise UntraceableError(f"it calls {name!r} in an unknown way ({error})") from error


def _node_of_value(value: Any) -> Node:
    if isinstance(value, Symbol):
        return value.node
    if isinstance(value, (int, float)):
        return number_node(Number(source_of(value)))
    raise UntraceableError(f"it computes with a {type(value).__name__}")


def _node(op: str) -> Callable[..., Node]:
    return lambda *args: Node(op, args)


def _swapped(op: str) -> Callable[..., Node]:
    return lambda a, b: Node(op, (b, a))


def _product(a: Node, b: Node) -> Node:
    """Return ``a * b``, a number second: rules for numbers and for tensors share their kernels."""
    return Node("mul", (b, a) if is_number(a) else (a, b))


def _scaled(op: str) -> Callable[..., Node]:
    def add(a: Node, b: Node, *, alpha: Any = 1) -> Node:
        if is_truth(a) and is_truth(b):  # torch adds them to a truth value, or refuses
            raise TypeError("the sum or difference of truth values")
        return Node(op, (a, b if _is_one(alpha) else Node("mul", (b, _node_of_value(alpha)))))

    return add


def _is_one(value: Any) -> bool:
    return type(value) is not SymbolicNumber and value == 1


def _lerp(start: Node, end: Node, weight: Node) -> Node:
    # convex form: exact at both ends, whatever the weight
    if weight.op == "number":
        rest = number_node(Number(f"(1.0 - {weight.args[0].source})"))
    else:
        rest = Node("sub", (ONE, weight))
    return Node("add", (Node("mul", (start, rest)), Node("mul", (end, weight))))


def _addcmul(a: Node, b: Node, c: Node, *, value: Any = 1) -> Node:
    product = b if _is_one(value) else Node("mul", (b, _node_of_value(value)))
    return Node("add", (a, Node("mul", (product, c))))


def _addcdiv(a: Node, b: Node, c: Node, *, value: Any = 1) -> Node:
    quotient = Node("div", (b, c))
    return Node(
        "add", (a, quotient if _is_one(value) else Node("mul", (quotient, _node_of_value(value))))
    )


def _clamp(a: Node, low: Any = None, high: Any = None, **kwargs: Any) -> Node:
    low, high = kwargs.pop("min", low), kwargs.pop("max", high)
    if kwargs:
        raise TypeError(f"unexpected {list(kwargs)}")
    if low is not None:
        low = low if isinstance(low, Node) else _node_of_value(low)
        a = Node("where", (Node("less", (a, low)), low, a))
    if high is not None:
        high = high if isinstance(high, Node) else _node_of_value(high)
        a = Node("where", (Node("less", (high, a)), high, a))
    return a


def _filled(value: float) -> Callable[..., Node]:
    return lambda _: constant(value)


#: Name of a torch function, method or operator -> the graph it builds.
FUNCTIONS: dict[str, Callable[..., Node]] = {
    **MORE_FUNCTIONS,
    "add": _scaled("add"),
    "sub": _scaled("sub"),
    "subtract": _scaled("sub"),
    "mul": _product,
    "multiply": _product,
    "div": _node("div"),
    "divide": _node("div"),
    "true_divide": _node("div"),
    "neg": _node("neg"),
    "sqrt": _node("sqrt"),
    "rsqrt": lambda a: Node("reciprocal", (Node("sqrt", (a,)),)),
    "reciprocal": _node("reciprocal"),
    "abs": _node("abs"),
    "sign": _node("sign"),
    "square": square,
    "maximum": _node("maximum"),
    "minimum": _node("minimum"),
    "clamp": _clamp,
    "clip": _clamp,
    "relu": lambda a: Node("maximum", (a, ZERO)),
    "where": _node("where"),
    "lerp": _lerp,
    "addcmul": _addcmul,
    "addcdiv": _addcdiv,
    "clone": lambda a: a,
    "zeros_like": _filled(0.0),
    "ones_like": _filled(1.0),
    "full_like": lambda _, value: value,
    "lt": _node("less"),
    "gt": _swapped("less"),
    "le": _node("less_equal"),
    "ge": _swapped("less_equal"),
    "eq": _node("equal"),
    "ne": _node("not_equal"),
}

_REFLECTED = ("add", "sub", "mul", "truediv", "pow")
_OPERATORS = (*_REFLECTED, "neg", "abs", "lt", "gt", "le", "ge", "eq", "ne")
_LOGICAL = {"and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor", "invert": "bitwise_not"}


def _operator(name: str, swap: bool = False) -> Callable[..., Any]:
    function = "div" if name == "truediv" else name

    def apply(self: SymbolicTensor, *others: Any) -> Any:
        return call(function, (*others, self) if swap else (self, *others), {})

    return apply


for _name in _OPERATORS:
    setattr(SymbolicTensor, f"__{_name}__", _operator(_name))
for _name, _function in _LOGICAL.items():
    setattr(SymbolicTensor, f"__{_name}__", _operator(_function))
for _name in _REFLECTED:
    setattr(SymbolicTensor, f"__r{_name}__", _operator(_name, swap=True))
