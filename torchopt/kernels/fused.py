"""What is fused, and why the rest is not.

The longest run of parts for which a backend has kernels wins. Parameters that the kernels cannot
take are computed by the rules, one by one, and the reason is told to whoever asks.
"""

from __future__ import annotations

import contextlib
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

from torchopt.engine import Leaves, Plan, run_by_rules
from torchopt.kernels import backends
from torchopt.kernels.differentiable import Fused, Group
from torchopt.kernels.launch import slot_dtype
from torchopt.kernels.matching import Run, runs_from, unjoined
from torchopt.kernels.program import UPDATE, slot_stream
from torchopt.kernels.rules import Rules
from torchopt.module_state import FastWeight


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
    streams: list[str]
    identity: dict[str, str]


def assign(
    run: Run, leaves: Leaves, columns: dict[str, list[Any]], apply: bool
) -> tuple[list[Assignment], dict[int, str]]:
    """Sort parameters by the kernel that takes them; those none takes come with the reason."""
    mode = "apply" if apply else "update"
    slots = [columns[name] for name in run.slots]
    unfit: dict[int, str] = {}
    sorted_: dict[tuple[Any, ...], tuple[Any, list[int], dict[int, Any]]] = {}
    for key, positions in _classes(leaves, slots).items():
        row, t, present, has_params, dtype, device, reason = key[1], *key[2:]
        if not reason:
            rows = run.rows(leaves.hyper[positions[0]])
            variant = run.variant(rows, t, present, has_params)
            reason = variant.reason
            if variant.program is not None:
                reason = backends.missing(device, variant.program, mode)
            if apply and not has_params:
                reason = "there are no parameters to add to"
        if reason:
            unfit.update(dict.fromkeys(positions, reason))
            continue
        target = sorted_.setdefault((id(variant.program), dtype, device), (variant.program, [], {}))
        target[1].extend(positions)
        target[2].update(dict.fromkeys(positions, rows))
    return [
        _assignment(run, leaves, slots, mode, program, positions, rows)
        for program, positions, rows in sorted_.values()
    ], unfit


def _classes(leaves: Leaves, slots: list[list[Any]]) -> dict[tuple[Any, ...], list[int]]:
    """Sort parameters by everything that a kernel depends on.

    The keys are: a running number of the row of hyperparameters, the row, the step count, which
    slots are there, whether the parameter is, dtype, device, and why none of this matters.
    """
    classes: dict[tuple[Any, ...], list[int]] = {}
    whole = _uniform(leaves, slots)
    if whole is not None:
        return {whole: list(range(len(leaves.g)))}
    for k, (g, p, t, row) in enumerate(zip(leaves.g, leaves.p, leaves.t, leaves.hyper)):
        own = [column[k] for column in slots]
        present = tuple(x is not None for x in own)
        reason = _unfit(g, p, [x for x in own if x is not None])
        step = t if type(t) is int else None
        key = (id(row), None, step, present, p is not None, g.dtype, g.device, reason)
        classes.setdefault(key, []).append(k)
    return classes


def _uniform(leaves: Leaves, slots: list[list[Any]]) -> tuple[Any, ...] | None:
    """Return the one key that all parameters share, or ``None``: the usual case, checked fast."""
    g, p, t, row = leaves.g, leaves.p, leaves.t[0], leaves.hyper[0]
    if (
        type(t) is not int
        or any(x is not row for x in leaves.hyper)
        or any(x != t for x in leaves.t)
    ):
        return None
    has_params = p[0] is not None
    present = tuple(column[0] is not None for column in slots)
    kept = [column for column, there in zip(slots, present) if there]
    columns = [g, p, *kept] if has_params else [g, *kept]
    if not PLAIN.issuperset({type(x) for column in columns for x in column}):
        return None
    for column, there in zip(slots, present):
        if not there and any(x is not None for x in column):
            return None
    shapes = [x.shape for x in g]
    if any([x.shape for x in column] != shapes for column in columns[1:]):
        return None
    dtype, device = g[0].dtype, g[0].device
    of_parameters = columns[:2] if has_params else columns[:1]
    if dtype not in DTYPES or {x.dtype for column in of_parameters for x in column} != {dtype}:
        return None
    if kept and {x.dtype for column in kept for x in column} != {slot_dtype(dtype)}:
        return None
    if {x.layout for column in columns for x in column} != {torch.strided}:
        return None
    if not all(x.is_cpu for column in columns for x in column):
        if {x.device for column in columns for x in column} != {device}:
            return None
    return (0, None, t, present, has_params, dtype, device, "")


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


def _assignment(
    run: Run,
    leaves: Leaves,
    slots: list[list[Any]],
    mode: str,
    program: Any,
    positions: list[int],
    rows_of: dict[int, Any],
) -> Assignment:
    """Gather the numbers of one kernel call; parameters with one row of numbers share it."""
    rows = [rows_of[k] for k in positions]
    steps = [leaves.t[k] for k in positions]
    distinct: dict[tuple[int, int], int] = {}
    which = [distinct.setdefault((id(row), t), len(distinct)) for row, t in zip(rows, steps)]
    values = {key: run.values(rows[which.index(k)]) for key, k in distinct.items()}
    numbers = {
        name: [program.numbers[name](values[key], key[1]) for key in distinct]
        for name in (mode, f"backward_{mode}")
    }
    kernel = program.kernels[mode]
    present = tuple(column[positions[0]] is not None for column in slots)
    rules = Rules(
        run.parts, rows, steps, present, mode == "apply", kernel.inputs, kernel.output_streams
    )
    group = Group(
        program, mode, len(positions), which if len(distinct) > 1 else None, numbers, rules
    )
    return Assignment(positions, group, kernel.inputs, program.identity)


def _compute(
    run: Run,
    leaves: Leaves,
    columns: dict[str, list[Any]],
    assignments: list[Assignment],
    rest: list[int],
    apply: bool,
) -> list[Tensor]:
    """Run the kernels, and the rules for the parameters that no kernel takes."""
    results: list[Any] = [None] * len(leaves.g)
    new = {name: list(columns[name]) for name in run.slots}
    for positions, group, streams, _ in assignments:
        sources = {"g": leaves.g, "p": leaves.p}
        sources.update({slot_stream(k): columns[name] for k, name in enumerate(run.slots)})
        outputs = call(group, [sources[s][k] for s in streams for k in positions])
        for stream, column in group.columns(group.kernel.output_streams, outputs).items():
            target = results if stream == UPDATE else new[run.slots[int(stream[1:])]]
            for k, value in zip(positions, column):
                target[k] = value
    if rest:
        own = {name: [columns[name][k] for k in rest] for name in run.slots}
        by_rule = run_by_rules(run.plan, run.first, run.last, leaves.subset(rest), own)
        for position, k in enumerate(rest):
            u = by_rule[position]
            results[k] = leaves.p[k] + u.to(leaves.p[k].dtype) if apply else u
            for name in run.slots:
                new[name][k] = own[name][position]
    columns.update(new)
    return results


def call(group: Group, tensors: list[Tensor]) -> Sequence[Tensor]:
    """Run a group, and record it in the graph where one is being recorded."""
    if get_interpreter_stack():
        return Fused.apply(group, *tensors)
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        # past the argument binding of Function.apply, which is for functorch and costs time
        return super(torch.autograd.Function, Fused).apply(group, *tensors)
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
