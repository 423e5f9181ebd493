"""Updates like earlier ones: what those found out need only be compared.

What a kernel call depends on, but for its numbers and its tensors, is its signature. For each there
is one executable: which programs run, on which operands. Transformations of the same structure and
all three APIs ask for them in one bounded table; numbers are arguments and no part of a signature.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchopt.base.signatures import KnownSignatures
from torchopt.core.engine import Call
from torchopt.core.packed import Packed, Packing
from torchopt.core.plan import Plan
from torchopt.kernels.backends import availability as backends
from torchopt.kernels.backends.memory import slot_dtype
from torchopt.kernels.differentiable import Group
from torchopt.kernels.generate.program import UPDATE, Program
from torchopt.kernels.matching import Segment, whole_segment
from torchopt.kernels.reading import PLAIN
from torchopt.kernels.rows import Rows, read_rows, unfit_hypers
from torchopt.kernels.rules import Rules


#: How many programs are noted for one signature: those of a first step, of later ones, of other
#: numbers.
PROGRAMS = 16
#: How many kinds of lists of tensors are known for one, and how often one may be added.
KINDS, ADDED = 8, 64
#: How many calls of one transformation are kept, where no packing keeps them.
CALLS = 4


class Signature(NamedTuple):
    """What a kernel call for all parameters depends on, but for its numbers and its tensors.

    Attributes:
        parts: What tells apart transformations whose programs differ.
        shapes: Of the parameters.
        present: For each slot, whether it is a tensor.
        has_params: Whether there are parameters.
        packed: Whether slots are packed.
        apply: Whether the updates are added to the parameters.
        dtype: Of gradients and parameters.
        device: Of everything.
    """

    parts: Hashable
    shapes: tuple[torch.Size, ...]
    present: tuple[bool, ...]
    has_params: bool
    packed: bool
    apply: bool
    dtype: torch.dtype
    device: torch.device


class Operands(NamedTuple):
    """What goes into a program and comes out, in the order of its tensors, and what is packed."""

    inputs: list[str]
    outputs: list[str]
    packed_in: frozenset[str]
    packed_out: frozenset[str]


class Executable:
    """What the calls of one signature have found out.

    Attributes:
        operands: Those of each program that ran.
        known: Lists of tensors that fitted.
    """

    def __init__(self) -> None:
        self.operands: dict[Program, Operands] = {}
        self.known = KnownSignatures(KINDS)
        self._left = ADDED
        self._seen = False

    def add(self, tensors: Sequence[Any]) -> None:
        """Remember tensors that fit."""
        if self._left and not self.known.knows(tensors):
            self._left -= 1
            self.known.add(tensors)

    def add_columns(self, columns: Sequence[Sequence[Any]]) -> None:
        """Remember all tensors of a call, if it is not the only one of its kind."""
        for column in columns if self._seen else ():
            self.add(column)
        self._seen = True


@functools.lru_cache(maxsize=256)
def executable(signature: Signature) -> Executable:
    """Return the executable of a signature."""
    return Executable()


@dataclasses.dataclass
class CachedCall:
    """An executable and the transformation that asks for it.

    Attributes:
        segment: All parts of the transformation.
        rows: The hyperparameters of the last call; ``None`` if they may hold a graph alive.
        signature: That of the calls.
        executable: What is known of it.
    """

    segment: Segment
    rows: Rows | None
    signature: Signature
    executable: Executable

    def group(self, call: Call, packing: Packing | None) -> Group | None:
        """Return what the kernel call needs, or ``None`` if something differs."""
        own, known = self.signature, self.executable.known
        for name, there in zip(self.segment.slots, own.present):
            column: Any = call.slots[name]
            if not there:
                if any(value is not None for value in column):
                    return None
            elif packing is None:
                if type(column) is not list or not known.knows(column):
                    return None
            elif (
                type(column) is not Packed
                or column.packing is not packing
                or column.flat.dtype != slot_dtype(own.dtype)
                or column.flat.device != own.device
            ):
                return None
        if not own.has_params and {*map(type, call.p)} != {type(None)}:
            return None
        for tensors in (call.g, call.p) if own.has_params else (call.g,):
            if not known.knows(tensors) and not self._become_known(tensors, packing):
                return None
        rows = self.rows
        if rows is None or not rows.stand_for(call.hyper):
            rows = read_rows(self.segment, call.hyper)
            if rows is None:
                return None
            # for the next call; this one goes on with its own, whatever another thread asks for
            self.rows = _without_graph(rows, packing)
        return self._group(call, packing, rows)

    def _become_known(self, tensors: list[Any], packing: Packing | None) -> bool:
        """Check tensors of which no like were seen; return whether they are of the signature."""
        if packing is None:
            return False
        own = self.signature
        fit = (
            PLAIN.issuperset(map(type, tensors))
            and [x.shape for x in tensors] == packing.shapes
            and {x.dtype for x in tensors} == {own.dtype}
            and {x.layout for x in tensors} == {torch.strided}
            and {x.device for x in tensors} == {own.device}
        )
        if fit:
            self.executable.add(tensors)
        return fit

    def _group(self, call: Call, packing: Packing | None, rows: Rows) -> Group | None:
        t: Any = call.t[0]
        own, segment = self.signature, self.segment
        mode = "apply" if own.apply else "update"
        program, values = rows.program(segment, t, own.present, own.has_params)
        operands = None if program is None else self.executable.operands.get(program)
        if program is None or operands is None:
            return None
        tensors: dict[str, list[Tensor]] = {}
        if program.kinds:
            tensors = {operand: rows.of_each(operand) for operand in program.hypers(mode)}
            if unfit_hypers(program, mode, tensors, call.g):
                return None
        rules = Rules(
            segment,
            call.hyper,
            [t] * len(call.t),
            own.present,
            own.has_params,
            own.apply,
            operands.inputs,
            operands.outputs,
            {operand: [x.dim() for x in column] for operand, column in tensors.items()},
            operands.packed_in,
            operands.packed_out,
            packing if operands.packed_in or operands.packed_out else None,
        )
        steps = [(row, t) for row in values]
        return Group(program, mode, len(call.g), rows.indices, steps, rules)


def cached_group(plan: Plan, call: Call, apply: bool) -> tuple[Segment, Group] | None:
    """Return what one kernel call needs if everything is as an earlier one had it, else ``None``.

    Only the numbers, the tensors and the step count are other ones.
    """
    if not call.g or type(call.t[0]) is not int or call.t.count(call.t[0]) != len(call.t):
        return None
    packing = call.packing
    for column in call.slots.values():
        if packing is None and type(column) is Packed:
            packing = column.packing
    kept: Sequence[Any] = plan.cached_calls if packing is None else [packing.cached]
    for cached in reversed(kept):
        if cached is None or cached.segment.plan is not plan:
            continue
        own = cached.signature
        if own.apply == apply and len(own.shapes) == len(call.g):
            group = cached.group(call, packing)
            if group is not None:
                return cached.segment, group
    cached = _begun(plan, packing, call, apply)
    group = None if cached is None else cached.group(call, packing)
    if cached is None or group is None:
        return None
    _keep(cached, packing)
    return cached.segment, group


def remember(segment: Segment, call: Call, group: Group, apply: bool) -> None:
    """Keep what an update of all parameters at once found out."""
    rule = group.rule
    packing = rule.packing or call.packing
    if group.count != len(call.g):
        return
    packed_out = frozenset(s for s in group.kernel.output_operands if s != UPDATE)
    if rule.packed_out != (packed_out if packing is not None else frozenset()):
        return
    cached = _made(segment, packing, call, rule.present, apply)
    if cached is None:
        return
    found = cached.executable
    if group.program not in found.operands:
        if len(found.operands) >= PROGRAMS:
            found.operands.clear()
        own = Operands(rule.inputs, rule.outputs, rule.packed_in, rule.packed_out)
        found.operands[group.program] = own
    if packing is None:
        slots = [call.slots[n] for n, there in zip(segment.slots, rule.present) if there]
        columns = [call.g, *([call.p] if rule.has_params else []), *slots]
        if not all(type(column) is list for column in columns):
            return
        found.add_columns(columns)
    _keep(cached, packing)


def _made(
    segment: Segment, packing: Packing | None, call: Call, present: tuple[bool, ...], apply: bool
) -> CachedCall | None:
    """Return a call as it may be known already; ``None`` if each parameter has to be looked at."""
    rows = read_rows(segment, call.hyper)
    if rows is None:
        return None
    kept_rows = _without_graph(rows, packing)
    shapes = tuple([x.shape for x in call.g]) if packing is None else packing.shapes_key
    signature = Signature(
        segment.structure,
        shapes,
        present,
        call.p[0] is not None,
        packing is not None,
        apply,
        call.g[0].dtype,
        call.g[0].device,
    )
    if segment.structure is not None:
        return CachedCall(segment, kept_rows, signature, executable(signature))
    # parts that nobody but this transformation has
    kept = segment.plan.cached_calls if packing is None else [packing.cached]
    for cached in kept:
        if cached is not None and cached.segment is segment and cached.signature == signature:
            return CachedCall(segment, kept_rows, signature, cached.executable)
    return CachedCall(segment, kept_rows, signature, Executable())


def _begun(plan: Plan, packing: Packing | None, call: Call, apply: bool) -> CachedCall | None:
    """Return the first call of a transformation, if others of its signature have been made."""
    segment = whole_segment(plan)
    if segment is None or segment.structure is None or not PLAIN.issuperset(map(type, call.g)):
        return None
    if backends.unavailable(call.g[0].device.type):
        return None
    columns = [call.slots[name] for name in segment.slots]
    present = tuple(type(c) is Packed or c[0] is not None for c in columns)
    if packing is None and Packed in map(type, columns):
        return None
    cached = _made(segment, packing, call, present, apply)
    return cached if cached is not None and cached.executable.operands else None


def _without_graph(rows: Rows, packing: Packing | None) -> Rows | None:
    """Return rows to keep: a transformation may live longer than the graph of a learned number."""
    return rows if packing is not None or not rows.tensors else None


def _keep(cached: CachedCall, packing: Packing | None) -> None:
    if packing is not None:
        packing.cached = cached
        return
    plan = cached.segment.plan
    others = [one for one in plan.cached_calls if one.signature != cached.signature]
    plan.cached_calls = [*others[1 - CALLS :], cached]  # another thread may read the old list
