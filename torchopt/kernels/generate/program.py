"""The kernels of a segment of transformations: its rules traced one after the other."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from torchopt.kernels.generate.derivative import derive
from torchopt.kernels.generate.graph import (
    CALLS,
    Kernel,
    Node,
    Number,
    input_node,
    make_kernel,
    number_node,
    substitute,
    topological,
)
from torchopt.kernels.generate.learned import NUMBER, SINGLE, hypers_in, hypers_of, is_hyper, symbol
from torchopt.kernels.generate.tracing import (
    Guards,
    SymbolicNumber,
    SymbolicTensor,
    UntraceableError,
)


#: The operands that every segment has: the gradient comes in as ``g``, the parameter as ``p``, and
#: slot number ``k`` as ``s<k>``. What goes out as ``u`` is the update, or the new parameter.
GRADIENT, PARAMETER, UPDATE = "g", "p", "u"


#: Symbols note what happens to them in one place: one trace at a time.
_TRACING = threading.RLock()


def slot_operand(position: int) -> str:
    """Return the name of the operand of a slot."""
    return f"s{position}"


Numbers = Callable[[Sequence[float], float], tuple[float, ...]]


class Conditions(NamedTuple):
    """The comparisons of numbers that a trace has come to.

    Attributes:
        compare: The function that makes them.
        outcome: How they came out.
    """

    compare: Callable[[Sequence[float], float], tuple[bool, ...]]
    outcome: tuple[bool, ...]

    def hold(self, values: Sequence[float], step: float) -> bool:
        """Whether they come out the same for these numbers."""
        try:
            return self.compare(values, step) == self.outcome
        except (ArithmeticError, TypeError):  # a later comparison that the rule would not come to
            return False


@dataclasses.dataclass(eq=False)
class Program:
    """What one segment computes for one parameter, as long as its guards hold.

    Attributes:
        kernels: ``"update"``, ``"apply"``, ``"backward_update"`` and ``"backward_apply"``.
        conditions: For which numbers it was traced.
        numbers: For each kernel, the function that gives its numbers.
        passes: For each backward kernel, operands whose derivative is one that comes in, unchanged.
        kinds: The kind of each hyperparameter (see learned.py), empty if all are
            numbers. The backward kernels in ``kernels`` give no derivative by any of them.
        guarded: The hyperparameters that the guards read, as operands.
    """

    kernels: dict[str, Kernel]
    conditions: Conditions
    numbers: dict[str, Numbers]
    passes: dict[str, dict[str, str]]
    kinds: tuple[str, ...] = ()
    guarded: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        self._hypers: dict[str, list[str]] = {}
        self._backward: dict[tuple[str, frozenset[str]], tuple[Kernel, Any]] = {}

    def hypers(self, mode: str) -> list[str]:
        """Return the operands of the hyperparameters that are tensors and are used, in order."""
        if not self.kinds:
            return []
        if mode not in self._hypers:
            used = hypers_of(self.kernels[mode].outputs.values())
            tensors = [f"h{k}" for k, kind in enumerate(self.kinds) if kind != NUMBER]
            self._hypers[mode] = [operand for operand in tensors if operand in used]
        return self._hypers[mode]

    def summed(self, operand: str) -> bool:
        """Whether the derivative by a operand is summed over the entries of a parameter."""
        return is_hyper(operand) and self.kinds[int(operand[1:])] == SINGLE

    def backward(self, mode: str, hypers: frozenset[str]) -> tuple[Kernel, Numbers]:
        """Return a backward kernel that also gives derivatives by hyperparameters, and its numbers.

        Raises:
            UntraceableError: If a number has no derivative that is an expression.
        """
        name = f"backward_{mode}"
        if not hypers:
            return self.kernels[name], self.numbers[name]
        found = self._backward.get((mode, hypers))
        if found is None:
            bars = _derivatives(self.kernels[mode].outputs, sorted(hypers))
            passes = self.passes[name]
            kernel = make_kernel({s: n for s, n in bars.items() if s not in passes})
            found = kernel, _compile(kernel.numbers, bool(self.kinds))
            self._backward[mode, hypers] = found
        return found


def build(
    parts: Sequence[Any],
    rows: Sequence[dict[str, Any]],
    step: float,
    present: Sequence[bool],
    has_params: bool,
    kinds: tuple[str, ...] = (),
) -> Program:
    """Trace a segment.

    Args:
        parts: Elementwise transformations.
        rows: The hyperparameters of each part: numbers and flags.
        step: The step count.
        present: For each slot of the segment, whether it is a tensor (else ``None``).
        has_params: Whether the parameter is known.
        kinds: See :class:`Program`. A tensor with one entry is a number in ``rows``.

    Raises:
        UntraceableError: If a rule does something that has no pointwise graph. As any other error
            of a rule it has the attribute ``guards``: for which numbers the rule comes to it.
    """
    traces = []
    with _TRACING:
        for decoy in SymbolicNumber.decoys:
            SymbolicNumber.decoy = decoy
            traces.append(_trace(parts, rows, step, present, has_params, kinds))
    outputs, guards = traces[0]
    if traces[0] != traces[1]:
        error = UntraceableError("it computes with its numbers in a way that cannot be followed")
        error.guards = guards
        raise error
    outputs = _with_sign(outputs)
    # a slot that stays what it is needs no output
    computed = {s: node for s, node in outputs.items() if node is not input_node(s)}
    applied = {**computed, UPDATE: Node("add", (input_node(PARAMETER), computed[UPDATE]))}
    kernels = {"update": make_kernel(computed), "apply": make_kernel(applied)}
    passes = {}
    for mode, graph in (("update", computed), ("apply", applied)):
        bars = _derivatives(graph, ())
        passed = {s: n.args[0] for s, n in bars.items() if n.op == "input"}
        name = f"backward_{mode}"
        kernels[name] = make_kernel({s: n for s, n in bars.items() if s not in passed})
        passes[name] = passed
    return Program(
        kernels,
        conditions_of(guards),
        {name: _compile(kernel.numbers, bool(kinds)) for name, kernel in kernels.items()},
        passes,
        kinds,
        frozenset().union(*(hypers_in(source) for source, _ in guards)),
    )


def _derivatives(graph: dict[str, Node], hypers: Sequence[str]) -> dict[str, Node]:
    """Return the derivatives that are not zero: by tensors, and by these hyperparameters."""
    bars = derive(graph, hypers=hypers)
    return {
        operand: node
        for operand, node in bars.items()
        if node.op != "number" and (operand in hypers or not is_hyper(operand))
    }


@contextlib.contextmanager
def _leaving(guards: Guards) -> Iterator[None]:
    """Note at an error which comparisons a rule had made before."""
    try:
        yield
    except Exception as error:
        error.guards = guards  # pyright: ignore[reportAttributeAccessIssue]
        raise


def conditions_of(guards: Sequence[tuple[str, bool]]) -> Conditions:
    """Return comparisons so that they can be made again."""
    compare = _compile(source for source, _ in guards)
    return Conditions(compare, tuple(outcome for _, outcome in guards))


def _symbolic_rows(rows: Sequence[dict[str, Any]], kinds: tuple[str, ...]) -> list[dict[str, Any]]:
    position = 0

    def symbolic(number: Any) -> Any:
        nonlocal position
        if isinstance(number, bool):
            return number
        position += 1
        if kinds and kinds[position - 1] != NUMBER:
            return symbol(number, position - 1, kinds[position - 1])
        return SymbolicNumber(float(number), f"h[{position - 1}]")

    return [
        {
            name: tuple(map(symbolic, value)) if isinstance(value, tuple) else symbolic(value)
            for name, value in row.items()
        }
        for row in rows
    ]


def _trace(
    parts: Sequence[Any],
    rows: Sequence[dict[str, Any]],
    step: float,
    present: Sequence[bool],
    has_params: bool,
    kinds: tuple[str, ...],
) -> tuple[dict[str, Node], Guards]:
    u: Any = SymbolicTensor(input_node(GRADIENT))
    p = SymbolicTensor(input_node(PARAMETER)) if has_params else None
    t = SymbolicNumber(step, "t")
    outputs: dict[str, Node] = {}
    position = 0
    with torch.no_grad(), Guards() as guards, _leaving(guards):
        for part, row in zip(parts, _symbolic_rows(rows, kinds)):
            operands = [slot_operand(position + k) for k in range(len(part.slot_names()))]
            slots = tuple(
                SymbolicTensor(input_node(s)) if present[position + k] else None
                for k, s in enumerate(operands)
            )
            u, new = part.rule(u, p, t, slots, **row)  # pyright: ignore[reportArgumentType]
            for operand, value in zip(operands, new, strict=True):
                if value is not None:
                    outputs[operand] = _node_of(value)
            position += len(operands)
    return {UPDATE: _node_of(u), **outputs}, guards


def _node_of(value: Any) -> Node:
    if not isinstance(value, SymbolicTensor):
        raise UntraceableError(f"it returns a {type(value).__name__}")
    return value.node


def _with_sign(outputs: dict[str, Node]) -> dict[str, Node]:
    """Read the gradient times a number that is 1 or, to maximize, -1: one kernel for both."""
    g = input_node(GRADIENT)
    nodes = topological(outputs.values())
    users = [node for node in nodes if g in node.args]
    flipped = bool(users) and all(node.op == "neg" for node in users) and g not in outputs.values()
    # "+1.0" and not the constant 1, which the derivative would leave out
    sign = number_node(Number("-1.0" if flipped else "+1.0"))
    signed = Node("mul", (g, sign))
    target = Node("neg", (g,)) if flipped else g
    replaced = substitute(list(outputs.values()), lambda node: signed if node == target else None)
    return dict(zip(outputs, replaced))


def _compile(sources: Any, learned: bool = False) -> Callable[[Sequence[float], float], Any]:
    """Return a function of the hyperparameters and the step count that gives all expressions.

    Nobody checks what a tensor holds: with one, the root of a negative number is an error.
    """
    body = "".join(f"{source}, " for source in sources)
    # sources are made of symbols, of numbers only
    evaluate = eval(f"lambda h, t: ({body})", dict(CALLS))
    return functools.partial(_reals, evaluate) if learned and "**" in body else evaluate


def _reals(evaluate: Callable[..., tuple[Any, ...]], h: Sequence[float], t: float) -> Any:
    values = evaluate(h, t)
    if complex in map(type, values):
        raise ArithmeticError("the root of a negative number")
    return values
