"""Graphs written down: a kernel as text from which it, its numbers and its backward pass are made.

An operator of ``torch.library`` takes no Python objects. Its kernel is therefore a text such as ::

    n0 := +1.0
    n1 := (-h[0])
    x0 = mul g n0
    x1 = mul x0 n1
    u <- x1

with the expressions of the numbers first (``h`` are the hyperparameters, ``t`` the step count). It
says all that is to be known of the kernel, in this process and in any other.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from torchopt.base.numerics import root
from torchopt.kernels.generate.derivative import derive
from torchopt.kernels.generate.graph import (
    CALLS,
    OPERATIONS,
    Kernel,
    Node,
    Number,
    input_node,
    make_kernel,
    number_node,
    topological,
)


Numbers = Callable[[Sequence[float], float], tuple[float, ...]]


@dataclasses.dataclass(frozen=True, eq=False)
class Written:
    """What a text says.

    Attributes:
        forward: The kernel.
        backward: The kernel of its backward pass.
        numbers: The function that gives the numbers of ``forward``.
        backward_numbers: The function that gives the numbers of ``backward``.
        passes: Input operands whose derivative is one incoming operand unchanged.
    """

    forward: Kernel
    backward: Kernel
    numbers: Numbers
    backward_numbers: Numbers
    passes: dict[str, str]


@functools.lru_cache(maxsize=1024)
def write(kernel: Kernel) -> str:
    """Return the text of a kernel."""
    numbers = [f"n{k} := {source}" for k, source in enumerate(kernel.numbers)]
    return "\n".join([*numbers, kernel.text])


@functools.lru_cache(maxsize=1024)
def read(text: str) -> Written:
    """Return what a text says.

    Raises:
        ValueError: If it is no text of a kernel.
    """
    outputs = _parse(text)
    if not outputs:
        raise ValueError("The text of a kernel must say what it computes, as 'u <- x0' does.")
    forward, bars = make_kernel(outputs), derive(outputs)
    passes = {s: node.args[0] for s, node in bars.items() if node.op == "input"}
    kept = {s: node for s, node in bars.items() if s not in passes and node.op != "number"}
    backward = make_kernel(kept)
    return Written(
        forward, backward, _function(forward.numbers), _function(backward.numbers), passes
    )


def _parse(text: str) -> dict[str, Node]:
    values: dict[str, Node] = {}
    outputs: dict[str, Node] = {}

    def value(name: str) -> Node:
        if name not in values:
            if not name.isidentifier() or name[0] in "nx":
                raise ValueError(f"{name!r} is used before it is computed")
            values[name] = input_node(name)
        return values[name]

    for line in text.splitlines():
        try:
            target, sign, rest = line.split(" ", 2)
            if sign == ":=":
                values[target] = number_node(Number(_checked(rest)))
            elif sign == "<-":
                outputs[target] = value(rest)
            else:
                op, *arguments = rest.split(" ")
                if sign != "=" or OPERATIONS.get(op) != len(arguments):
                    raise ValueError(f"there is no operation {op!r} of {len(arguments)} values")
                values[target] = Node(op, tuple(map(value, arguments)))
        except ValueError as error:
            raise ValueError(f"{line!r} is no line of a kernel's text: {error}.") from error
    return outputs


_OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow)
#: No expression that was traced comes near; Python's compiler fails at deep nesting.
_LONGEST, _DEEPEST = 2000, 200


def _checked(source: str) -> str:
    """Return an expression if it is one of floating-point numbers: it will be evaluated.

    Arithmetic of floats ends at once, in a number or an error. That of integers need not.
    """
    if len(source) > _LONGEST:
        raise ValueError(f"an expression of numbers has at most {_LONGEST} characters")
    try:
        node = ast.parse(source, mode="eval").body
        _check_floats(node)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError("it is no expression") from error
    # derivatives are made of it as it stands
    return f"({source})" if isinstance(node, ast.BinOp) and node.col_offset == 0 else source


def _check_floats(node: ast.expr, depth: int = 0) -> None:
    if depth > _DEEPEST:
        raise ValueError(f"an expression of numbers is nested at most {_DEEPEST} deep")
    depth += 1
    match node:
        case ast.Constant(value=float()) | ast.Name(id="t"):
            pass
        case ast.Subscript(value=ast.Name(id="h"), slice=ast.Constant(value=int())):
            pass
        case ast.UnaryOp(op=ast.UAdd() | ast.USub(), operand=operand):
            _check_floats(operand, depth)
        case ast.BinOp(left=left, op=op, right=right) if isinstance(op, _OPERATORS):
            _check_floats(left, depth)
            _check_floats(right, depth)
        case ast.Call(func=ast.Name(id="abs" | "log"), args=[argument], keywords=[]):
            _check_floats(argument, depth)
        case ast.Call(
            func=ast.Name(id="float"),
            args=[ast.Constant(value="inf" | "-inf" | "nan")],
            keywords=[],
        ):
            pass
        case ast.Constant():
            raise ValueError(f"its constants are numbers such as 1.0, got {node.value!r:.40}")
        case _:
            raise ValueError(f"an expression of numbers has no such {type(node).__name__}")


def _function(sources: Sequence[str]) -> Numbers:
    body = "".join(f"{source}, " for source in sources)
    return eval(f"lambda h, t: ({body})", {"__builtins__": dict(CALLS)})  # read by _checked


# Graphs in plain torch ----------------------------------------------------------------------------


def _root_slope(y: Tensor) -> Tensor:
    zero = y == 0
    return torch.where(zero, 0.0, 0.5 / torch.where(zero, 1.0, y))


_MEANING: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "neg": torch.neg,
    "sqrt": root,
    "root_slope": _root_slope,
    "reciprocal": torch.reciprocal,
    "abs": torch.abs,
    "sign": torch.sign,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "less": torch.lt,
    "less_equal": torch.le,
    "equal": torch.eq,
    "not_equal": torch.ne,
    "where": lambda c, a, b: torch.where(c != 0, a, b),
    "and": torch.logical_and,
    "or": torch.logical_or,
    "not": torch.logical_not,
    "exp": torch.exp,
    "log": torch.log,
    "expm1": torch.expm1,
    "log1p": torch.log1p,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "pow": torch.pow,
}


def evaluate(
    kernel: Kernel, inputs: Mapping[str, Tensor], numbers: Sequence[float]
) -> dict[str, Tensor]:
    """Compute a kernel for one parameter in plain torch: differentiable in every order and mode."""
    by_source = dict(zip(kernel.numbers, numbers))
    like = next(iter(inputs.values()))
    values: dict[Node, Tensor] = {}
    for node in topological(kernel.outputs.values()):
        if node.op == "input":
            values[node] = inputs[node.args[0]]
        elif node.op == "number":
            number = by_source[node.args[0].source]
            values[node] = torch.full((), number, dtype=like.dtype, device=like.device)
        else:
            values[node] = _MEANING[node.op](*(values[a] for a in node.args))
    return {operand: values[node].expand_as(like) for operand, node in kernel.outputs.items()}
