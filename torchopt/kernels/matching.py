"""Runs: sequences of elementwise parts of a transformation, traced once and kept with its plan."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import numbers
from collections.abc import Iterator
from typing import Any, NamedTuple

from torchopt.base.values import is_plain, same
from torchopt.core.plan import Plan
from torchopt.core.transform import GradientTransformation
from torchopt.kernels.generate.learned import NUMBER, hyper_operand
from torchopt.kernels.generate.program import (
    Conditions,
    Program,
    build,
    conditions_of,
    slot_operand,
)
from torchopt.kernels.generate.tracing import UntraceableError
from torchopt.kernels.generate.watching import Watch
from torchopt.kernels.reading import read_tensor


#: How many programs are kept for one sequence of rules.
VARIANTS = 64


@dataclasses.dataclass
class Variant:
    """A program, and for which calls it was made; or why there is none.

    Attributes:
        flags: The flags among the hyperparameters.
        present: For each slot, whether it is a tensor.
        has_params: Whether the parameter is known.
        program: The program.
        reason: Why there is none.
        conditions: For which numbers it is that one; ``None`` for one that is not kept.
        own: What a rule has read from itself instead of its arguments; ``None`` if nothing.
        kinds: The kinds of the hyperparameters; empty if all are numbers.
    """

    flags: tuple[bool, ...]
    present: tuple[bool, ...]
    has_params: bool
    program: Program | None
    reason: str = ""
    conditions: Conditions | None = None
    own: Any = None
    kinds: tuple[str, ...] = ()


class Read(NamedTuple):
    """The hyperparameters of one parameter, as kernels take them.

    Attributes:
        values: The numbers, and those in tensors with one entry; ``nan`` for other tensors.
        flags: The flags.
        kinds: The kind of each value (see generate/learned.py); empty if all are numbers.
        reason: Why no kernel takes them.
    """

    values: list[float]
    flags: tuple[bool, ...]
    kinds: tuple[str, ...] = ()
    reason: str = ""


class Segment:
    """A sequence of elementwise parts of a plan: ``plan.parts[first:last]``."""

    def __init__(self, plan: Plan, first: int, last: int) -> None:
        self.plan, self.first, self.last = plan, first, last
        self.parts = plan.parts[first:last]
        self.slots = [name for names in plan.slots[first:last] for name in names]
        #: The slot that an operand is.
        self.slot_by_operand = {slot_operand(k): name for k, name in enumerate(self.slots)}
        #: What is the same for transformations of the same structure; ``None`` if nobody can say.
        self.structure = _structure_of(self.parts)
        self.variants = [] if self.structure is None else _known_variants(self.structure)
        self.own_variants: list[Variant] = []  # where a rule reads what is no number from itself
        self._own: Any = None
        self._places: list[tuple[str, int | None]] | None = None
        self.public = [name for fields in plan.fields[first:last] for name in fields.values()]

    def rows(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the hyperparameters of each part, of one parameter."""
        return [
            {name: row[public] for name, public in fields.items()}
            for fields in self.plan.fields[self.first : self.last]
        ]

    def read(self, row: dict[str, Any]) -> Read:
        """Return the numbers, the flags and the kinds of the hyperparameters of one parameter."""
        values: list[float] = []
        flags = []
        for name in self.public:
            value = row[name]
            kind = type(value)
            if kind is bool:
                flags.append(value)
            elif kind is float or kind is int:
                values.append(value)
            else:
                for number in value if kind is tuple else (value,):
                    if not isinstance(number, numbers.Real):
                        return self._read_tensors(row)
                    values.append(float(number))
        return Read(values, tuple(flags))

    def _read_tensors(self, row: dict[str, Any]) -> Read:
        values: list[float] = []
        kinds: list[str] = []
        for name, place in self.places(row):
            value = row[name] if place is None else row[name][place]
            if isinstance(value, numbers.Real):
                values.append(float(value))
                kinds.append(NUMBER)
                continue
            number, kind, reason = read_tensor(value)
            if reason:
                return Read([], (), (), f"the hyperparameter {name} is {reason}")
            values.append(number)
            kinds.append(kind)
        flags = tuple(row[name] for name in self.public if type(row[name]) is bool)
        return Read(values, flags, tuple(kinds))

    def places(self, row: dict[str, Any]) -> list[tuple[str, int | None]]:
        """Return where each number stands in a row: its name, and its position in a pair."""
        if self._places is None:
            self._places = [
                (name, place)
                for name in self.public
                if type(row[name]) is not bool
                for place in (range(len(row[name])) if type(row[name]) is tuple else (None,))
            ]
        return self._places

    def hyper(self, row: dict[str, Any], operand: str) -> Any:
        """Return the hyperparameter that a operand stands for."""
        name, place = self.places(row)[int(operand[1:])]
        return row[name] if place is None else row[name][place]

    def with_hypers(self, row: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        """Return a row with some hyperparameters replaced, by operand."""
        row = dict(row)
        for operand, value in given.items():
            name, place = self.places(row)[int(operand[1:])]
            if place is not None:
                pair = list(row[name])
                pair[place] = value
                value = tuple(pair)
            row[name] = value
        return row

    def variant(
        self,
        row: dict[str, Any],
        read: Read,
        t: Any,
        present: tuple[bool, ...],
        has_params: bool,
    ) -> Variant:
        """Return the program for a row of hyperparameters (read by :meth:`read`), or why not."""
        values, flags, kinds, reason = read
        if reason:
            return Variant((), present, has_params, None, reason)
        if type(t) is not int:
            return Variant(flags, present, has_params, None, "the step count is a tensor")
        for known in itertools.chain(self.variants, self.own_variants):
            if (
                known.flags == flags
                and known.kinds == kinds
                and known.present == present
                and known.has_params == has_params
                and (known.own is None or same(known.own, self._own_values()))
                and known.conditions is not None
                and known.conditions.hold(values, t)
            ):
                return known
        made = Variant(flags, present, has_params, None, kinds=kinds)
        watch = Watch(self.parts)
        numbers = row
        if kinds:
            tensors = {
                hyper_operand(k): values[k] for k, kind in enumerate(kinds) if kind != NUMBER
            }
            numbers = self.with_hypers(row, tensors)
        try:
            made.program = build(watch.parts, self.rows(numbers), t, present, has_params, kinds)
            made.conditions = made.program.conditions
        except Exception as error:
            what = "is not pointwise" if isinstance(error, UntraceableError) else "cannot be traced"
            made.reason = f"its rule {what}: {error}"
            made.conditions = conditions_of(getattr(error, "guards", ()))
        kept = self.variants
        if watch.was_read:
            made.own = self._own_values()
            if kinds and not is_plain(made.own):
                made.program, made.reason = None, "its rule reads from itself what may be a tensor"
                return made
            kept = self.variants if is_plain(made.own) else self.own_variants
        if len(kept) >= VARIANTS:
            del kept[0]
        kept.append(made)
        return made

    def _own_values(self) -> tuple[Any, ...]:
        """Return the hyperparameters that the transformations were made with."""
        if self._own is None:
            self._own = tuple(getattr(p, name) for p in self.parts for name in p.declared)
        return self._own


def _structure_of(parts: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Return what tells apart parts whose programs differ, whatever their numbers are.

    Transformations are often made in each call, with other numbers, and tracing takes a
    millisecond. A rule is given its hyperparameters, so their values do not count; those of all
    other fields do, which a rule can only read from itself.
    """
    key: list[Any] = []
    for part in parts:
        fields = _fields_of(type(part))
        values = [getattr(part, name) for name in fields]
        if not all(map(is_plain, values)):
            return None  # nothing that holds a graph, or code, is kept for good
        key.append((type(part), *zip(map(type, values), values)))
    return tuple(key)


@functools.lru_cache(maxsize=512)
def _fields_of(part: type) -> list[str]:
    """Return the names of the fields of a class of transformations that are no hyperparameters."""
    declared: Any = getattr(part, "declared")  # noqa: B009
    unread = {*declared, "slot_dtypes"}  # slots are converted around the rule
    return [f.name for f in dataclasses.fields(part) if f.name not in unread]


@functools.lru_cache(maxsize=512)
def _known_variants(key: tuple[Any, ...]) -> list[Variant]:
    """Return where to keep the programs of a segment: one list for parts of one structure."""
    return []


def segments_from(plan: Plan, first: int) -> Iterator[Segment]:
    """Yield the segments that begin at a part, the longest first; each is made when asked for."""
    end = _joined_end(plan, first)
    return (_segment(plan, first, last) for last in range(end, first, -1))


def whole_segment(plan: Plan) -> Segment | None:
    """Return the segment that is the whole plan, if all its parts can be in one."""
    count = len(plan.parts)
    return _segment(plan, 0, count) if count and _joined_end(plan, 0) == count else None


def _joined_end(plan: Plan, first: int) -> int:
    """Return where the longest segment that begins at a part ends."""
    known: dict[int, int] = plan.__dict__.setdefault("joined_ends", {})
    if first not in known:
        last = first
        while last < len(plan.parts) and not unjoined(plan.parts[last]):
            last += 1
        known[first] = last
    return known[first]


def _segment(plan: Plan, first: int, last: int) -> Segment:
    """Return a segment of a plan; there is one only."""
    known: dict[tuple[int, int], Segment] = plan.__dict__.setdefault("segments", {})
    if (first, last) not in known:
        known[first, last] = Segment(plan, first, last)
    return known[first, last]


def unjoined(part: GradientTransformation) -> str:
    """Return why a part can be in no segment; the empty string if it can."""
    if part.use_accelerated_op is False:
        return "use_accelerated_op is False"
    if not part.elementwise:
        return "it is not elementwise"
    return ""
