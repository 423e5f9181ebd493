"""The fused update as one node of the graph, and its backward pass as another.

The forward and the first backward pass are kernels. The backward pass is itself a node, whose own
derivative is taken by differentiating the rules, so every higher order is that of the rules.
Nothing is saved but the inputs: gradients, parameters and slots exist anyway.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import (  # pyright: ignore[reportMissingImports]
    is_legacy_batchedtensor,
    peek_interpreter_stack,
)

from torchopt.kernels import levels
from torchopt.kernels.graph import Kernel, topological
from torchopt.kernels.launch import Column, launch
from torchopt.kernels.program import Program
from torchopt.kernels.rules import Rules
from torchopt.packed import Packed, Packing


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Parameters that one kernel updates.

    Tensors are flat lists, stream by stream: all gradients, then all parameters, and so on, for
    ``inputs``; the updates, then each new slot, for ``outputs``. A packed stream is one tensor.

    Attributes:
        program: The kernels, of one parameter.
        mode: ``"update"`` or ``"apply"``: whether what comes out is added to the parameters.
        count: How many parameters.
        indices: Which row of numbers each parameter has; ``None`` if there is one only.
        values: Rows of hyperparameters and the step count, from which the numbers are computed.
        rule: The same computation by the rules: the inputs to the outputs.
    """

    program: Program
    mode: str
    count: int
    indices: list[int] | None
    values: list[tuple[Sequence[float], int]]
    rule: Rules

    @property
    def kernel(self) -> Kernel:
        """The forward kernel."""
        return self.program.kernels[self.mode]

    @property
    def backward_kernel(self) -> Kernel:
        """The backward kernel."""
        return self.program.kernels[f"backward_{self.mode}"]

    def numbers(self, name: str) -> list[tuple[float, ...]]:
        """Return the rows of a kernel's numbers."""
        function = self.program.numbers[name]
        return [function(values, step) for values, step in self.values]

    def columns(
        self, streams: Sequence[str], items: Sequence[Any], packed: frozenset[str] = frozenset()
    ) -> dict[str, Sequence[Any]]:
        """Return flat items by stream; packed streams have one."""
        if not packed:
            n = self.count
            return {s: items[k * n : (k + 1) * n] for k, s in enumerate(streams)}
        columns, begin = {}, 0
        for stream in streams:
            end = begin + (1 if stream in packed else self.count)
            columns[stream] = items[begin:end]
            begin = end
        return columns

    def launch_columns(
        self, streams: Sequence[str], items: Sequence[Any], packed: frozenset[str]
    ) -> dict[str, Column]:
        """Return flat tensors by stream as :func:`launch` takes them."""
        columns: dict[str, Column] = {}
        for stream, column in self.columns(streams, items, packed).items():
            if stream not in packed:
                columns[stream] = list(column)
            elif column[0] is None:
                columns[stream] = [None] * self.count
            else:
                assert self.rule.packing is not None
                columns[stream] = Packed(column[0], self.rule.packing)
        return columns

    def run(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run the forward kernel on real tensors."""
        kernel, rule = self.kernel, self.rule
        inputs = self.launch_columns(kernel.inputs, tensors, rule.packed_in)
        wanted: dict[str, Any] = {
            s: rule.packing if s in rule.packed_out else None for s in kernel.output_streams
        }
        like = inputs["p"] if "p" in inputs else inputs["g"]
        outputs = launch(kernel, inputs, like, wanted, self.numbers(self.mode), self.indices)  # pyright: ignore[reportArgumentType]
        return tuple(_flat(outputs))


def _flat(outputs: dict[str, Column]) -> Iterator[Any]:
    for column in outputs.values():
        if isinstance(column, Packed):
            yield column.flat
        else:
            yield from column


@dataclasses.dataclass(frozen=True, eq=False)
class BackwardCall:
    """Which derivatives come in and which are wanted.

    Attributes:
        group: The forward call.
        given: For each output of the forward pass, whether its derivative is there.
        wanted: Input stream -> for each of its tensors, whether the derivative by it is wanted.
    """

    group: Group
    given: list[bool]
    wanted: dict[str, Sequence[bool]]

    def split(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor | None], list[Tensor]]:
        """Return the incoming derivatives, ``None`` where there is none, and the inputs."""
        rest = iter(tensors)
        bars = [next(rest) if given else None for given in self.given]
        return bars, list(rest)

    def run(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run the backward kernel on real tensors; return what is wanted."""
        group, kernel, rule = self.group, self.group.backward_kernel, self.group.rule
        bars, saved = self.split(tensors)
        forward = group.kernel
        inputs = group.launch_columns(forward.inputs, saved, rule.packed_in)
        like = inputs["p"] if "p" in inputs else inputs["g"]
        streams = [f"bar_{s}" for s in forward.output_streams]
        packed = frozenset(f"bar_{s}" for s in rule.packed_out)
        columns = inputs | group.launch_columns(streams, bars, packed)
        wanted: dict[str, Any] = {}
        for stream in kernel.output_streams:
            wanted[stream] = self.wanted[stream]
            if stream in rule.packed_in:
                needed = self.wanted[stream][0]
                wanted[stream] = rule.packing if needed else [False] * group.count
        outputs = launch(
            kernel,
            {s: columns[s] for s in kernel.inputs},
            like,  # pyright: ignore[reportArgumentType]
            wanted,
            group.numbers(f"backward_{group.mode}"),
            group.indices,
        )
        return tuple(x for x in _flat(outputs) if x is not None)

    def rule(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Compute the same by differentiating the rules."""
        group = self.group
        bars, saved = self.split(tensors)
        outputs, vjp = torch.func.vjp(group.rule, *saved)  # pyright: ignore[reportAssignmentType]
        full = tuple(torch.zeros_like(o) if b is None else b for o, b in zip(outputs, bars))
        return self._wanted(vjp(full))

    def rule_by_autograd(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Compute the same for ``torch.autograd.grad(is_grads_batched=True)``.

        The batches that it makes are of an older kind, which torch.func does not know.
        """
        bars, saved = self.split(tensors)
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in saved]
            outputs = self.group.rule(*inputs)
        pairs = [(o, b) for o, b in zip(outputs, bars) if b is not None]
        grads = torch.autograd.grad(
            [o for o, _ in pairs], inputs, [b for _, b in pairs], allow_unused=True
        )
        return self._wanted(
            [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads)]
        )

    def _wanted(self, by_input: Sequence[Tensor]) -> tuple[Tensor, ...]:
        packed = self.group.rule.packed_in
        columns = self.group.columns(self.group.kernel.inputs, by_input, packed)
        return tuple(
            x
            for stream in self.group.backward_kernel.outputs
            for x, wanted in zip(columns[stream], self.wanted[stream])
            if wanted
        )


@functools.lru_cache(maxsize=256)
def sources(kernel: Kernel) -> dict[str, frozenset[str]]:
    """Return, for each output stream of a kernel, the input streams that it is computed from."""
    return {
        stream: frozenset(n.args[0] for n in topological([node]) if n.op == "input")
        for stream, node in kernel.outputs.items()
    }


class Fused(torch.autograd.Function):
    """The update of a group: ``apply(group, *inputs) -> outputs``."""

    @staticmethod
    def forward(group: Group, *tensors: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return group.run(tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        group: Group = inputs[0]
        ctx.group = group
        ctx.set_materialize_grads(False)
        if not all(ctx.needs_input_grad[1:]):
            rule = group.rule
            needs = group.columns(rule.inputs, ctx.needs_input_grad[1:], rule.packed_in)
            needed = {stream for stream, mask in needs.items() if any(mask)}
            outputs = group.columns(rule.outputs, output, rule.packed_out)
            # as by the rules: what comes from constants is constant (slots in first-order mode)
            constant = [s for s in outputs if needed.isdisjoint(sources(group.kernel)[s])]
            ctx.mark_non_differentiable(*(x for stream in constant for x in outputs[stream]))
            if needed.issubset(group.program.passes[f"backward_{group.mode}"]):
                return  # the derivatives are those that come in; nothing needs to be kept
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *bars: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        group: Group = ctx.group
        rule, kernel = group.rule, group.backward_kernel
        needs = group.columns(rule.inputs, ctx.needs_input_grad[1:], rule.packed_in)
        wanted = {s: needs[s] for s in kernel.output_streams}
        derivatives: dict[str, Sequence[Any]] = {}
        given = [bar for bar in bars if bar is not None]
        if given and any(map(any, wanted.values())):
            call = BackwardCall(group, [bar is not None for bar in bars], wanted)
            found = iter(_backward(call, [*given, *ctx.saved_tensors]))
            for stream, mask in wanted.items():
                derivatives[stream] = [next(found) if needed else None for needed in mask]
        streams = [f"bar_{s}" for s in rule.outputs]
        incoming = group.columns(streams, bars, frozenset(f"bar_{s}" for s in rule.packed_out))
        for stream, bar in group.program.passes[f"backward_{group.mode}"].items():
            derivatives[stream] = _passed(incoming[bar], needs[stream], rule.packing)
        result: list[Any] = [None]
        for stream, mask in needs.items():
            result += derivatives.get(stream, [None] * len(mask))
        return tuple(result)


class FusedBackward(torch.autograd.Function):
    """The backward pass of a group: ``apply(call, *derivatives, *inputs)``."""

    @staticmethod
    def forward(call: BackwardCall, *tensors: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return call.run(tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.call = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *bars: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        _, vjp = torch.func.vjp(ctx.call.rule, *ctx.saved_tensors)  # pyright: ignore[reportAssignmentType]
        return (None, *vjp(bars))


def _passed(
    bars: Sequence[Tensor | None], needs: Sequence[bool], packing: Packing | None
) -> list[Tensor | None]:
    """Return incoming derivatives as those by an input whose derivative is 1."""
    if len(bars) < len(needs):  # one packed output, many inputs
        assert packing is not None
        bars = [None] * len(needs) if bars[0] is None else packing.unpack(bars[0])
    elif len(bars) > len(needs):
        assert packing is not None
        there = [
            torch.zeros(shape, **_like(bars)) if bar is None else bar
            for bar, shape in zip(bars, packing.shapes)
        ]
        bars = [packing.pack(there)] if any(bar is not None for bar in bars) else [None]
    return [bar if needed else None for bar, needed in zip(bars, needs)]


def _like(bars: Sequence[Tensor | None]) -> dict[str, Any]:
    bar = next((bar for bar in bars if bar is not None), None)
    return {} if bar is None else {"dtype": bar.dtype, "device": bar.device}


def _backward(call: BackwardCall, tensors: list[Tensor]) -> Sequence[Tensor]:
    if torch.autograd.forward_ad._current_level >= 0:
        return call.rule(*tensors)
    if any(map(is_legacy_batchedtensor, tensors)):
        return call.rule_by_autograd(*tensors)
    if call.group.rule.packing is not None and peek_interpreter_stack() is not None:
        return call.rule(*tensors)  # a batch of flat tensors has another layout
    return levels.apply(FusedBackward, call, tensors)
