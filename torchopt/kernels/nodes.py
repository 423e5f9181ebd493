"""The fused update as a node of the graph, and its backward pass as another.

The backward pass is itself a node, so that it can be differentiated. Nothing is saved but the
inputs: gradients, parameters and slots exist anyway. Parameters that share a node are told apart in
the backward pass: for those of which no derivative comes in nothing is computed, and ``None`` goes
out, as by the rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchopt.base.torch_internals import (
    graph_task_keeps_graph,
    in_forward_mode,
    is_legacy_batchedtensor,
    peek_interpreter_stack,
)
from torchopt.core.packed import Packing
from torchopt.kernels import levels
from torchopt.kernels.differentiable import BackwardCall, Group, sources
from torchopt.kernels.generate.learned import is_hyper
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
                ctx.kept = _NOTHING_KEPT
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


class Kept:
    """The inputs of a node, given up parameter by parameter.

    What ``save_for_backward`` keeps is freed at once. Where parameters that do not depend on each
    other share a node, a backward pass through one of them must leave those of the others.
    """

    def __init__(self, tensors: Sequence[Tensor], group: Group) -> None:
        self._tensors: list[Any] = list(tensors)
        self._versions = [x._version for x in tensors]
        self._group = group
        self._gone: set[int] = set()

    def take(self, rows: Sequence[int]) -> list[Tensor | None]:
        """Return the inputs of some parameters, for good unless the graph is retained.

        Raises:
            RuntimeError: If they are gone, or one of them has been changed in place.
        """
        if not self._gone.isdisjoint(rows):
            raise RuntimeError(
                "Trying to backward through the graph a second time: what a step of an optimizer "
                "had saved was freed by the first .backward() or autograd.grad(). Specify "
                "retain_graph=True there."
            )
        taken, for_good = self._tensors, not graph_task_keeps_graph()
        everyone = len(rows) == self._group.count
        if not everyone:
            wanted = {ALL, *rows}
            at = self._group.places_in
            taken = [x if row in wanted else None for (_, row), x in zip(at, taken)]
        for x, version in zip(taken, self._versions):
            if x is not None and x._version != version:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an "
                    f"inplace operation: an input of a step of an optimizer, {tuple(x.shape)}, is "
                    f"at version {x._version}; expected version {version} instead."
                )
        if for_good:
            self._gone.update(rows)
            if len(self._gone) == self._group.count:
                self._tensors = []
            else:
                at = self._group.places_in
                kept = [None if row in self._gone else x for (_, row), x in zip(at, self._tensors)]
                self._tensors = kept
        return taken


class _NothingKept:
    """That of a node which needs none of its inputs."""

    def take(self, rows: Sequence[int]) -> tuple[Tensor, ...]:
        return ()


_NOTHING_KEPT = _NothingKept()


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
    if any(map(is_legacy_batchedtensor, bars)):
        return call.rule_by_autograd(*tensors)
    if call.group.rule.packing is not None and peek_interpreter_stack() is not None:
        return call.rule(*tensors)  # a batch of flat tensors has another layout
    return levels.apply(FusedBackward, call, tensors)
