"""What is fused, and why the rest is not.

The longest run of parts for which a backend has kernels wins. Parameters that the kernels cannot
take are computed by the rules, one by one, and the reason is told to whoever asks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import (  # pyright: ignore[reportMissingImports]
    TransformType,
    get_interpreter_stack,
)
from torch.autograd import forward_ad

from torchopt.engine import Common, Leaves, Plan, run_by_rules
from torchopt.kernels import backends
from torchopt.kernels.differentiable import Fused, Group
from torchopt.kernels.graph import Kernel
from torchopt.kernels.launch import slot_dtype
from torchopt.kernels.matching import Run, runs_from, unjoined
from torchopt.kernels.program import UPDATE, slot_stream
from torchopt.kernels.rules import Rules
from torchopt.module_state import FastWeight
from torchopt.packed import Packed, Packing


#: Tensors that are what they seem. Others (DTensor, FakeTensor, a user's subclass) may have no
#: address, and are computed by the rules.
PLAIN = {Tensor, torch.nn.Parameter, FastWeight, torch.nn.Buffer}
DTYPES = {torch.float64, torch.float32, torch.bfloat16, torch.float16}


class Result(NamedTuple):
    """What became of one run.

    Attributes:
        last: The position after its last part.
        g: The updates, or the new parameters if ``applied``.
        applied: Whether the updates have been added to the parameters.
    """

    last: int
    g: list[Tensor]
    applied: bool


def take_run(
    plan: Plan,
    first: int,
    leaves: Leaves,
    columns: dict[str, list[Any]],
    apply: bool,
) -> Result | None:
    """Compute the longest run of parts from ``first`` that has kernels; ``None`` if none has.

    Args:
        plan: The transformation.
        first: The position of a part.
        leaves: Gradients, parameters, ... as the part sees them.
        columns: The slots by public name; receives the new ones.
        apply: Whether to add the updates to the parameters, if the run is the last one.
    """
    runs = runs_from(plan, first)
    if not runs:
        _tell(
            leaves,
            [
                (Run(plan, first, first + 1), k, unjoined(plan.parts[first]))
                for k in range(len(leaves.g))
            ],
        )
        return None
    noted: list[Failure] = []
    hindrance = hindered()
    for run in runs:
        if hindrance:
            noted += [(run, k, hindrance) for k in range(len(leaves.g))]
            break
        applies = apply and run.last == len(plan.parts)
        groups, unfit = assign(run, leaves, columns, applies)
        noted += [(run, k, why) for k, why in unfit.items()]
        if groups:
            noted = [(run, k, why) for k, why in unfit.items()]
            _refuse_if_required(run, leaves, noted)
            _tell(leaves, noted)
            g = _compute(run, leaves, columns, groups, list(unfit), applies)
            return Result(run.last, g, applies)
    # the rules compute the first part, and the next is asked for anew
    shortest = runs[-1]
    noted = [(shortest, k, reason) for run, k, reason in noted if run is runs[-1] or hindrance]
    _refuse_if_required(shortest, leaves, noted)
    _tell(leaves, noted)
    return None


def take_whole(
    plan: Plan, leaves: Leaves, columns: dict[str, list[Any]], apply: bool
) -> list[Tensor] | None:
    """Compute a plan that is one run, if kernels take every parameter as it is; else ``None``."""
    runs = runs_from(plan, 0) if plan.parts else []
    if not runs or runs[0].last != len(plan.parts) or hindered():
        return None
    groups, unfit = assign(runs[0], leaves, columns, apply)
    if unfit:
        return None
    return _compute(runs[0], leaves, columns, groups, [], apply)


def covers(plan: Plan) -> bool:
    """Whether one run of kernels can stand for a whole plan, as far as that is known beforehand."""
    runs = runs_from(plan, 0) if plan.parts else []
    return bool(runs) and runs[0].last == len(plan.parts) and not hindered()


def hindered() -> str:
    """Return why nothing can be fused here and now; the empty string if nothing is in the way."""
    if torch.compiler.is_compiling():
        return "torch.compile fuses the rules itself"
    if torch._C._len_torch_dispatch_stack() > 0:
        return "a dispatch mode is watching (FakeTensor, make_fx, ...)"
    if forward_ad._current_level >= 0:
        return "forward-mode derivatives go through the rules"
    if torch._C._get_tracing_state() is not None:  # pyright: ignore[reportAttributeAccessIssue]
        return "torch.jit.trace is recording"
    for interpreter in get_interpreter_stack() or ():
        if interpreter.key() not in (TransformType.Grad, TransformType.Vmap):
            return "forward-mode derivatives and functionalization go through the rules"
    return ""


#: A run, the position of a parameter, and why no kernel computes the one for the other.
Failure = tuple[Run, int, str]


class Assignment(NamedTuple):
    """Parameters that one kernel can take, by position, and all it needs to know."""

    positions: list[int]
    group: Group


def assign(
    run: Run, leaves: Leaves, columns: dict[str, list[Any]], apply: bool
) -> tuple[list[Assignment], dict[int, str]]:
    """Sort parameters by the kernel that takes them; those none takes come with the reason."""
    mode = "apply" if apply else "update"
    slots = [columns[name] for name in run.slots]
    unfit: dict[int, str] = {}
    takers: dict[tuple[Any, ...], _Taker] = {}
    for key, positions in _classes(leaves, slots).items():
        _, t, present, has_params, dtype, device, reason = key
        row = leaves.hyper[positions[0]]
        read, program = run.read(row), None
        if not reason:
            variant = run.variant(row, read, t, present, has_params)
            program, reason = variant.program, variant.reason
            if program is not None:
                reason = backends.missing(device, program, mode)
            if apply and not has_params:
                reason = "there are no parameters to add to"
        if reason or read is None:
            unfit.update(dict.fromkeys(positions, reason))
            continue
        key = (id(program), dtype, device)
        taker = takers.setdefault(key, _Taker(program, present, has_params))
        taker.indices += [len(taker.values)] * len(positions)
        taker.values.append((read[0], t))
        taker.positions += positions
    return [_assignment(run, leaves, slots, mode, taker) for taker in takers.values()], unfit


@dataclasses.dataclass
class _Taker:
    """A program and the parameters that it takes, in classes with the same numbers."""

    program: Any
    present: tuple[bool, ...]
    has_params: bool
    positions: list[int] = dataclasses.field(default_factory=list)
    indices: list[int] = dataclasses.field(default_factory=list)
    values: list[tuple[Sequence[float], int]] = dataclasses.field(default_factory=list)


def _classes(leaves: Leaves, slots: list[Any]) -> dict[tuple[Any, ...], list[int]]:
    """Sort parameters by everything that a kernel depends on.

    The keys are: which row of hyperparameters, the step count, which slots are there, whether the
    parameter is, dtype, device, and why none of this matters.
    """
    classes: dict[tuple[Any, ...], list[int]] = {}
    whole = _common_class(leaves, slots)
    if whole is not None:
        return {whole: list(range(len(leaves.g)))}
    for k, (g, p, t, row) in enumerate(zip(leaves.g, leaves.p, leaves.t, leaves.hyper)):
        own = [column[k] for column in slots]
        present = tuple(x is not None for x in own)
        reason = _unfit(g, p, [x for x in own if x is not None])
        step = t if type(t) is int else None
        key = (id(row), step, present, p is not None, g.dtype, g.device, reason)
        classes.setdefault(key, []).append(k)
    return classes


def _common_class(leaves: Leaves, slots: list[Any]) -> tuple[Any, ...] | None:
    """Return the one key that all parameters share, or ``None``: the usual case, checked fast."""
    t, row, common = leaves.t[0], leaves.hyper[0], leaves.common
    if common is None or not common.types <= PLAIN or common.dtype not in DTYPES:
        return None
    if type(t) is not int or any(x is not row for x in leaves.hyper) or set(leaves.t) != {t}:
        return None
    present = tuple(_is_there(column, 0) for column in slots)
    for column, there in zip(slots, present):
        if there and not _slots_fit(column, common):
            return None
        if not there and any(x is not None for x in column):
            return None
    has_params = leaves.p[0] is not None
    return (0, t, present, has_params, common.dtype, common.device, "")


def _slots_fit(column: Any, common: Common) -> bool:
    """Whether the slots of all parameters are plain tensors that fit the parameters."""
    dtype, device = slot_dtype(common.dtype), common.device
    if isinstance(column, Packed):
        flat = column.flat
        fits = flat.dtype == dtype and flat.device == device
        return fits and column.packing.shapes == common.shapes
    return (
        PLAIN.issuperset(map(type, column))
        and [x.shape for x in column] == common.shapes
        and {x.dtype for x in column} == {dtype}
        and {x.layout for x in column} == {torch.strided}
        and {x.device for x in column} == {device}
    )


def _unfit(g: Tensor, p: Tensor | None, slots: list[Tensor]) -> str:
    """Return why a kernel cannot take one parameter."""
    tensors = [g, *slots] if p is None else [g, p, *slots]
    for x in tensors:
        if type(x) not in PLAIN:
            return f"{type(x).__name__} is no plain tensor"
        if x.layout != torch.strided:
            return f"the layout is {x.layout}"
        if x.shape != g.shape:
            return f"shapes differ: {tuple(g.shape)} and {tuple(x.shape)}"
        if x.device != g.device:
            return f"devices differ: {g.device} and {x.device}"
    if g.dtype not in DTYPES:
        return f"the dtype is {g.dtype}"
    if p is not None and p.dtype != g.dtype:
        return f"dtypes differ: {g.dtype} and {p.dtype}"
    for x in slots:
        if x.dtype != slot_dtype(g.dtype):
            return f"a slot is {x.dtype}"
    return ""


def _assignment(run: Run, leaves: Leaves, slots: list[Any], mode: str, taker: _Taker) -> Assignment:
    """Gather all that one kernel call needs."""
    program, positions = taker.program, taker.positions
    kernel = program.kernels[mode]
    rules = Rules(
        run,
        [leaves.hyper[k] for k in positions],
        [int(leaves.t[k]) for k in positions],
        taker.present,
        taker.has_params,
        mode == "apply",
        kernel.inputs,
        kernel.output_streams,
        *_packing(leaves, slots, kernel, positions),
    )
    indices = taker.indices if len(taker.values) > 1 else None
    return Assignment(positions, Group(program, mode, len(positions), indices, taker.values, rules))


def _is_there(column: Any, position: int) -> bool:
    return isinstance(column, Packed) or column[position] is not None


def _packing(
    leaves: Leaves, slots: list[Any], kernel: Kernel, positions: list[int]
) -> tuple[frozenset[str], frozenset[str], Packing | None]:
    """Return which streams are packed, and how."""
    if get_interpreter_stack() or positions != list(range(len(leaves.g))):
        return frozenset(), frozenset(), None
    packed = {slot_stream(k): c for k, c in enumerate(slots) if isinstance(c, Packed)}
    packed_in = frozenset(s for s in kernel.inputs if s in packed)
    packed_out: frozenset[str] = frozenset()
    if leaves.call.pack_slots and len(positions) == len(leaves.call.g):
        packed_out = frozenset(s for s in kernel.output_streams if s != UPDATE)
    if not packed_in and not packed_out:
        return packed_in, packed_out, None
    known = next(iter(packed.values()), None)
    return packed_in, packed_out, known.packing if known else Packing([g.shape for g in leaves.g])


def _compute(
    run: Run,
    leaves: Leaves,
    columns: dict[str, Any],
    assignments: list[Assignment],
    rest: list[int],
    apply: bool,
) -> list[Tensor]:
    """Run the kernels, and the rules for the parameters that no kernel takes."""
    results: list[Any] = [None] * len(leaves.g)
    new: dict[str, Any] = {}
    for positions, group in assignments:
        outputs = call(group, _inputs(run, leaves, columns, positions, group))
        rule = group.rule
        for stream, column in group.columns(rule.outputs, outputs, rule.packed_out).items():
            if stream in rule.packed_out:
                assert rule.packing is not None
                new[run.slots[int(stream[1:])]] = Packed(column[0], rule.packing)
                continue
            target = results
            if stream != UPDATE:
                name = run.slots[int(stream[1:])]
                target = new.setdefault(name, None) or list(columns[name])
                new[name] = target
            for k, value in zip(positions, column):
                target[k] = value
    if rest:
        own = {name: [columns[name][k] for k in rest] for name in run.slots}
        by_rule = run_by_rules(run.plan, run.first, run.last, leaves.subset(rest), own)
        for position, k in enumerate(rest):
            u = by_rule[position]
            results[k] = leaves.p[k] + u.to(leaves.p[k].dtype) if apply else u
            for name in run.slots:
                new.setdefault(name, list(columns[name]))[k] = own[name][position]
    columns.update(new)
    return results


def _inputs(
    run: Run, leaves: Leaves, columns: dict[str, Any], positions: list[int], group: Group
) -> list[Tensor]:
    """Return the tensors of a group, stream by stream."""
    sources = {"g": leaves.g, "p": leaves.p}
    sources.update({slot_stream(k): columns[name] for k, name in enumerate(run.slots)})
    tensors: list[Tensor] = []
    whole = positions == list(range(len(leaves.g)))
    for stream in group.rule.inputs:
        source = sources[stream]
        if stream in group.rule.packed_in:
            tensors.append(source.flat)
        else:
            tensors += source if whole else [source[k] for k in positions]
    return tensors


def call(group: Group, tensors: list[Tensor]) -> Sequence[Tensor]:
    """Run a group, and record it in the graph where one is being recorded."""
    if get_interpreter_stack():
        return Fused.apply(group, *tensors)
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        # past the argument binding of Function.apply, which is for functorch and costs time
        return super(torch.autograd.Function, Fused).apply(group, *tensors)  # pyright: ignore[reportAttributeAccessIssue]
    return group.run(tensors)


def _refuse_if_required(run: Run, leaves: Leaves, noted: list[Failure]) -> None:
    """Raise if a part that requires kernels does not get them."""
    if _asked.get() is not None:
        return
    for _, k, reason in noted:
        for part in run.parts:
            if part.use_accelerated_op:
                raise RuntimeError(
                    f"use_accelerated_op=True requires a fused kernel, but {leaves.name(k)} cannot "
                    f"have one for {type(part).__name__}: {reason}. Pass None to use kernels "
                    "where they are available."
                )


_asked: ContextVar[list[str] | None] = ContextVar("asked", default=None)


@contextlib.contextmanager
def asking(lines: list[str]) -> Iterator[None]:
    """Collect, inside a ``with`` block, why updates are not fused; nothing is refused there."""
    token = _asked.set(lines)
    try:
        yield
    finally:
        _asked.reset(token)


def _tell(leaves: Leaves, noted: list[Failure]) -> None:
    lines = _asked.get()
    if lines is not None:
        for run, k, reason in noted:
            names = ", ".join(type(part).__name__ for part in run.parts)
            lines.append(f"{names} of {leaves.name(k)}: {reason}")
    elif noted:
        for reason in {reason for _, _, reason in noted}:
            if reason.startswith(backends.NOT_LOADED):
                _warn_once(reason)


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"Optimizers run unfused, and slower: {reason}. Pass use_accelerated_op=False to silence "
        "this.",
        stacklevel=2,
    )
