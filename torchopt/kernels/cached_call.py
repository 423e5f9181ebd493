"""An update of packed slots like the one before: what that one found out need only be compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchopt.base.signatures import KnownSignatures
from torchopt.core.engine import Call
from torchopt.core.packed import Packed, Packing
from torchopt.core.plan import Plan
from torchopt.kernels.assignment import inputs_of
from torchopt.kernels.backends.memory import slot_dtype
from torchopt.kernels.differentiable import Group
from torchopt.kernels.generate.program import UPDATE, Program
from torchopt.kernels.matching import Segment
from torchopt.kernels.reading import PLAIN
from torchopt.kernels.rows import Rows, read_rows, unfit_hypers
from torchopt.kernels.rules import Rules


#: How many programs a cached tells about: those of a first step, of later ones, of other numbers.
PROGRAMS = 16


@dataclasses.dataclass
class CachedCall:
    """What an update found out.

    Attributes:
        segment: All parts of the plan.
        rows: The hyperparameters of all parameters.
        dtype: Of gradients and parameters.
        device: Of everything.
        present: For each slot, whether it is a tensor.
        apply: Whether the updates were added to the parameters.
        operands: For each program that ran, its inputs and outputs that are packed.
        known: Gradients and parameters that fitted.
    """

    segment: Segment
    rows: Rows
    dtype: torch.dtype
    device: torch.device
    present: tuple[bool, ...]
    apply: bool
    operands: dict[Program, tuple[frozenset[str], frozenset[str]]]
    known: KnownSignatures

    def is_like(self, other: CachedCall | None) -> bool:
        """Whether another cached tells of the same updates: other programs may have run."""
        return (
            other is not None
            and self.segment is other.segment
            and self.rows.are(other.rows)
            and (self.dtype, self.device) == (other.dtype, other.device)
            and (self.present, self.apply) == (other.present, other.apply)
        )

    def fits(self, tensors: Sequence[Any], shapes: list[torch.Size]) -> bool:
        """Whether these are plain tensors of the same shapes, dtype and device as before."""
        if self.known.knows(tensors):
            return True
        fit = (
            PLAIN.issuperset(map(type, tensors))
            and [x.shape for x in tensors] == shapes
            and {x.dtype for x in tensors} == {self.dtype}
            and {x.layout for x in tensors} == {torch.strided}
            and {x.device for x in tensors} == {self.device}
        )
        if fit:
            self.known.add(tensors)
        return fit


def remember(segment: Segment, call: Call, group: Group, apply: bool) -> None:
    """Keep what an update of all parameters at once found out with the packing of its slots."""
    rule = group.rule
    packing = rule.packing or call.packing
    if packing is None or group.count != len(call.g):
        return
    packed_out = frozenset(s for s in group.kernel.output_operands if s != UPDATE)
    rows = None if rule.packed_out != packed_out else read_rows(segment, call.hyper)
    if rows is None:
        return
    cached = CachedCall(
        segment, rows, call.g[0].dtype, call.g[0].device, rule.present, apply, {}, KnownSignatures()
    )
    if cached.is_like(packing.cached):
        cached.operands, cached.known = packing.cached.operands, packing.cached.known
        if len(cached.operands) >= PROGRAMS:
            cached.operands = {}
    cached.operands[group.program] = rule.packed_in, packed_out
    packing.cached = cached


def cached_group(plan: Plan, call: Call, apply: bool) -> tuple[Segment, Group] | None:
    """Return what one kernel call needs if everything is as the last update had it, else ``None``.

    Only the gradients, the parameters, the slots and the step count are other ones.
    """
    packing = call.packing or _packing_of(call)
    cached: CachedCall | None = None if packing is None else packing.cached
    if (
        packing is None
        or cached is None
        or cached.segment.plan is not plan
        or cached.apply != apply
    ):
        return None
    t = call.t[0]
    if not cached.rows.stand_for(call.hyper):
        return None
    if type(t) is not int or call.t.count(t) != len(call.t):
        return None
    dtype = slot_dtype(cached.dtype)
    for name, there in zip(cached.segment.slots, cached.present):
        column: Any = call.slots[name]
        if not there:
            if any(value is not None for value in column):
                return None
            continue
        if type(column) is not Packed or column.packing is not packing:
            return None
        if column.flat.dtype != dtype or column.flat.device != cached.device:
            return None
    if not cached.fits(call.g, packing.shapes) or not cached.fits(call.p, packing.shapes):
        return None
    return _grouped(cached, packing, call, t)


def _grouped(
    cached: CachedCall, packing: Packing, call: Call, t: int
) -> tuple[Segment, Group] | None:
    segment, mode = cached.segment, "apply" if cached.apply else "update"
    values = cached.rows.values()
    program = cached.rows.program(segment, values, t, cached.present, True)
    operands = None if program is None else cached.operands.get(program)
    if program is None or operands is None:
        return None
    tensors: dict[str, list[Tensor]] = {}
    if program.kinds:
        tensors = {operand: cached.rows.of_each(operand) for operand in program.hypers(mode)}
        if unfit_hypers(program, mode, tensors, call.g):
            return None
    kernel = program.kernels[mode]
    rules = Rules(
        segment,
        call.hyper,
        [t] * len(call.t),
        cached.present,
        True,
        cached.apply,
        inputs_of(program, mode),
        kernel.output_operands,
        {operand: [x.dim() for x in column] for operand, column in tensors.items()},
        *operands,
        packing if any(operands) else None,
    )
    steps = [(row, t) for row in values]
    return segment, Group(program, mode, len(call.g), cached.rows.indices, steps, rules)


def _packing_of(call: Call) -> Packing | None:
    for column in call.slots.values():
        if type(column) is Packed:
            return column.packing
    return None
