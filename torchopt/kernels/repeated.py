"""An update of packed slots like the one before: what that one found out need only be compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchopt.base.alike import Alike
from torchopt.core.engine import Call
from torchopt.core.packed import Packed, Packing
from torchopt.core.plan import Plan
from torchopt.kernels.assignment import inputs_of
from torchopt.kernels.backends.memory import slot_dtype
from torchopt.kernels.differentiable import Group
from torchopt.kernels.generate.program import UPDATE, Program
from torchopt.kernels.matching import Run
from torchopt.kernels.reading import PLAIN
from torchopt.kernels.rows import Rows, read_rows, unfit_hypers
from torchopt.kernels.rules import Rules


#: How many programs a memo tells about: those of a first step, of later ones, of other numbers.
PROGRAMS = 16


@dataclasses.dataclass
class Memo:
    """What an update found out.

    Attributes:
        run: All parts of the plan.
        rows: The hyperparameters of all parameters.
        dtype: Of gradients and parameters.
        device: Of everything.
        present: For each slot, whether it is a tensor.
        apply: Whether the updates were added to the parameters.
        streams: For each program that ran, its inputs and outputs that are packed.
        known: Gradients and parameters that fitted.
    """

    run: Run
    rows: Rows
    dtype: torch.dtype
    device: torch.device
    present: tuple[bool, ...]
    apply: bool
    streams: dict[Program, tuple[frozenset[str], frozenset[str]]]
    known: Alike

    def is_like(self, other: Memo | None) -> bool:
        """Whether another memo tells of the same updates: other programs may have run."""
        return (
            other is not None
            and self.run is other.run
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


def remember(run: Run, call: Call, group: Group, apply: bool) -> None:
    """Keep what an update of all parameters at once found out with the packing of its slots."""
    rule = group.rule
    packing = rule.packing or call.packing
    if packing is None or group.count != len(call.g):
        return
    packed_out = frozenset(s for s in group.kernel.output_streams if s != UPDATE)
    rows = None if rule.packed_out != packed_out else read_rows(run, call.hyper)
    if rows is None:
        return
    memo = Memo(run, rows, call.g[0].dtype, call.g[0].device, rule.present, apply, {}, Alike())
    if memo.is_like(packing.memo):
        memo.streams, memo.known = packing.memo.streams, packing.memo.known
        if len(memo.streams) >= PROGRAMS:
            memo.streams = {}
    memo.streams[group.program] = rule.packed_in, packed_out
    packing.memo = memo


def group_again(plan: Plan, call: Call, apply: bool) -> tuple[Run, Group] | None:
    """Return what one kernel call needs if everything is as the last update had it, else ``None``.

    Only the gradients, the parameters, the slots and the step count are other ones.
    """
    packing = call.packing or _packing_of(call)
    memo: Memo | None = None if packing is None else packing.memo
    if packing is None or memo is None or memo.run.plan is not plan or memo.apply != apply:
        return None
    t = call.t[0]
    if not memo.rows.stand_for(call.hyper):
        return None
    if type(t) is not int or call.t.count(t) != len(call.t):
        return None
    dtype = slot_dtype(memo.dtype)
    for name, there in zip(memo.run.slots, memo.present):
        column: Any = call.slots[name]
        if not there:
            if any(value is not None for value in column):
                return None
            continue
        if type(column) is not Packed or column.packing is not packing:
            return None
        if column.flat.dtype != dtype or column.flat.device != memo.device:
            return None
    if not memo.fits(call.g, packing.shapes) or not memo.fits(call.p, packing.shapes):
        return None
    return _grouped(memo, packing, call, t)


def _grouped(memo: Memo, packing: Packing, call: Call, t: int) -> tuple[Run, Group] | None:
    run, mode = memo.run, "apply" if memo.apply else "update"
    values = memo.rows.values()
    program = memo.rows.program(run, values, t, memo.present, True)
    streams = None if program is None else memo.streams.get(program)
    if program is None or streams is None:
        return None
    tensors: dict[str, list[Tensor]] = {}
    if program.kinds:
        tensors = {stream: memo.rows.of_each(stream) for stream in program.hypers(mode)}
        if unfit_hypers(program, mode, tensors, call.g):
            return None
    kernel = program.kernels[mode]
    rules = Rules(
        run,
        call.hyper,
        [t] * len(call.t),
        memo.present,
        True,
        memo.apply,
        inputs_of(program, mode),
        kernel.output_streams,
        {stream: [x.dim() for x in column] for stream, column in tensors.items()},
        *streams,
        packing if any(streams) else None,
    )
    steps = [(row, t) for row in values]
    return run, Group(program, mode, len(call.g), memo.rows.indices, steps, rules)


def _packing_of(call: Call) -> Packing | None:
    for column in call.slots.values():
        if type(column) is Packed:
            return column.packing
    return None
