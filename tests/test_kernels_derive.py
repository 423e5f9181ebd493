"""Derivatives of pointwise graphs against autograd: random graphs, kinks, roots at zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import nonzero
from hypothesis import given, settings
from hypothesis import strategies as st
from pointwise import constant_value, evaluate
from tolerances import VALUES, assert_close
from torch import Tensor

from torchopt.kernels.generate.derivative import derive
from torchopt.kernels.generate.graph import Node, constant, input_node, make_kernel
from torchopt.kernels.generate.tracing import SymbolicTensor


# Random graphs ------------------------------------------------------------------------------------

OF_POSITIVE = ("sqrt", "log", "log1p")
UNARY = ("neg", "reciprocal", "abs", "sign", "exp", "expm1", "tanh", "sigmoid", *OF_POSITIVE)
BINARY = ("add", "sub", "mul", "div", "maximum", "minimum", "pow")
COMPARISONS = ("less", "less_equal", "equal", "not_equal")
STREAMS = ("g", "p", "s0", "s1")


@st.composite
def graphs(draw: Any) -> dict[str, Node]:
    """Graphs of up to twelve operations, whose values are used more than once."""
    values = [input_node(s) for s in STREAMS]
    numbers = [constant(c) for c in (0.3, -1.7, 2.0, 1.0, 0.0)]
    pick = lambda: draw(st.sampled_from(values))  # noqa: E731
    operand = lambda: draw(st.sampled_from([*values, *numbers]))  # noqa: E731
    for _ in range(draw(st.integers(1, 12))):
        op = draw(st.sampled_from([*UNARY, *BINARY, "where"]))
        if op in OF_POSITIVE:
            new = Node(op, (Node("abs", (pick(),)),))
        elif op in UNARY:
            new = Node(op, (pick(),))
        elif op == "where":
            condition = Node(draw(st.sampled_from(COMPARISONS)), (pick(), operand()))
            if draw(st.booleans()):
                other = Node(draw(st.sampled_from(COMPARISONS)), (pick(), operand()))
                condition = Node(draw(st.sampled_from(("and", "or"))), (condition, other))
            elif draw(st.booleans()):
                condition = Node("not", (condition,))
            new = Node(op, (condition, operand(), operand()))
        elif op in ("maximum", "minimum"):  # torch has no form of them with a number
            new = Node(op, (pick(), pick()))
        elif op == "pow":
            new = Node(op, (Node("abs", (pick(),)), operand()))
        elif op == "div":
            new = Node(op, (operand(), pick()))
        else:
            first, second = (pick(), operand()) if draw(st.booleans()) else (operand(), pick())
            new = Node(op, (first, second))
        values.append(new)
    return {"u": values[-1], "s0": draw(st.sampled_from(values))}


def backward_by_autograd(
    graph: dict[str, Node], inputs: dict[str, Tensor], bars: dict[str, Tensor]
) -> dict[str, Tensor]:
    leaves = {s: x.clone().requires_grad_() for s, x in inputs.items()}
    outputs = evaluate(graph, leaves, constant_value)
    kept = [s for s in graph if outputs[s].requires_grad]
    zeros = [torch.zeros_like(x) for x in inputs.values()]
    if not kept:
        return dict(zip(leaves, zeros))
    grads = torch.autograd.grad(
        [outputs[s] for s in kept],
        list(leaves.values()),
        [bars[s] for s in kept],
        materialize_grads=True,
    )
    return dict(zip(leaves, grads))


def backward_by_graph(
    graph: dict[str, Node], inputs: dict[str, Tensor], bars: dict[str, Tensor]
) -> dict[str, Tensor]:
    derivatives = derive(graph)
    given = {**inputs, **{f"bar_{s}": bar for s, bar in bars.items()}}
    found = evaluate(derivatives, given, constant_value)
    return {s: found.get(s, torch.zeros_like(x)) for s, x in inputs.items()}


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(graph=graphs(), seed=st.integers(0, 9))
def test_random_graphs(graph: dict[str, Node], seed: int) -> None:
    torch.manual_seed(seed)
    inputs = {s: nonzero(6) for s in STREAMS}
    bars = {s: nonzero(6) for s in graph}
    expected = backward_by_autograd(graph, inputs, bars)
    actual = backward_by_graph(graph, inputs, bars)
    values = evaluate(graph, inputs, constant_value)
    for operand, want in expected.items():
        got = actual[operand]
        # where x - x is divided by, both are infinite or nan; huge values cancel differently
        usual = torch.isfinite(want) & (want.abs() < 1e6)
        for value in values.values():
            usual &= torch.isfinite(value) & (value.abs() < 1e6)
        error = (got - want).abs() / (1 + want.abs())
        assert (error[usual] <= VALUES[torch.float64] * 1e4).all(), (operand, got, want)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(graph=graphs())
def test_text_determines_the_graph(graph: dict[str, Node]) -> None:
    """Kernels are found by their text, so it holds all there is: operands, operations, numbers."""
    kernel = make_kernel(graph)
    values: dict[str, Node] = {s: input_node(s) for s in kernel.inputs}
    values |= {f"n{k}": constant(constant_value(n)) for k, n in enumerate(kernel.numbers)}
    outputs = {}
    for line in kernel.text.splitlines():
        if " <- " in line:
            operand, name = line.split(" <- ")
            outputs[operand] = values[name]
        else:
            name, operation = line.split(" = ")
            op, *args = operation.split()
            values[name] = Node(op, tuple(values[a] for a in args))
    assert outputs == kernel.outputs
    assert make_kernel(outputs).name == kernel.name


def test_many_operations_in_a_row() -> None:
    """A graph as deep as any rule will be, where every value is used twice."""
    x = input_node("g")
    for _ in range(12):
        x = Node("add", (Node("mul", (x, constant(0.5))), Node("abs", (x,))))
    inputs, bars = {"g": nonzero(5)}, {"u": nonzero(5)}
    expected = backward_by_autograd({"u": x}, inputs, bars)
    assert_close(backward_by_graph({"u": x}, inputs, bars), expected, times=10)


# Kinks --------------------------------------------------------------------------------------------

TIES = {"g": [0.5, 0.5, -0.5, 0.0, 0.0, -0.2, 1.0], "p": [0.5, -0.5, 0.5, 0.0, 1.0, -0.2, 0.0]}
AT_KINKS: dict[str, Callable[[Any, Any], Any]] = {
    "maximum": lambda g, p: torch.maximum(g, p),
    "minimum": lambda g, p: torch.minimum(g, p),
    "maximum of one": lambda g, p: torch.maximum(g, g) * p,
    "relu": lambda g, p: torch.relu(g) + torch.relu(p),
    "clamp": lambda g, p: torch.clamp(g, -0.5, 0.5) * torch.clamp(p, min=0.0),
    "clamp above": lambda g, p: torch.clamp(g, max=0.5) - p.clamp(max=-0.2),
    "crossed bounds": lambda g, p: torch.clamp(g, 0.5, -0.5) + p,
    "abs": lambda g, p: g.abs() + (g - p).abs(),
    "sign": lambda g, p: torch.sign(g) * p,
    "where": lambda g, p: torch.where(g > p, g * 2, p * 3) + torch.where(g == p, g * p, p),
    "truth": lambda g, p: (g >= p) * g,
}


@pytest.mark.parametrize("name", AT_KINKS)
def test_kinks_are_those_of_torch(name: str) -> None:
    inputs = {s: torch.tensor(x, dtype=torch.float64) for s, x in TIES.items()}
    leaves = {s: x.clone().requires_grad_() for s, x in inputs.items()}
    bar = nonzero(7)
    value = AT_KINKS[name](**leaves)
    expected = torch.autograd.grad(value, list(leaves.values()), bar, materialize_grads=True)
    graph = {"u": AT_KINKS[name](**{s: SymbolicTensor(input_node(s)) for s in inputs}).node}
    assert_close(evaluate(graph, inputs, constant_value)["u"], value.detach())
    actual = backward_by_graph(graph, inputs, {"u": bar})
    assert_close([actual[s] for s in inputs], list(expected))


def test_roots_at_zero_have_no_slope() -> None:
    """The derivative of a root is zero where the root is zero, and never infinite or nan."""
    v = torch.tensor([0.0, 0.04, 0.0, 1.0], dtype=torch.float64)
    g = torch.tensor([0.0, 0.3, 0.7, -2.0], dtype=torch.float64)

    def rule(g: Any, v: Any) -> Any:
        return g / (v.sqrt() + 0.1)

    graph = {"u": rule(SymbolicTensor(input_node("g")), SymbolicTensor(input_node("s0"))).node}
    bar = nonzero(4)
    actual = backward_by_graph(graph, {"g": g, "s0": v}, {"u": bar})
    denominator = v.sqrt() + 0.1
    slope = torch.tensor([0.0, 0.5 / 0.2, 0.0, 0.5], dtype=torch.float64)
    assert_close(actual["g"], bar / denominator)
    assert_close(actual["s0"], -bar * g / denominator**2 * slope)


def test_what_nothing_depends_on_is_the_number_zero() -> None:
    g, p = (SymbolicTensor(input_node(s)) for s in "gp")
    derivatives = derive({"u": (torch.sign(g) * 2 + (p > 0) * 1.0).node})
    assert derivatives == {"g": constant(0.0), "p": constant(0.0)}
