"""The object-oriented API's fast path: one kernel call that overwrites parameters and slots.

What does not change from step to step (addresses, sizes, the program) is kept; everything that a
user could have changed since is compared before the kernel runs. Whatever does not fit is left to
the general path.
"""

from __future__ import annotations

import bisect
import itertools
import operator
from collections.abc import Iterable, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from torchopt.base.signatures import KnownSignatures
from torchopt.core import hyper
from torchopt.core.plan import Plan
from torchopt.kernels.assignment import PLAIN
from torchopt.kernels.backends import availability as backends
from torchopt.kernels.backends import cpu as native
from torchopt.kernels.backends.memory import narrow_mask, slot_dtype
from torchopt.kernels.fused import unsupported_reason
from torchopt.kernels.generate.program import GRADIENT, Program, slot_operand
from torchopt.kernels.matching import Segment, whole_segment
from torchopt.kernels.stepped import SteppedOptimizer


MODE = "apply"
#: The state of a parameter that has none, as SGD's without momentum.
NOTHING: Any = MappingProxyType({})


class Prepared:
    """The parameters of one group, their states and slots, and where they are in memory."""

    def __init__(
        self,
        segment: Segment,
        params: list[Tensor],
        states: list[dict[str, Any]],
        columns: list[list[Any]],
    ) -> None:
        self.segment = segment
        self.params, self.states = params, states
        self.present = tuple(column[0] is not None for column in columns)
        self.kept = [c for c, there in zip(columns, self.present) if there]
        self.kept_names = [n for n, there in zip(self.segment.slots, self.present) if there]
        self.by_state = list(itertools.chain.from_iterable(zip(*self.kept)))
        self.lengths = list(map(len, states))
        self.dtype = params[0].dtype
        self.shapes = [p.shape for p in params]
        self.sizes = list(map(Tensor.numel, params))
        self.written = [*params, *itertools.chain.from_iterable(self.kept)]
        self.addresses = [list(map(Tensor.data_ptr, column)) for column in (params, *self.kept)]
        self.places = list(itertools.chain.from_iterable(self.addresses))
        written = sorted(
            (address, address + x.nbytes)
            for x, address in zip(self.written, self.places)
            if x.nbytes
        )
        self.starts = [start for start, _ in written]
        self.stops = [stop for _, stop in written]
        self.known_written, self.known_grads = KnownSignatures(), KnownSignatures()
        self.apart: list[int] = []  # addresses of gradients known to lie elsewhere
        self.program: Program | None = None
        self.call: Any = None  # the KernelCall, once there is a program
        self.told: list[int] = []  # addresses of gradients that the call has been given
        self.row: Sequence[float] = ()  # the kernel's numbers at the step being taken
        self.numbers: dict[str, float] = {}  # and the counters

    @staticmethod
    def make(plan: Plan, params: list[Tensor], states: list[dict[str, Any]]) -> Prepared | None:
        """Return the prepared group, or ``None`` if kernels cannot overwrite it."""
        segment = whole_segment(plan)
        if plan.narrow:
            return None  # slots that have been given in another dtype would stay so
        if segment is None or not params or backends.unavailable("cpu"):
            return None
        if not all(p.is_cpu and p.layout == torch.strided for p in params):
            return None
        if not all(isinstance(s, (dict, MappingProxyType)) for s in states):
            return None
        columns: list[list[Any]] = [[s.get(name) for s in states] for name in segment.slots]
        if any(len({x is None for x in column}) > 1 for column in columns):
            return None  # some parameters have the slot, and others have not
        slots = [x for column in columns for x in column if x is not None]
        if not all(isinstance(x, Tensor) and x.layout == torch.strided for x in slots):
            return None  # a sparse buffer has no address
        made = Prepared(segment, params, states, columns)
        return made if made._fits() else None

    def _fits(self) -> bool:
        """Check once what stays true as long as the tensors are the same objects."""
        tensors: list[Any] = [x for column in (self.params, *self.kept) for x in column]
        if not PLAIN.issuperset(map(type, tensors)):
            return False
        if {x.layout for x in tensors} != {torch.strided} or any(map(Tensor.is_neg, tensors)):
            return False
        if not all(x.is_cpu for x in tensors):
            return False
        if any([x.shape for x in column] != self.shapes for column in self.kept):
            return False
        dtype = self.dtype
        if dtype not in native.DTYPES or any(p.dtype != dtype for p in self.params):
            return False
        if any(x.dtype != slot_dtype(dtype) for column in self.kept for x in column):
            return False
        if not all(map(Tensor.is_contiguous, tensors)):
            return False
        if any(0 in column for column in self.addresses) and any(
            x.numel() and not x.data_ptr() for x in tensors
        ):
            return False  # its memory has been given back
        # what is overwritten must not be two things at once
        return not _overlap(zip(self.starts, self.stops))

    def is_current(self, params: Sequence[Tensor], states: Sequence[dict[str, Any]]) -> bool:
        """Whether parameters, states and slots are the same objects, alike, at the same places.

        The address alone says too little: what begins there may have been transposed in place, or
        be read as another dtype.
        """
        if len(params) != len(self.params) or not all(map(operator.is_, params, self.params)):
            return False
        if len(states) != len(self.states) or not all(map(operator.is_, states, self.states)):
            return False
        if list(map(len, states)) != self.lengths:
            return False
        if self.kept_names and not self._keeps_slots(states):
            return False
        if list(map(Tensor.data_ptr, self.written)) != self.places:
            return False
        return self.known_written.knows(self.written) or self._stay_known()

    def _keeps_slots(self, states: Sequence[dict[str, Any]]) -> bool:
        """Whether the slots in the states are the same objects."""
        pick = operator.itemgetter(*self.kept_names)
        found: Iterable[Any] = map(pick, states)
        try:
            if len(self.kept_names) > 1:
                found = itertools.chain.from_iterable(found)
            return all(map(operator.is_, found, self.by_state))
        except KeyError:  # taken away, and something else put in
            return False

    def _stay_known(self) -> bool:
        """Check parameters and slots of which no like were seen; return whether they fit still."""
        if not self._fits() or [p.shape for p in self.params] != self.shapes:
            return False
        self.known_written.add(self.written)
        return True

    def takes(self, grads: Sequence[Tensor]) -> bool:
        """Whether kernels can read the gradients as they are."""
        known = self.known_grads.knows(grads) or self._become_known(grads)
        return known and self._lie_apart(list(map(Tensor.data_ptr, grads)))

    def _become_known(self, grads: Sequence[Tensor]) -> bool:
        """Check gradients of which no like were seen; return whether they fit."""
        fit = (
            PLAIN.issuperset(map(type, grads))
            and all(x.layout == torch.strided and x.is_cpu for x in grads)
            and {x.dtype for x in grads} == {self.dtype}
            and [x.shape for x in grads] == self.shapes
            and all(map(Tensor.is_contiguous, grads))
            and not any(map(Tensor.is_neg, grads))
        )
        if fit:
            self.known_grads.add(grads)
        return fit

    def _lie_apart(self, addresses: list[int]) -> bool:
        """Whether the gradients share no memory with what is overwritten here; remembered."""
        if addresses != self.apart:
            if self.overwrites(addresses, self.sizes, self.params[0].element_size()):
                return False
            self.apart = addresses
        return True

    def overwrites(self, addresses: list[int], sizes: list[int], entry: int) -> bool:
        """Whether tensors share memory with parameters or slots of this group."""
        for address, n in zip(addresses, sizes):
            following = bisect.bisect_right(self.starts, address)
            if n and (
                not address  # its memory has been given back
                or (following and self.stops[following - 1] > address)
                or (following < len(self.starts) and self.starts[following] < address + n * entry)
            ):
                return True
        return False

    def plan_step(self, row: dict[str, Any], t: int) -> bool:
        """Choose the program for these numbers; return whether there is one."""
        read = self.segment.read(row)
        if read.kinds:  # no derivative is recorded here, so a tensor is as good as its number
            row = {name: hyper.as_numbers(value) for name, value in row.items()}
            read = self.segment.read(row)
        if read.kinds or read.reason:
            return False
        variant = self.segment.variant(row, read, t, self.present, has_params=True)
        program = variant.program
        if program is None:
            return False
        if program is not self.program:
            if backends.missing(self.params[0].device, program, MODE):
                return False
            kept = {slot_operand(k) for k, there in enumerate(self.present) if there}
            if not kept.issuperset(program.kernels[MODE].output_operands[1:]):
                return False  # a slot that is not there yet has to be made
            self.program, self.call, self.told = program, self._make_call(program), []
        self.row = program.numbers[MODE](read.values, t)
        return True

    def _make_call(self, program: Program) -> native.KernelCall:
        kernel = program.kernels[MODE]
        kept = [slot_operand(k) for k, there in enumerate(self.present) if there]
        places = dict(zip(("p", *kept), self.addresses))
        count = len(self.sizes)
        inputs = [places.get(operand, [0] * count) for operand in kernel.inputs]
        outputs = [places["p" if operand == "u" else operand] for operand in kernel.output_operands]
        return native.KernelCall(
            native.library(),
            backends.function_of(kernel),
            native.DTYPES[self.dtype],
            narrow_mask(kernel.inputs),
            narrow_mask(kernel.output_operands),
            self.sizes,
            list(itertools.chain.from_iterable(inputs)),
            list(itertools.chain.from_iterable(outputs)),
        )

    def execute(self) -> None:
        """Overwrite parameters and slots; the gradients are those that :meth:`takes` has seen."""
        assert self.program is not None
        # autograd must see that saved tensors have changed, as after any operation in place
        increment_version(self.written)
        inputs = self.program.kernels[MODE].inputs
        if GRADIENT in inputs and self.apart is not self.told:
            self.call.set_input(inputs.index(GRADIENT), self.apart)
            self.told = self.apart
        self.call.run(self.row)


def _overlap(spans: Iterable[tuple[int, int]]) -> bool:
    """Whether stretches of memory, sorted by where they start, overlap."""
    return any(stop > start for (_, stop), (start, _) in itertools.pairwise(spans))


class Stepper:
    """Steps of one optimizer, all groups together."""

    def __init__(self) -> None:
        self.prepared: list[Prepared] = []
        self.separate: list[Prepared] = []  # groups known to share no memory

    def step(self, optimizer: SteppedOptimizer, grads: Sequence[Any]) -> bool:
        """Take one step in place, if kernels can take all of it; return whether they did.

        Nothing has changed if not. An interrupt leaves either the old values or all new ones.
        """
        plan = optimizer.transformation.plan
        groups = optimizer.param_groups
        counts = optimizer._counts_steps()
        states = self._states(optimizer, len(grads), counts)
        if states is None or unsupported_reason():
            return False
        begin, work = 0, []
        for k, group in enumerate(groups):
            params = group["params"]
            own = slice(begin, begin + len(params))
            begin += len(params)
            prepared = self._prepare(k, plan, params, states[own], optimizer)
            step = None if prepared is None else _common_step(states[own], counts)
            if prepared is None or step is None:
                return False
            row = optimizer._row(group)
            if plan.counters:
                old = _common_numbers(states[own], plan.counters)
                if old is None:
                    return False
                row = plan.count(row, step + 1, old)
            if not prepared.takes(grads[own]) or not prepared.plan_step(row, step + 1):
                return False
            prepared.numbers = plan.kept(row) if plan.counters else {}
            work.append((prepared, step + 1))
        groups_now = [prepared for prepared, _ in work]
        if groups_now != self.separate:  # what two groups overwrite must not be one thing
            if _overlap(sorted(s for one in groups_now for s in zip(one.starts, one.stops))):
                return False
            self.separate = groups_now
        for one, _ in work:
            for other, _ in work:
                entry = one.params[0].element_size()
                if one is not other and other.overwrites(one.apart, one.sizes, entry):
                    return False
        _commit(work, counts)
        return True

    def _states(self, optimizer: SteppedOptimizer, count: int, counts: bool) -> list[Any] | None:
        """Return the states of all parameters, ``None`` if one must have a state and has none."""
        found = optimizer.state
        if len(found) == count:
            return list(found.values())
        if not found:  # parameters that keep neither slots nor a count
            return None if counts else [NOTHING] * count
        if counts and len(found) < count:
            return None
        params = itertools.chain.from_iterable(g["params"] for g in optimizer.param_groups)
        return [found.get(p, NOTHING) for p in params]

    def _prepare(
        self,
        k: int,
        plan: Plan,
        params: list[Tensor],
        states: list[Any],
        optimizer: SteppedOptimizer,
    ) -> Prepared | None:
        if k < len(self.prepared) and self.prepared[k].is_current(params, states):
            return self.prepared[k]
        del self.prepared[k:]
        if any(optimizer.state.get(p, NOTHING) is not s for p, s in zip(params, states)):
            return None  # the states stand in another order
        made = Prepared.make(plan, list(params), states)
        if made is not None:
            self.prepared.append(made)
        return made


def _common_step(states: Sequence[dict[str, Any]], counts: bool) -> int | None:
    """Return how many steps all parameters have taken, or ``None`` if they differ."""
    if not counts:  # a state without a count counts as one step, as in Optimizer
        kept = set(map(bool, states))
        return int(kept.pop()) if len(kept) == 1 else None
    try:
        steps = set(map(operator.itemgetter("step"), states))
    except KeyError:
        return None
    step = steps.pop() if len(steps) == 1 else None
    return step if type(step) is int else None


def _common_numbers(states: Sequence[dict[str, Any]], names: Iterable[str]) -> Any:
    """Return the counters that all parameters share, or ``None`` if they differ."""
    found: dict[str, Any] = {}
    for name in names:
        values = {state.get(name) for state in states}
        found[name] = values.pop()
        if values or not isinstance(found[name], (int, float)):
            return None
    return found


def _commit(work: Sequence[tuple[Prepared, int]], counts: bool) -> None:
    """Overwrite all groups; an interrupt leaves all old values or, once begun, all new ones."""
    for prepared, _ in work:
        prepared.call.done = False
    try:
        _write(work, counts)
    except BaseException:
        if any(prepared.call.done for prepared, _ in work):
            _write(work, counts)
        raise


def _write(work: Sequence[tuple[Prepared, int]], counts: bool) -> None:
    for prepared, step in work:
        if not prepared.call.done:
            prepared.execute()
        if counts:
            for state in prepared.states:
                state["step"] = step
        for state in prepared.states if prepared.numbers else ():
            state.update(prepared.numbers)
