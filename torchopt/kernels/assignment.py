"""Which parameters one kernel call takes, and why no kernel takes the others."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence, Set
from math import isnan
from typing import Any

import torch
from torch import Tensor

from torchopt.base.torch_internals import get_interpreter_stack
from torchopt.core.engine import Common, Leaves
from torchopt.core.packed import Packed, Packing
from torchopt.kernels.backends import availability as backends
from torchopt.kernels.backends import cpu as native
from torchopt.kernels.backends.memory import slot_dtype
from torchopt.kernels.differentiable import Group
from torchopt.kernels.generate.graph import Kernel
from torchopt.kernels.generate.program import UPDATE, slot_operand
from torchopt.kernels.matching import Segment
from torchopt.kernels.reading import PLAIN
from torchopt.kernels.rows import read_rows, unfit_hypers
from torchopt.kernels.rules import Rules


def assign(
    segment: Segment,
    leaves: Leaves,
    columns: dict[str, list[Any]],
    apply: bool,
    types: Set[type] = PLAIN,
) -> tuple[list[tuple[list[int], Group]], dict[int, str]]:
    """Sort parameters by the kernel that takes them, if their tensors are of the given types.

    Returns:
        Positions and what one kernel call needs, for each kernel; and for each position that none
        takes, the reason.
    """
    mode = "apply" if apply else "update"
    slots = [columns[name] for name in segment.slots]
    common = _common_class(leaves, slots)
    if common is not None:
        group = _assign_all(segment, leaves, slots, common, mode)
        if group is not None:
            return [(list(range(len(leaves.g))), group)], {}
    unfit: dict[int, str] = {}
    takers: dict[tuple[Any, ...], _Taker] = {}
    for key, positions in _classes(leaves, slots, types, common).items():
        _, t, present, has_params, dtype, device, reason = key
        row = leaves.hyper[positions[0]]
        read, program = segment.read(row), None
        if not reason:
            variant = segment.variant(row, read, t, present, has_params)
            program, reason = variant.program, variant.reason
            if program is not None:
                reason = backends.missing(device, program, mode)
                if program.kinds and not reason:
                    tensors = {s: [segment.hyper(row, s)] for s in program.hypers(mode)}
                    reason = unfit_hypers(program, mode, tensors, [leaves.g[positions[0]]])
                    if any(isnan(read.values[int(s[1:])]) for s in program.guarded):
                        reason = "it compares a hyperparameter with more than one entry, or nan"
            if apply and not has_params:
                reason = "there are no parameters to add to"
        if reason:
            unfit.update(dict.fromkeys(positions, reason))
            continue
        key = (id(program), dtype, device)
        taker = takers.setdefault(key, _Taker(program, present, has_params))
        taker.indices += [len(taker.values)] * len(positions)
        taker.values.append((read.values, t))
        taker.positions += positions
    groups = [(t.positions, _group(segment, leaves, slots, mode, t)) for t in takers.values()]
    return groups, unfit


@dataclasses.dataclass
class _Taker:
    """A program and the parameters that it takes, in classes with the same numbers."""

    program: Any
    present: tuple[bool, ...]
    has_params: bool
    positions: list[int] = dataclasses.field(default_factory=list)
    indices: list[int] = dataclasses.field(default_factory=list)
    values: list[tuple[Sequence[float], int]] = dataclasses.field(default_factory=list)


def _assign_all(
    segment: Segment, leaves: Leaves, slots: list[Any], common: tuple[Any, ...], mode: str
) -> Group | None:
    """Return what one kernel call needs for all parameters, if it takes them."""
    _, t, present, has_params, _, device, _ = common
    rows = read_rows(segment, leaves.hyper)
    if rows is None or (mode == "apply" and not has_params):
        return None
    program, values = rows.program(segment, t, present, has_params)
    if program is None or backends.missing(device, program, mode):
        return None
    if program.kinds:
        tensors = {operand: rows.of_each(operand) for operand in program.hypers(mode)}
        if unfit_hypers(program, mode, tensors, leaves.g):
            return None
    taker = _Taker(program, present, has_params, list(range(len(leaves.g))))
    taker.indices = rows.indices or []
    taker.values = [(row, t) for row in values]
    return _group(segment, leaves, slots, mode, taker)


def _classes(
    leaves: Leaves, slots: list[Any], types: Set[type], common: tuple[Any, ...] | None
) -> dict[tuple[Any, ...], list[int]]:
    """Sort parameters by everything that a kernel depends on.

    The keys are: which row of hyperparameters, the step count, which slots are there, whether the
    parameter is, dtype, device, and why none of this matters.
    """
    classes: dict[tuple[Any, ...], list[int]] = {}
    if common is not None and all(row is leaves.hyper[0] for row in leaves.hyper):
        return {common: list(range(len(leaves.g)))}
    for k, (g, p, t, row) in enumerate(zip(leaves.g, leaves.p, leaves.t, leaves.hyper)):
        own = [column[k] for column in slots]
        present = tuple(x is not None for x in own)
        reason = _unfit(g, p, [x for x in own if x is not None], types)
        step = t if type(t) is int else None
        key = (id(row), step, present, p is not None, g.dtype, g.device, reason)
        classes.setdefault(key, []).append(k)
    return classes


def _common_class(leaves: Leaves, slots: list[Any]) -> tuple[Any, ...] | None:
    """Return the key that all parameters share but for their rows, or ``None``: the usual case."""
    t, common = leaves.t[0], leaves.common
    if common is None or not common.types <= PLAIN or common.dtype not in native.DTYPES:
        return None
    if type(t) is not int or set(leaves.t) != {t}:
        return None
    present = tuple(isinstance(c, Packed) or c[0] is not None for c in slots)
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


def _unfit(g: Tensor, p: Tensor | None, slots: list[Tensor], types: Set[type]) -> str:
    """Return why a kernel cannot take one parameter."""
    tensors = [g, *slots] if p is None else [g, p, *slots]
    for x in tensors:
        if type(x) not in types:
            return f"{type(x).__name__} is no plain tensor"
        if x.layout != torch.strided:
            return f"the layout is {x.layout}"
        if x.shape != g.shape:
            return f"shapes differ: {tuple(g.shape)} and {tuple(x.shape)}"
        if x.device != g.device:
            return f"devices differ: {g.device} and {x.device}"
    if g.dtype not in native.DTYPES:
        return f"the dtype is {g.dtype}"
    if p is not None and p.dtype != g.dtype:
        return f"dtypes differ: {g.dtype} and {p.dtype}"
    for x in slots:
        if x.dtype != slot_dtype(g.dtype):
            return f"a slot is {x.dtype}"
    return ""


def _group(segment: Segment, leaves: Leaves, slots: list[Any], mode: str, taker: _Taker) -> Group:
    """Gather all that one kernel call needs."""
    program, positions = taker.program, taker.positions
    kernel, hypers = program.kernels[mode], program.hypers(mode)
    inputs = [s for s in kernel.inputs if s not in hypers]  # hyperparameters come last
    rows = [leaves.hyper[k] for k in positions]
    rules = Rules(
        segment,
        rows,
        [int(leaves.t[k]) for k in positions],
        taker.present,
        taker.has_params,
        mode == "apply",
        [*inputs, *hypers],
        kernel.output_operands,
        {},
        *_packing(leaves, slots, kernel, positions),
    )
    for operand in hypers:
        rules.hyper_dims[operand] = list(map(Tensor.dim, rules.hypers(operand)))
    indices = taker.indices if len(taker.values) > 1 else None
    return Group(program, mode, len(positions), indices, taker.values, rules)


def _packing(
    leaves: Leaves, slots: list[Any], kernel: Kernel, positions: list[int]
) -> tuple[frozenset[str], frozenset[str], Packing | None]:
    """Return which operands are packed, and how."""
    if get_interpreter_stack() or positions != list(range(len(leaves.g))):
        return frozenset(), frozenset(), None
    packed = {slot_operand(k): c for k, c in enumerate(slots) if isinstance(c, Packed)}
    packed_in = frozenset(s for s in kernel.inputs if s in packed)
    packed_out: frozenset[str] = frozenset()
    if leaves.call.pack_slots and len(positions) == len(leaves.call.g):
        packed_out = frozenset(s for s in kernel.output_operands if s != UPDATE)
    if not packed_in and not packed_out:
        return packed_in, packed_out, None
    known = next(iter(packed.values()), None)
    return packed_in, packed_out, known.packing if known else Packing([g.shape for g in leaves.g])
