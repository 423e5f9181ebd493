"""Pointwise graphs in plain torch, and optimizers of a user's own: the oracles of kernel tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

import torchopt
from torchopt import ElementwiseTransformation, transformation
from torchopt.base import numerics
from torchopt.core.hyper import hyper
from torchopt.kernels.generate.graph import (
    OPERATIONS,
    TRUTH,
    Kernel,
    Node,
    Number,
    input_node,
    number_node,
    topological,
)
from torchopt.kernels.generate.program import Program, build


#: What each operation means. Written down here anew, not taken from the library.
MEANING: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "neg": torch.neg,
    "sqrt": numerics.root,
    "root_slope": lambda y: torch.where(y == 0, 0.0, 0.5 / y),
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
    "and": lambda a, b: (a != 0) & (b != 0),
    "or": lambda a, b: (a != 0) | (b != 0),
    "not": lambda a: a == 0,
    **{op: getattr(torch, op) for op in ("exp", "log", "expm1", "log1p", "tanh", "sigmoid", "pow")},
}
#: Those whose last digits depend on who computes them.
INEXACT = frozenset({"exp", "log", "expm1", "log1p", "tanh", "sigmoid", "pow"})


def exact_root(x: Tensor) -> Tensor:
    """The square root rounded correctly, as C gives it; that of torch may be off by one unit."""
    with np.errstate(invalid="ignore"):
        return torch.from_numpy(np.asarray(np.sqrt(x.numpy())))


def evaluate(
    outputs: Mapping[str, Node],
    inputs: Mapping[str, Tensor],
    number: Callable[[str], float],
    exact: bool = False,
) -> dict[str, Tensor]:
    """Compute a graph by torch, one operation after the other.

    Args:
        outputs: The graph.
        inputs: A tensor for each input operand.
        number: The value of the expression of a number.
        exact: Whether to give the bits of IEEE arithmetic instead of a graph to differentiate.
    """
    meaning = {**MEANING, "sqrt": exact_root} if exact else MEANING
    like = next(iter(inputs.values()))
    values: dict[Node, Tensor] = {}
    for node in topological(outputs.values()):
        if node.op == "input":
            values[node] = inputs[node.args[0]]
        elif node.op == "number":
            values[node] = torch.tensor(number(node.args[0].source), dtype=like.dtype)
        else:
            values[node] = meaning[node.op](*(values[a] for a in node.args))
    return {operand: values[node].expand_as(like) for operand, node in outputs.items()}


def evaluate_kernel(
    kernel: Kernel,
    inputs: Mapping[str, Tensor],
    row: tuple[float, ...] | list[float],
    exact: bool = False,
) -> dict[str, Tensor]:
    """Compute a kernel by torch, its numbers given by position as a kernel takes them."""
    return evaluate(kernel.outputs, inputs, lambda s: row[kernel.numbers.index(s)], exact)


def assert_equal(actual: Tensor, expected: Tensor, kernel: Kernel) -> None:
    """Assert that two results of a kernel have the same bits, but for what is not promised."""
    what = (kernel.text, actual, expected)
    if INEXACT.isdisjoint(op for _, op, _ in kernel.listing.statements):
        assert torch.equal(actual.nan_to_num(7e7), expected.nan_to_num(7e7)), what
    else:
        kind = torch.finfo(actual.dtype)
        options = {"rtol": 4 * kind.eps, "atol": kind.tiny, "equal_nan": True}
        assert torch.allclose(actual, expected, **options), what


def single_operation(op: str, operand: str = "u") -> dict[str, Node]:
    """Return a graph of g, p and s0 with one operation, as far as it can stand alone."""
    g, p, s0 = (input_node(s) for s in ("g", "p", "s0"))
    less = Node("less", (g, p))
    if op == "where":
        return {operand: Node(op, (less, p, s0))}
    arguments = (g, p, s0)[: OPERATIONS[op]]
    if op in ("and", "or", "not"):
        arguments = (less, Node("equal", (p, s0)))[: OPERATIONS[op]]
    node = Node(op, arguments)
    if op in TRUTH:
        node = Node("where", (node, s0, number_node(Number("0.25"))))
    return {operand: node}


def constant_value(source: str) -> float:
    """The value of a number that is written out; no variables."""
    return float(eval(source, {"__builtins__": {"float": float}}, {}))


def user_optimizer(
    rule: Callable[..., Any], slots: tuple[str, ...] = (), **defaults: float
) -> Callable[..., ElementwiseTransformation]:
    """Return a class as a user would write it, from its rule ``(g, p, t, slots, **hyper)``."""

    def method(self: Any, g: Any, p: Any, t: Any, slots: Any, *args: Any, **values: Any) -> Any:
        return rule(g, p, t, slots, **values)

    namespace = {
        "__annotations__": dict.fromkeys(defaults, float),
        "__module__": __name__,
        "slots": slots,
        "uses_step": True,
        "rule": method,
        **{name: hyper(value) for name, value in defaults.items()},
    }
    return transformation(type("User", (ElementwiseTransformation,), namespace))


def program_of(tx: Any, step: int = 2, has_params: bool = True) -> Program:
    """Trace a transformation with the slots that it starts with."""
    rows = rows_of(tx, step)
    present = [
        slot is not None
        for part in tx.parts
        for slot in part.first_slots(torch.zeros(1), **part.hyperparameters())
    ]
    return build(tx.parts, rows, step, present, has_params)


def rows_of(tx: Any, step: int) -> list[dict[str, Any]]:
    """The hyperparameters of each part, and its counters if they start before this step."""
    starts = tx.init([]).counters
    row = tx.plan.count(tx.hyperparameters(), step, starts)
    return [tx.plan.rows_of(k, [row])[0] for k in range(len(tx.parts))]


def values_of(tx: Any, step: int = 2) -> list[float]:
    """The numbers among the hyperparameters, in the order in which programs take them."""
    values = []
    for row in rows_of(tx, step):
        for value in row.values():
            for number in value if isinstance(value, tuple) else (value,):
                if not isinstance(number, bool):
                    values.append(number)
    return values


def other_kernels() -> list[Kernel]:
    """Kernels that nobody has compiled: the interpreter of the C library runs them."""
    transformations = [
        torchopt.sgd(0.1, momentum=0.9, nesterov=True),
        torchopt.adam(0.1, amsgrad=True),
        torchopt.adam(0.1, eps_root=0.1),
        torchopt.rmsprop(0.1, centered=True, momentum=0.9),
        user_optimizer(signed_adam, ("m", "v"), lr=0.1, b1=0.9, b2=0.99, eps=1e-8)(),
        torchopt.chain(torchopt.scale_by_rms(), torchopt.trace(0.9), torchopt.scale_by_adam()),
    ]
    kernels = [k for tx in transformations for k in program_of(tx).kernels.values() if k.outputs]
    return list({kernel.text: kernel for kernel in kernels}.values())


def signed_adam(
    g: Any, p: Any, t: Any, slots: Any, lr: float, b1: float, b2: float, eps: float
) -> Any:
    """A rule of a user's own: Adam, with half a step where the gradient has turned."""
    m, v = slots
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * g * g
    u = (m / (1 - b1**t)) / (torch.sqrt(v / (1 - b2**t)) + eps)
    u = torch.where(u * g > 0, u, 0.5 * u) + 0.1 * torch.sign(m)
    return -lr * u, (m, v)
