"""Nodes of the graph under ``torch.func``: its levels one after the other, over lists of tensors.

``torch.autograd.Function.apply`` does the same for any tree of arguments, and takes it apart and
puts it together again several times on each level, which took 5 to 8 % of a meta-step of 32 tasks
under ``vmap``. What a level does to a tensor is torch's own; only the way there is shorter. Only
``grad`` and ``vmap`` come here; the others go through the rules (``unsupported_reason``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchopt.base.torch_internals import (
    SingleLevelFunction,
    TransformType,
    add_batch_dim,
    current_interpreter,
    enable_single_level_autograd_function,
    lift_of,
    peek_interpreter_stack,
    set_forward_grad_enabled,
    unwrap_batched,
    unwrap_for_grad,
    unwrap_if_dead,
    wrap_for_grad,
)
from torchopt.kernels.differentiable import BackwardCall, Group


def apply(function: Any, call: Group | BackwardCall, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Compute ``call.run(tensors)`` and record it wherever a graph is recorded.

    Args:
        function: The ``torch.autograd.Function`` that does so, with ``setup_context``. Its outputs,
            all of them new tensors, have one batch dimension more, at the front, if all inputs
            have.
        call: What it does, its first argument; ``call.divided(tensors)`` says of which parameters
            each node may be, ``call.places_in`` and ``call.places_out`` where their tensors stand.
        tensors: The others.
    """
    # what a level saved that has ended since is still wrapped by it, and may be of another one
    tensors = list(map(unwrap_if_dead, tensors))
    if peek_interpreter_stack() is not None:
        return _at_level(function, call, tensors)
    if not torch.is_grad_enabled() or not any(x.requires_grad for x in tensors):
        return call.run(tensors)
    # past the argument binding of Function.apply, which is for torch.func and costs time
    record: Any = super(torch.autograd.Function, function).apply  # pyright: ignore[reportAttributeAccessIssue]
    parts = call.divided(tensors)
    if len(parts) == 1:
        return record(parts[0][1], *tensors)
    return _recorded_apart(record, call, parts, tensors)


def _at_level(
    function: Any, call: Group | BackwardCall, tensors: Sequence[Tensor]
) -> Sequence[Tensor]:
    """Do what the innermost level of torch.func does."""
    interpreter: Any = current_interpreter()
    if interpreter.key() == TransformType.Vmap:
        return _batched(function, interpreter, call, tensors)
    lifted = map(lift_of(interpreter), tensors)
    with enable_single_level_autograd_function():
        return _FusedAtLevel.apply(_Level(function, interpreter, call), *lifted)  # pyright: ignore[reportAttributeAccessIssue]


def _recorded_apart(
    record: Any, call: Group | BackwardCall, parts: Sequence[Any], tensors: Sequence[Tensor]
) -> list[Tensor]:
    """Record parameters that do not depend on each other in nodes of their own."""
    places_in, places_out = call.places_in, call.places_out
    outputs: dict[Any, Tensor] = {}
    for rows, part in parts:
        own = [x for (_, row), x in zip(places_in, tensors) if row in rows]
        recorded = any(x.requires_grad for x in own)
        results = record(part, *own) if recorded else part.run(own)
        outputs.update(zip([place for place in places_out if place[1] in rows], results))
    return [outputs[place] for place in places_out]


def _batched(
    function: Any, interpreter: Any, call: Group | BackwardCall, tensors: Sequence[Tensor]
) -> Sequence[Tensor]:
    level, size = interpreter.level(), interpreter.batch_size()
    pairs = [unwrap_batched(x, level) for x in tensors]
    if all(dim is None for _, dim in pairs):
        with interpreter.lower():
            return apply(function, call, tensors)
    with interpreter.lower():
        whole = [
            x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0) if dim else x
            for x, dim in pairs
        ]
        outputs = apply(function, call, whole)
    return [add_batch_dim(x, 0, level) for x in outputs]


class _Level(NamedTuple):
    """A call as the graph of one level of ``grad`` records it."""

    function: Any
    interpreter: Any
    call: Any


class _FusedAtLevel(SingleLevelFunction):
    """The node of one level; below it are the other levels, and at last the function itself."""

    @staticmethod
    def forward(level: _Level, *tensors: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        number = level.interpreter.level()
        below = [unwrap_for_grad(x, number) for x in tensors]
        # a node computes without grad mode, but the levels below record graphs of their own
        with torch.enable_grad(), set_forward_grad_enabled(True), level.interpreter.lower():
            outputs = apply(level.function, level.call, below)
        return tuple([wrap_for_grad(x, number) for x in outputs])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        level: _Level = inputs[0]
        ctx.function = level.function
        level.function.setup_context(ctx, (level.call, *inputs[1:]), output)

    @staticmethod
    def backward(ctx: Any, *bars: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.function.backward(ctx, *bars)
