"""What is fused, and why the rest is not.

The longest segment of parts for which a backend has kernels wins. Parameters that the kernels
cannot take are computed by the rules, one by one, and the reason is told to whoever asks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchopt.base import misuse
from torchopt.base.calling import level_of_user
from torchopt.base.torch_internals import (
    TransformType,
    get_interpreter_stack,
    get_tracing_state,
    in_forward_mode,
    len_torch_dispatch_stack,
    peek_interpreter_stack,
    register_constant,
)
from torchopt.core.engine import Call, Leaves, asked, run_by_rules
from torchopt.core.packed import Packed
from torchopt.core.plan import Plan
from torchopt.core.transform import GradientTransformation
from torchopt.kernels.assignment import assign
from torchopt.kernels.backends import availability as backends
from torchopt.kernels.cached_call import cached_group, remember
from torchopt.kernels.differentiable import Group
from torchopt.kernels.generate.program import GRADIENT, PARAMETER, UPDATE
from torchopt.kernels.independent import divide, named
from torchopt.kernels.matching import Segment, segments_from, unjoined, whole_segment
from torchopt.kernels.nodes import Fused, record
from torchopt.kernels.places import spread


if register_constant is not None:
    # before a compiler sees the first plan; compiled.py hands it plans
    register_constant(Plan)


#: Returns the module that computes where a tracer is at work. It is built on this one and brings
#: the compiler along, which is large: so it is set from outside and loaded when it is needed.
for_tracers: Any = None


class Result(NamedTuple):
    """What became of one segment.

    Attributes:
        last: The position after its last part.
        g: The updates, or the new parameters if ``applied``.
        applied: Whether the updates have been added to the parameters.
    """

    last: int
    g: list[Tensor]
    applied: bool


def take_segment(
    plan: Plan,
    first: int,
    leaves: Leaves,
    columns: dict[str, list[Any]],
    apply: bool,
) -> Result | None:
    """Compute the longest segment of parts from ``first`` that has kernels; ``None`` if none has.

    Args:
        plan: The transformation.
        first: The position of a part.
        leaves: Gradients, parameters, ... as the part sees them.
        columns: The slots by public name; receives the new ones.
        apply: Whether to add the updates to the parameters, if the segment is the last one.
    """
    reason = unsupported_reason()
    if reason and _traced(plan.parts[first]):
        return for_tracers().take_segment(plan, first, leaves, columns, apply)
    single = Segment(plan, first, first + 1)
    reason = reason or unjoined(plan.parts[first])
    unfit = dict.fromkeys(range(len(leaves.g)), reason)
    for segment in [] if reason else segments_from(plan, first):
        applies = apply and segment.last == len(plan.parts)
        groups, unfit = assign(segment, leaves, columns, applies)
        if groups:
            answer_for(segment, leaves, unfit)
            return Result(
                segment.last, compute(segment, leaves, columns, groups, unfit, applies), applies
            )
    # the rules compute the first part, and the next one is asked for again
    answer_for(single, leaves, unfit)
    return None


def take_whole(
    plan: Plan, leaves: Leaves, columns: dict[str, list[Any]], apply: bool
) -> list[Tensor] | None:
    """Compute a plan that is one segment, if kernels take every parameter; else ``None``."""
    if unsupported_reason():
        if not plan.parts or not _traced(plan.parts[0]):
            return None
        return for_tracers().take_whole(plan, leaves, columns, apply)
    segment = whole_segment(plan)
    if segment is None:
        return None
    groups, unfit = assign(segment, leaves, columns, apply)
    if unfit:
        return None
    if len(groups) == 1 and groups[0][0] == list(range(len(leaves.call.g))):
        remember(segment, leaves.call, groups[0][1], apply)
    return compute(segment, leaves, columns, groups, {}, apply)


def take_cached(
    plan: Plan, call: Call, apply: bool
) -> tuple[list[Tensor], dict[str, list[Any]]] | None:
    """Compute a call that differs from the one before in its tensors only; ``None`` if it does not.

    Returns:
        The updates, or the new parameters with ``apply``, and the new slots.
    """
    if unsupported_reason():
        return None
    cached = cached_group(plan, call, apply)
    if cached is None:
        return None
    segment, group = cached
    columns: dict[str, Any] = dict(call.slots)
    return compute(segment, call, columns, [(range(len(call.g)), group)], {}, apply), columns


def covers(plan: Plan) -> bool:
    """Whether one segment can stand for a whole plan, as far as that is known beforehand."""
    return whole_segment(plan) is not None and not unsupported_reason()


def unsupported_reason(by_tracers: bool = True) -> str:
    """Return why nothing can be fused here and now; the empty string if nothing is in the way.

    ``by_tracers`` says whether tracers are in the way, or are shown kernels as operators.
    """
    if by_tracers and torch.compiler.is_compiling():
        return "torch.compile fuses the rules itself"
    if by_tracers and len_torch_dispatch_stack() > 0:
        return "a dispatch mode is watching (FakeTensor, make_fx, ...)"
    if in_forward_mode():
        return "forward-mode derivatives go through the rules"
    if get_tracing_state() is not None:
        return "torch.jit.trace is recording"
    for interpreter in get_interpreter_stack() or ():
        if interpreter.key() not in (TransformType.Grad, TransformType.Vmap):
            return "forward-mode derivatives and functionalization go through the rules"
    return ""


def _traced(part: GradientTransformation) -> bool:
    """Whether a tracer is at work, to which kernels are shown as operators where required."""
    if torch.compiler.is_compiling():
        return True
    return bool(part.use_accelerated_op) and len_torch_dispatch_stack() > 0


def compute(
    segment: Segment,
    leaves: Leaves | Call,
    columns: dict[str, Any],
    groups: Sequence[tuple[Sequence[int], Group]],
    unfit: dict[int, str],
    apply: bool,
    caller: Callable[[Group, list[Tensor]], Sequence[Tensor]] | None = None,
) -> list[Tensor]:
    """Run the kernels, and the rules for the parameters that no kernel takes."""
    run_group = caller or call
    results: list[Any] = [None] * len(leaves.g)
    new: dict[str, Any] = {}
    for positions, group in groups:
        tensors = _inputs(segment, leaves, columns, positions, group)
        if group.rule.packing is not None:
            group, tensors = _packed_if_one_node(group, tensors)
        outputs = run_group(group, tensors)
        rule = group.rule
        for operand, column in group.columns(rule.outputs, outputs, rule.packed_out).items():
            if operand in rule.packed_out:
                assert rule.packing is not None
                new[segment.slot_by_operand[operand]] = Packed(column[0], rule.packing)
                continue
            target = results
            if operand != UPDATE:
                name = segment.slot_by_operand[operand]
                if name not in new:
                    new[name] = list(columns[name])
                target = new[name]
            for k, value in zip(positions, column):
                target[k] = value
    if unfit:
        assert isinstance(leaves, Leaves), "a call that is repeated as it was fits"
        rest = list(unfit)
        own = {name: [columns[name][k] for k in rest] for name in segment.slots}
        by_rule = run_by_rules(segment.plan, segment.first, segment.last, leaves.subset(rest), own)
        for position, k in enumerate(rest):
            u = by_rule[position]
            results[k] = leaves.p[k] + u.to(leaves.p[k].dtype) if apply else u
            for name in segment.slots:
                new.setdefault(name, list(columns[name]))[k] = own[name][position]
    columns.update(new)
    return results


def _inputs(
    segment: Segment,
    leaves: Leaves | Call,
    columns: dict[str, Any],
    positions: Sequence[int],
    group: Group,
) -> list[Tensor]:
    """Return the tensors of a group, operand by operand."""
    sources = {GRADIENT: leaves.g, PARAMETER: leaves.p}
    sources.update({operand: columns[name] for operand, name in segment.slot_by_operand.items()})
    rule = group.rule
    tensors: list[Tensor] = []
    whole = list(positions) == list(range(len(leaves.g)))
    for operand in rule.inputs:
        if operand in rule.hyper_dims:
            tensors += rule.hypers(operand)
            continue
        source = sources[operand]
        if operand in rule.packed_in:
            tensors.append(source.flat)
        else:
            tensors += source if whole else [source[k] for k in positions]
    return tensors


def _packed_if_one_node(group: Group, tensors: list[Tensor]) -> tuple[Group, list[Tensor]]:
    """Return a group as it is if its parameters may share a node of the graph, else unpacked."""
    if not torch.is_grad_enabled() or not any(x.requires_grad for x in tensors):
        return group, tensors
    rule = group.rule
    columns = group.columns(rule.inputs, tensors, rule.packed_in)
    flat = [columns.pop(operand)[0] for operand in rule.packed_in]
    parts = divide(list(columns.values()), flat, group.count)
    if len(parts) == 1:
        bare = parts[0].bare
        return group if bare == group.bare else dataclasses.replace(group, bare=bare), tensors
    found = spread(group.places_in, tensors, group.rule.packing)
    group = group.subset(range(group.count))
    return group, [found[place] for place in group.places_in]


def call(group: Group, tensors: list[Tensor]) -> Sequence[Tensor]:
    """Run a group, and record it in the graph where one is being recorded.

    A new parameter gets a node of its own behind that of the step: a derivative by parameters of
    different steps, which autograd takes at their nodes, would else run through the later step.
    """
    outputs = record(Fused, group, tensors)
    if group.mode != "apply" or group.count == 1 or peek_interpreter_stack() is not None:
        return outputs
    n = group.count  # updates come first
    if not any(x.requires_grad for x in outputs[:n]):
        return outputs
    return [*named(outputs[:n]), *outputs[n:]]


def answer_for(segment: Segment, leaves: Leaves, unfit: dict[int, str]) -> None:
    """Tell why parameters are not fused, or refuse it if a part requires kernels."""
    lines = asked.get()
    for k, reason in unfit.items():
        if lines is not None:
            names = ", ".join(type(part).__name__ for part in segment.parts)
            lines.append(f"{names} of {leaves.name(k)}: {reason}")
            continue
        for part in segment.parts:
            if part.use_accelerated_op:
                raise RuntimeError(refusal(part, leaves.name(k), reason))
        if isinstance(reason, backends.NotLoaded):
            _warn_once(reason)


def refusal(
    part: GradientTransformation, name: str, reason: str, advice: str = misuse.WITHOUT_KERNEL
) -> str:
    """Return the message for a parameter that cannot have the kernel that a part requires."""
    return (
        f"use_accelerated_op=True requires a fused kernel, but {name} cannot have one for "
        f"{type(part).__name__}: {reason}. {advice}"
    )


def unavailable(device: str) -> str:
    """Return why there are no kernels for a type of device; the empty string if there are."""
    return backends.unavailable(device)


@contextlib.contextmanager
def asking(lines: list[str]) -> Iterator[None]:
    """Collect, inside a ``with`` block, why updates are not fused; nothing is refused there."""
    token = asked.set(lines)
    try:
        yield
    finally:
        asked.reset(token)


@functools.lru_cache(maxsize=64)
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"Optimizers run unfused, and slower: {reason}. Pass use_accelerated_op=False to silence "
        "this.",
        stacklevel=level_of_user(),
    )
