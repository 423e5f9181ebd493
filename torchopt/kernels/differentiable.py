"""What the nodes of the graph compute: the update of some parameters, and its backward pass.

The forward and the first backward pass are kernels. The derivative of the backward pass is taken by
differentiating the rules, so every higher order is that of the rules.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import Tensor

from torchopt.core.packed import Packed
from torchopt.kernels.arguments import Arguments, with_hypers
from torchopt.kernels.backends.launch import SUM, launch
from torchopt.kernels.generate.graph import Kernel, topological
from torchopt.kernels.generate.learned import hypers_of, is_hyper
from torchopt.kernels.generate.program import Program
from torchopt.kernels.independent import divide
from torchopt.kernels.places import Place, places
from torchopt.kernels.rules import Rules


@dataclasses.dataclass(eq=False)
class Group:
    """Parameters that one kernel updates.

    Tensors are flat lists, operand by operand: all gradients, then all parameters, and so on, for
    ``inputs``; the updates, then each new slot, for ``outputs``. A packed operand is one tensor.

    Attributes:
        program: The kernels, of one parameter.
        mode: ``"update"`` or ``"apply"``: whether what comes out is added to the parameters.
        count: How many parameters.
        indices: Which row of numbers each parameter has; ``None`` if there is one only.
        values: Rows of hyperparameters and the step count, from which the numbers are computed.
        rule: The same computation by the rules: the inputs to the outputs.
        bare: Whether nothing that can be freed lies behind them in the graph.
    """

    program: Program
    mode: str
    count: int
    indices: list[int] | None
    values: Sequence[tuple[Sequence[float], int]]
    rule: Rules
    bare: bool = False

    @property
    def kernel(self) -> Kernel:
        """The forward kernel."""
        return self.program.kernels[self.mode]

    def backward_kernel(self, hypers: frozenset[str]) -> Kernel:
        """Return the backward kernel with the derivatives by some hyperparameters."""
        return self.program.backward(self.mode, hypers)[0]

    def columns(
        self, operands: Sequence[str], items: Sequence[Any], packed: frozenset[str] = frozenset()
    ) -> dict[str, Sequence[Any]]:
        """Return flat items by operand; packed operands have one."""
        if not packed:
            n = self.count
            return {s: items[k * n : (k + 1) * n] for k, s in enumerate(operands)}
        columns, begin = {}, 0
        for operand in operands:
            end = begin + (1 if operand in packed else self.count)
            columns[operand] = items[begin:end]
            begin = end
        return columns

    @property
    def places_in(self) -> list[Place]:
        """Where the inputs stand."""
        return places(self.rule.inputs, self.count, self.rule.packed_in)

    @property
    def places_out(self) -> list[Place]:
        """Where the outputs stand."""
        return places(self.rule.outputs, self.count, self.rule.packed_out)

    def subset(self, rows: Sequence[int], bare: bool = False) -> Group:
        """Return the group of some parameters, nothing of it packed."""
        indices, values = self.indices, self.values
        if indices is not None:
            used = list(dict.fromkeys(indices[k] for k in rows))
            values = [values[index] for index in used]
            indices = [used.index(indices[k]) for k in rows] if len(used) > 1 else None
        rule = self.rule.subset(rows)
        return Group(self.program, self.mode, len(rows), indices, values, rule, bare)

    def divided(self, tensors: Sequence[Tensor]) -> list[tuple[list[int], Group]]:
        """Return groups that may each be one node of the graph, and their rows.

        A group of which something is packed must have been divided before.
        """
        if self.rule.packing is not None:
            return [(list(range(self.count)), self)]
        columns = [tensors[k : k + self.count] for k in range(0, len(tensors), self.count)]
        parts = divide(columns, (), self.count)
        if len(parts) > 1:
            return [(rows, self.subset(rows, bare)) for rows, bare in parts]
        rows, bare = parts[0]
        return [(rows, self if bare == self.bare else dataclasses.replace(self, bare=bare))]

    def arguments(self, tensors: Sequence[Tensor], sums: bool = False) -> Arguments:
        """Return what kernels read of real tensors; ``sums`` if derivatives are to be summed."""
        rule = self.rule
        columns: dict[str, Any] = self.columns(rule.inputs, list(tensors), rule.packed_in)
        for operand in rule.packed_in:
            assert rule.packing is not None
            columns[operand] = Packed(columns[operand][0], rule.packing)
        if not rule.hyper_dims:
            return Arguments(columns, {}, self.values, self.indices, 1)
        return with_hypers(columns, self.program, rule, self.values, self.indices, sums)

    def run(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run the forward kernel on real tensors."""
        kernel, rule = self.program.kernels[self.mode], self.rule
        arguments = self.arguments(tensors)
        function = self.program.numbers[self.mode]
        try:
            numbers = [function(values, step) for values, step in arguments.values]
        except ArithmeticError:  # a learned number at the end of its range
            return rule(*tensors)
        inputs = arguments.columns
        wanted: dict[str, Any] = {
            s: rule.packing if s in rule.packed_out else None for s in kernel.output_operands
        }
        like: Any = inputs["p"] if "p" in inputs else inputs["g"]
        outputs = launch(kernel, inputs, like, wanted, numbers, arguments.indices, arguments.pieces)
        flat = [(x.flat,) if type(x) is Packed else x for x in outputs.values()]
        return tuple(itertools.chain.from_iterable(flat))


@dataclasses.dataclass(eq=False)
class BackwardCall:
    """Which derivatives come in and which are wanted.

    Attributes:
        group: The forward call.
        given: For each output of the forward pass, whether its derivative is there.
        wanted: Input operand -> for each of its tensors, whether the derivative by it is wanted.
    """

    group: Group
    given: list[bool]
    wanted: dict[str, Sequence[bool]]

    @property
    def places_in(self) -> list[Place]:
        """Where the inputs stand: derivatives, then the inputs of the group."""
        bars = [(f"bar_{s}", row) for s, row in self.group.places_out]
        return [*(bar for bar, given in zip(bars, self.given) if given), *self.group.places_in]

    @property
    def places_out(self) -> list[Place]:
        """Where the outputs stand."""
        found = places(list(self.wanted), self.group.count, self.group.rule.packed_in)
        return [(s, row) for s, row in found if self._wants(s, row)]

    def _wants(self, operand: str, row: int) -> bool:
        mask = self.wanted[operand]
        return mask[0] if operand in self.group.rule.packed_in else mask[row]

    def subset(self, rows: Sequence[int], there: Container[Place]) -> BackwardCall:
        """Return the call for some parameters, nothing of it packed.

        Args:
            rows: Which parameters.
            there: The places of the incoming derivatives that there are.
        """
        group = self.group.subset(rows)
        given = [(f"bar_{s}", rows[k]) in there for s, k in group.places_out]
        wanted: dict[str, Sequence[bool]] = {
            s: [self._wants(s, k) for k in rows] for s in self.wanted
        }
        return BackwardCall(group, given, wanted)

    def divided(self, tensors: Sequence[Tensor]) -> list[tuple[list[int], BackwardCall]]:
        """Return calls that may each be one node of the graph, and their rows."""
        everyone = list(range(self.group.count))
        if not self.group.bare or self.group.rule.packing is not None:
            return [(everyone, self)]
        found = dict(zip(self.places_in, tensors))
        operands = dict.fromkeys(operand for operand, _ in found)
        columns = [[found.get((s, k), _NOTHING) for k in everyone] for s in operands]
        divided = []
        for rows, bare in divide(columns, (), self.group.count):
            apart = [[k] for k in rows] if bare else [rows]
            divided += [(own, self.subset(own, found)) for own in apart]
        return divided

    def split(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor | None], list[Tensor]]:
        """Return the incoming derivatives, ``None`` where there is none, and the inputs."""
        count = len(self.given)
        if all(self.given):
            return list(tensors[:count]), list(tensors[count:])
        rest = iter(tensors)
        bars = [next(rest) if given else None for given in self.given]
        return bars, list(rest)

    def run(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run the backward kernel on real tensors; return what is wanted."""
        group, rule = self.group, self.group.rule
        hypers = frozenset(filter(is_hyper, self.wanted))
        kernel, function = group.program.backward(group.mode, hypers)
        bars, saved = self.split(tensors)
        summed = frozenset(filter(group.program.summed, hypers))
        arguments = group.arguments(saved, bool(summed))
        try:
            numbers = [function(values, step) for values, step in arguments.values]
        except ArithmeticError:  # a learned number at the end of its range
            return self.rule(*tensors)
        inputs = arguments.columns
        like = inputs["p"] if "p" in inputs else inputs["g"]
        operands = [f"bar_{s}" for s in group.kernel.output_operands]
        packed = frozenset(f"bar_{s}" for s in rule.packed_out)
        columns: dict[str, Any] = inputs | group.columns(operands, bars, packed)
        for operand in packed:
            assert rule.packing is not None
            (bar,) = columns[operand]
            columns[operand] = [None] * group.count if bar is None else Packed(bar, rule.packing)
        wanted: dict[str, Any] = {}
        for operand in kernel.output_operands:
            wanted[operand] = self.wanted[operand]
            if operand in summed:
                wanted[operand] = SUM
            elif operand in rule.packed_in:
                needed = self.wanted[operand][0]
                wanted[operand] = rule.packing if needed else [False] * group.count
        outputs: dict[str, Any] = launch(
            kernel,
            {s: columns[s] for s in kernel.inputs},
            like,
            wanted,
            numbers,
            arguments.indices,
            arguments.pieces,
        )
        for operand in hypers:
            outputs[operand] = self._by_hypers(
                operand, outputs[operand], arguments.given[operand], like
            )
        flat = [(x.flat,) if type(x) is Packed else x for x in outputs.values()]
        return tuple([x for x in itertools.chain.from_iterable(flat) if x is not None])

    def _by_hypers(
        self, operand: str, found: Any, given: Sequence[Tensor], like: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """Return derivatives in the shapes and dtypes of the hyperparameters."""
        if isinstance(found, Tensor):  # sums; copies, so that each can be changed by itself
            found = found.view(len(given), -1).to(given[0].dtype)
            found = torch.unbind_copy(found if found.shape[1] > 1 else found.view(-1))
            if all(self.wanted[operand]) and all(map(_is_like, found, given)):
                return list(found)
        derivatives: list[Tensor | None] = []
        for k, (x, h, wanted) in enumerate(zip(found, given, self.wanted[operand])):
            if not wanted:
                derivatives.append(None)
                continue
            if x.shape != h.shape and x.numel() != h.numel():
                x = x.sum_to_size(self.group.rule.aligned(operand, k, h, like[k]).shape)
            x = x if x.shape == h.shape else x.reshape(h.shape)
            derivatives.append(x if x.dtype == h.dtype else x.to(h.dtype))
        return derivatives

    def rule(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Compute the same by differentiating the rules."""
        group = self.group
        bars, saved = self.split(tensors)
        outputs, vjp = torch.func.vjp(group.rule, *saved)  # pyright: ignore[reportAssignmentType]
        full = tuple(torch.zeros_like(o) if b is None else b for o, b in zip(outputs, bars))
        return self._wanted(vjp(full))

    def _wanted(self, by_input: Sequence[Tensor]) -> tuple[Tensor, ...]:
        packed = self.group.rule.packed_in
        columns = self.group.columns(self.group.rule.inputs, by_input, packed)
        return tuple(
            x
            for operand, mask in self.wanted.items()
            for x, wanted in zip(columns[operand], mask)
            if wanted
        )


_NOTHING = torch.empty(0)


def _is_like(x: Tensor, h: Tensor) -> bool:
    return x.shape == h.shape and x.dtype == h.dtype


@functools.lru_cache(maxsize=256)
def sources(kernel: Kernel) -> dict[str, frozenset[str]]:
    """Return, for each output operand of a kernel, the input operands that it is computed from.

    The hyperparameters are among them.
    """
    return {
        operand: frozenset(n.args[0] for n in topological([node]) if n.op == "input")
        | hypers_of([node])
        for operand, node in kernel.outputs.items()
    }
