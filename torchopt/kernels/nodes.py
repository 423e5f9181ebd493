"""The fused update as a node of the graph, and its backward pass as another.

The backward pass is itself a node, so that it can be differentiated. Nothing is saved but the
inputs: gradients, parameters and slots exist anyway. Parameters that share a node are told apart in
the backward pass: for those of which no derivative comes in nothing is computed, and ``None`` goes
out, as by the rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchopt.base.batched_grads import has_batches, over_batches
from torchopt.base.torch_internals import (
    SingleLevelFunction,
    TransformType,
    add_batch_dim,
    current_interpreter,
    enable_single_level_autograd_function,
    in_forward_mode,
    lift_of,
    peek_interpreter_stack,
    set_forward_grad_enabled,
    unwrap_batched,
    unwrap_for_grad,
    unwrap_if_dead,
    wrap_for_grad,
)
from torchopt.core.packed import Packing
from torchopt.kernels.differentiable import BackwardCall, Group, sources
from torchopt.kernels.generate.learned import is_hyper
from torchopt.kernels.kept import NOTHING, Kept
from torchopt.kernels.places import ALL, collected, rows_given, spread


class Fused(torch.autograd.Function):
    """The update of a group: ``apply(group, *inputs) -> outputs``."""

    @staticmethod
    def forward(group: Group, *tensors: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return group.run(tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        group: Group = inputs[0]
        ctx.group, ctx.bare = group, group.bare
        ctx.set_materialize_grads(False)
        if not all(ctx.needs_input_grad[1:]):
            rule = group.rule
            needs = group.columns(rule.inputs, ctx.needs_input_grad[1:], rule.packed_in)
            needed = {operand for operand, mask in needs.items() if any(mask)}
            outputs = group.columns(rule.outputs, output, rule.packed_out)
            # as by the rules: what comes from constants is constant (slots in first-order mode)
            constant = [s for s in outputs if needed.isdisjoint(sources(group.kernel)[s])]
            ctx.mark_non_differentiable(*(x for operand in constant for x in outputs[operand]))
            if needed.issubset(group.program.passes[f"backward_{group.mode}"]):
                ctx.kept = NOTHING
                return  # the derivatives are those that come in; nothing needs to be kept
        if group.bare and group.count > 1:
            ctx.kept = Kept(inputs[1:], group)
        else:
            ctx.kept = None
            ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *bars: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        group: Group = ctx.group
        needs = ctx.needs_input_grad[1:]
        if type(None) not in map(type, bars[: group.count]):  # all updates, which come first
            rows = range(group.count)
        else:
            rows = rows_given(group.places_out, bars, group.count)
        if not rows:
            return (None,) * (1 + len(needs))
        saved = ctx.saved_tensors if ctx.kept is None else ctx.kept.take(rows)
        if len(rows) == group.count:
            return (None, *_derivatives(group, needs, bars, saved))
        packing = group.rule.packing
        places_in, places_out = group.places_in, group.places_out
        part = group.subset(rows)
        own_bars = spread(places_out, bars, packing)
        own_saved = spread(places_in, saved, packing) if saved else {}
        wanted = dict(zip(places_in, needs))
        own = [(operand, rows[k]) for operand, k in part.places_in]
        found = _derivatives(
            part,
            [wanted.get(place, wanted.get((place[0], ALL), False)) for place in own],
            [own_bars.get((operand, rows[k])) for operand, k in part.places_out],
            [own_saved[place] for place in own] if saved else (),
        )
        return (None, *collected(places_in, dict(zip(own, found)), packing))


def _derivatives(
    group: Group, needs: Sequence[bool], bars: Sequence[Tensor | None], saved: Sequence[Tensor]
) -> list[Tensor | None]:
    """Return the derivative by each input of a group, ``None`` where it is not needed."""
    rule = group.rule
    needed = group.columns(rule.inputs, needs, rule.packed_in)
    hypers = frozenset(s for s, mask in needed.items() if is_hyper(s) and any(mask))
    wanted = {s: needed[s] for s in group.backward_kernel(hypers).output_operands}
    derivatives: dict[str, Sequence[Any]] = {}
    given = [bar for bar in bars if bar is not None]
    if given and any(map(any, wanted.values())):
        call = BackwardCall(group, [bar is not None for bar in bars], wanted)
        found = iter(_backward(call, given, saved))
        for operand, mask in wanted.items():
            derivatives[operand] = [next(found) if need else None for need in mask]
    operands = [f"bar_{s}" for s in rule.outputs]
    incoming = group.columns(operands, bars, frozenset(f"bar_{s}" for s in rule.packed_out))
    for operand, bar in group.program.passes[f"backward_{group.mode}"].items():
        derivatives[operand] = _passed(incoming[bar], needed[operand], rule.packing)
    for operand, mask in needed.items():
        if any(mask) and operand not in derivatives and _reaches(group, operand, incoming):
            columns = group.columns(rule.inputs, saved, rule.packed_in)
            zeros = map(_zero, columns[operand])
            derivatives[operand] = [z if need else None for z, need in zip(zeros, mask)]
    result: list[Any] = []
    for operand, mask in needed.items():
        result += derivatives.get(operand, [None] * len(mask))
    return result


def _zero(x: Tensor) -> Tensor:
    """Return zeros that are no constants, so that they can be differentiated further."""
    return x.masked_fill(torch.ones_like(x, dtype=torch.bool), 0.0)


def _reaches(group: Group, operand: str, bars: dict[str, Sequence[Tensor | None]]) -> bool:
    """Whether an output whose derivative comes in is computed from an input.

    If no derivative by the input is computed, it acts by its sign or in a comparison. Then the
    derivative is zero, as in torch, and not absent: ``autograd.grad`` would refuse.
    """
    return any(
        operand in read and any(bar is not None for bar in bars[f"bar_{output}"])
        for output, read in sources(group.kernel).items()
    )


class FusedBackward(torch.autograd.Function):
    """The backward pass of a group: ``apply(call, *derivatives, *inputs)``."""

    @staticmethod
    def forward(call: BackwardCall, *tensors: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return call.run(tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.call, ctx.bare = inputs[0], False
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *bars: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        call: BackwardCall = ctx.call
        places_in, places_out = call.places_in, call.places_out
        rows = rows_given(places_out, bars, call.group.count)
        if not rows:
            return (None,) * (1 + len(places_in))
        saved = ctx.saved_tensors
        if len(rows) == call.group.count:
            return (None, *_second_derivatives(call, saved, bars))
        packing = call.group.rule.packing
        own_bars, own_saved = (
            spread(at, tensors, packing) for at, tensors in ((places_out, bars), (places_in, saved))
        )
        part = call.subset(rows, own_saved)
        own = [(operand, rows[k]) for operand, k in part.places_in]
        found = _second_derivatives(
            part,
            [own_saved[place] for place in own],
            [own_bars.get((operand, rows[k])) for operand, k in part.places_out],
        )
        return (None, *collected(places_in, dict(zip(own, found)), packing))


def _second_derivatives(
    call: BackwardCall, saved: Sequence[Tensor], bars: Sequence[Tensor | None]
) -> Sequence[Tensor]:
    outputs, vjp = torch.func.vjp(call.rule, *saved)  # pyright: ignore[reportAssignmentType]
    return vjp(tuple(torch.zeros_like(o) if b is None else b for o, b in zip(outputs, bars)))


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


def _backward(
    call: BackwardCall, bars: Sequence[Tensor], saved: Sequence[Tensor]
) -> Sequence[Tensor]:
    tensors = [*bars, *saved]
    if in_forward_mode():
        return call.rule(*tensors)
    if has_batches(bars):
        n = len(bars)
        return over_batches(lambda *given: _backward(call, given[:n], given[n:]), tensors)
    if call.group.rule.packing is not None and peek_interpreter_stack() is not None:
        return call.rule(*tensors)  # a batch of flat tensors has another layout
    return record(FusedBackward, call, tensors)


# Levels of torch.func ----------------------------------------------------------------------------
#
# ``torch.autograd.Function.apply`` does the same for any tree of arguments, and takes it apart and
# puts it together again several times on each level, which took 5 to 8 % of a meta-step of 32 tasks
# under ``vmap``. What a level does to a tensor is torch's own; only the way there is shorter. Only
# ``grad`` and ``vmap`` come here; the others go through the rules (``unsupported_reason``).


def record(
    function: Any, call: Group | BackwardCall, tensors: Sequence[Tensor]
) -> Sequence[Tensor]:
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
    node: Any = super(torch.autograd.Function, function).apply  # pyright: ignore[reportAttributeAccessIssue]
    parts = call.divided(tensors)
    if len(parts) == 1:
        return node(parts[0][1], *tensors)
    return _recorded_apart(node, call, parts, tensors)


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
    node: Any, call: Group | BackwardCall, parts: Sequence[Any], tensors: Sequence[Tensor]
) -> list[Tensor]:
    """Record parameters that do not depend on each other in nodes of their own."""
    places_in, places_out = call.places_in, call.places_out
    outputs: dict[Any, Tensor] = {}
    for rows, part in parts:
        own = [x for (_, row), x in zip(places_in, tensors) if row in rows]
        recorded = any(x.requires_grad for x in own)
        results = node(part, *own) if recorded else part.run(own)
        outputs.update(zip([place for place in places_out if place[1] in rows], results))
    return [outputs[place] for place in places_out]


def _batched(
    function: Any, interpreter: Any, call: Group | BackwardCall, tensors: Sequence[Tensor]
) -> Sequence[Tensor]:
    level, size = interpreter.level(), interpreter.batch_size()
    pairs = [unwrap_batched(x, level) for x in tensors]
    if all(dim is None for _, dim in pairs):
        with interpreter.lower():
            return record(function, call, tensors)
    with interpreter.lower():
        whole = [
            x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0) if dim else x
            for x, dim in pairs
        ]
        outputs = record(function, call, whole)
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
            outputs = record(level.function, level.call, below)
        return tuple([wrap_for_grad(x, number) for x in outputs])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        level: _Level = inputs[0]
        ctx.function = level.function
        level.function.setup_context(ctx, (level.call, *inputs[1:]), output)

    @staticmethod
    def backward(ctx: Any, *bars: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.function.backward(ctx, *bars)
