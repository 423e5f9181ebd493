"""The fused update as one node of the graph, and its backward pass as another.

The forward and the first backward pass are kernels. The backward pass is itself a node, whose own
derivative is taken by differentiating the rules, so every higher order is that of the rules.
Nothing is saved but the inputs: gradients, parameters and slots exist anyway.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import (  # pyright: ignore[reportMissingImports]
    is_legacy_batchedtensor,
    peek_interpreter_stack,
)

from torchopt.kernels.graph import Kernel
from torchopt.kernels.launch import launch
from torchopt.kernels.program import UPDATE, Program


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Parameters that one kernel updates.

    Tensors are flat lists, stream by stream: all gradients, then all parameters, and so on, for
    ``inputs``; the updates, then each new slot, for ``outputs``.

    Attributes:
        mode: ``"update"`` or ``"apply"``: whether what comes out is added to the parameters.
        count: How many parameters.
        rows: Which row of numbers each parameter has; ``None`` if there is one only.
        numbers: Kernel -> rows of its numbers.
        rule: The same computation by the rules: the inputs to the outputs.
        program: The kernels, of one parameter.
    """

    program: Program
    mode: str
    count: int
    rows: list[int] | None
    numbers: dict[str, list[tuple[float, ...]]]
    rule: Callable[..., tuple[Tensor, ...]]

    @property
    def kernel(self) -> Kernel:
        """The forward kernel."""
        return self.program.kernels[self.mode]

    @property
    def backward_kernel(self) -> Kernel:
        """The backward kernel."""
        return self.program.kernels[f"backward_{self.mode}"]

    def columns(self, streams: Sequence[str], tensors: Sequence[Any]) -> dict[str, list[Any]]:
        """Return flat tensors by stream."""
        n = self.count
        return {s: list(tensors[k * n : (k + 1) * n]) for k, s in enumerate(streams)}

    def run(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run the forward kernel on real tensors."""
        kernel = self.kernel
        inputs = self.columns(kernel.inputs, tensors)
        wanted: dict[str, Any] = dict.fromkeys(kernel.outputs)
        like = inputs["p"] if "p" in inputs else inputs["g"]
        outputs = launch(kernel, inputs, like, wanted, self.numbers[self.mode], self.rows)
        return tuple(x for column in outputs.values() for x in column)  # pyright: ignore[reportReturnType]


@dataclasses.dataclass(frozen=True, eq=False)
class BackwardCall:
    """Which derivatives come in and which are wanted.

    Attributes:
        group: The forward call.
        given: For each output of the forward pass, whether its derivative is there.
        wanted: Input stream -> for each parameter, whether the derivative by it is wanted.
    """

    group: Group
    given: list[bool]
    wanted: dict[str, list[bool]]

    def split(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor | None], list[Tensor]]:
        """Return the incoming derivatives, ``None`` where there is none, and the inputs."""
        rest = iter(tensors)
        bars = [next(rest) if given else None for given in self.given]
        return bars, list(rest)

    def run(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run the backward kernel on real tensors; return what is wanted."""
        group, kernel = self.group, self.group.backward_kernel
        bars, saved = self.split(tensors)
        forward = group.kernel
        inputs = group.columns(forward.inputs, saved)
        like = inputs["p"] if "p" in inputs else inputs["g"]
        columns = {
            **inputs,
            **group.columns([f"bar_{s}" for s in forward.outputs], bars),
        }
        outputs = launch(
            kernel,
            {s: columns[s] for s in kernel.inputs},
            like,
            {s: self.wanted[s] for s in kernel.outputs},
            group.numbers[f"backward_{group.mode}"],
            group.rows,
        )
        return tuple(x for column in outputs.values() for x in column if x is not None)

    def rule(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Compute the same by differentiating the rules."""
        group = self.group
        bars, saved = self.split(tensors)
        outputs, vjp = torch.func.vjp(group.rule, *saved)
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
        columns = self.group.columns(self.group.kernel.inputs, by_input)
        return tuple(
            x
            for stream in self.group.backward_kernel.outputs
            for x, wanted in zip(columns[stream], self.wanted[stream])
            if wanted
        )


class Fused(torch.autograd.Function):
    """The update of a group: ``apply(group, *inputs) -> outputs``."""

    @staticmethod
    def forward(group: Group, *tensors: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return group.run(tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.group = inputs[0]
        ctx.save_for_backward(*inputs[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *bars: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        group: Group = ctx.group
        saved, n = ctx.saved_tensors, group.count
        streams, kernel = group.kernel.inputs, group.backward_kernel
        program = group.program
        passes = program.passes[f"backward_{group.mode}"]
        needs = group.columns(streams, ctx.needs_input_grad[1:])
        wanted = {s: needs[s] for s in kernel.outputs}
        derivatives: dict[str, list[Any]] = {}
        if any(bar is not None for bar in bars) and any(any(w) for w in wanted.values()):
            call = BackwardCall(group, [bar is not None for bar in bars], wanted)
            given = [bar for bar in bars if bar is not None]
            found = iter(_backward(call, [*given, *saved]))
            for stream in kernel.outputs:
                derivatives[stream] = [next(found) if w else None for w in wanted[stream]]
        incoming = group.columns([f"bar_{s}" for s in group.kernel.outputs], bars)
        for stream, bar in passes.items():
            derivatives[stream] = [b if w else None for b, w in zip(incoming[bar], needs[stream])]
        return (None, *(x for s in streams for x in derivatives.get(s, [None] * n)))

    @staticmethod
    def vmap(info: Any, in_dims: Any, group: Group, *tensors: Tensor) -> Any:
        batched = _batched(info.batch_size, in_dims[1:], tensors, group.count)
        outputs = Fused.apply(group, *batched)
        return outputs, (0,) * len(outputs)


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
        _, vjp = torch.func.vjp(ctx.call.rule, *ctx.saved_tensors)
        return (None, *vjp(bars))

    @staticmethod
    def vmap(info: Any, in_dims: Any, call: BackwardCall, *tensors: Tensor) -> Any:
        bars, _ = call.split(tensors)
        batched = _batched(info.batch_size, in_dims[1:], tensors, 0)
        outputs = FusedBackward.apply(call, *batched)
        return outputs, (0,) * len(outputs)


def _backward(call: BackwardCall, tensors: list[Tensor]) -> Sequence[Tensor]:
    if torch.autograd.forward_ad._current_level >= 0:
        return call.rule(*tensors)
    if any(map(is_legacy_batchedtensor, tensors)):
        return call.rule_by_autograd(*tensors)
    if torch.is_grad_enabled() or peek_interpreter_stack() is not None:
        return FusedBackward.apply(call, *tensors)
    return call.run(tensors)


def _batched(
    size: int, dims: Sequence[int | None], tensors: Sequence[Tensor], count: int
) -> list[Tensor]:
    """Move batch dimensions to the front, and give one to tensors that have none."""
    return [
        x.movedim(dim, 0) if dim is not None else x.expand(size, *x.shape)
        for x, dim in zip(tensors, dims)
    ]


__all__ = ["UPDATE", "BackwardCall", "Fused", "FusedBackward", "Group"]
