"""Where the parts of a transformation find what is theirs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from torchopt.base import misuse, tree
from torchopt.base.values import is_plain
from torchopt.core.slots import Counter, Slot


class Named(Protocol):
    """A part, as to what it has by name."""

    slots: ClassVar[Sequence[Slot]]
    counters: ClassVar[Sequence[Counter]]

    def hyper_specs(self) -> Mapping[str, Any]:
        """Return the declared hyperparameters."""
        ...

    def hyperparameters(self) -> Mapping[str, Any]:
        """Return their values."""
        ...

    def kept(self, slots: Sequence[Slot]) -> Sequence[Slot]:
        """Return slots as they are kept."""
        ...

    def whole_slots(self) -> Mapping[str, tuple[Any, tuple[Any, ...]]]:
        """Return the slots that are one tree for all parameters."""
        ...


class Plan:
    """Where each part of a transformation finds its hyperparameters and slots by public name.

    A plan is equal to itself only: said here, because torch.compile takes it as a constant.
    """

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = tuple(parts)
        #: Whether no part may be computed by kernels.
        self.never_fused = all(part.use_accelerated_op is False for part in self.parts)
        #: The extra values that parts read, and the parts whose slots those change before a step.
        self.reads = frozenset(name for part in self.parts for name in part.reads)
        self.refreshing = [k for k, part in enumerate(self.parts) if part.refreshes]
        self.hyper_specs: dict[str, Any] = {}
        self.values: dict[str, Any] = {}
        self.slot_names: tuple[str, ...] = ()
        self.slot_of: dict[str, Slot] = {}
        self.counters: dict[str, Counter] = {}
        self.fields: list[dict[str, str]] = []
        self.slots: list[tuple[str, ...]] = []
        #: The public names of each part's counters.
        self.counted: list[dict[str, str]] = []
        #: Where a counted row has what is to be kept of each counter, by public name.
        self.kept_at: dict[str, str] = {}
        #: Slots that are one tree for all parameters: whose they are, and under which masks.
        self.whole: dict[str, tuple[Any, tuple[Any, ...]]] = {}
        latest: dict[str, str] = {}  # the public name of a part's own, as the last part had it
        for part in self.parts:
            self._add(part, latest)
        #: What calls whose slots are not packed found out (torchopt.kernels.cached_call).
        self.cached_calls: list[Any] = []
        #: The values as a rule gets them, if they are the same for all parameters at every step.
        self.row: dict[str, Any] | None = None
        if all(
            is_plain(value) and (type(value) is not tuple or self.hyper_specs[name].length)
            for name, value in self.values.items()
        ):
            self.row = dict(self.values)

        #: Slots that a state must have.
        self.required = frozenset(n for n, s in self.slot_of.items() if not s.may_be_absent)
        #: Slots that are kept in a dtype of their own, and computed with in that of the parameters.
        self.narrow: dict[str, torch.dtype] = {
            name: s.dtype for name, s in self.slot_of.items() if s.dtype is not None and s.is_narrow
        }

    def _add(self, part: Named, latest: dict[str, str]) -> None:
        """Find public names for what the next part has; ``latest`` has those of earlier parts."""
        specs = part.hyper_specs()
        taken = {*self.hyper_specs, *self.counters}
        fields = {
            name: latest[name] if s.shared and name in latest else _free_name(name, taken)
            for name, s in specs.items()
        }
        latest.update(fields)
        specs = {name: spec for name, spec in specs.items() if fields[name] not in taken}
        self.hyper_specs.update({fields[name]: spec for name, spec in specs.items()})
        slots, counters = part.kept(part.slots), part.counters
        kept = {*self.slot_of, *self.counters, "step"}
        names = tuple(_free_name(slot.name, kept) for slot in slots)
        self.fields.append(fields)
        self.slots.append(names)
        self.slot_names += names
        values = part.hyperparameters()
        self.values.update({fields[name]: values[name] for name in specs})
        self.slot_of.update(zip(names, slots))
        if whole := part.whole_slots():
            own = zip(names, slots)
            self.whole.update({n: whole[slot.name] for n, slot in own if slot.name in whole})
        kept |= {*names, *self.hyper_specs}
        counted = {c.name: _free_name(c.name, kept) for c in counters}
        self.counters.update({counted[c.name]: c for c in counters})
        self.kept_at.update({counted[c.name]: _place_of(counted[c.name], c) for c in counters})
        self.counted.append(counted)
        fields.update(counted)  # a rule gets them as it gets its hyperparameters

    def renamed_slots(self, optional: bool = False) -> tuple[Slot, ...]:
        """Return the slots of all parts under their public names."""
        return tuple(
            dataclasses.replace(slot, name=name, optional=optional or slot.optional)
            for name, slot in self.slot_of.items()
        )

    def renamed_counters(self) -> tuple[Counter, ...]:
        """Return the counters of all parts under their public names."""
        return tuple(dataclasses.replace(c, name=name) for name, c in self.counters.items())

    @property
    def uses_step(self) -> bool:
        """Whether a part reads the step count, or keeps a counter that goes along with it."""
        return bool(self.counters) or any(part.uses_step for part in self.parts)

    @property
    def constant(self) -> bool:
        """Whether each slot starts as one number everywhere, whatever the parameter."""
        return all(slot.is_number for slot in self.slot_of.values())

    def count(self, row: dict[str, Any], t: Any, old: Mapping[str, Any]) -> dict[str, Any]:
        """Return the hyperparameters of one parameter with its counters for update ``t``.

        A rule finds each under its name; :meth:`kept` says what is to be kept.
        """
        row = dict(row)
        for part, fields, counted in zip(self.parts, self.fields, self.counted):
            if counted:
                values = {n: row[public] for n, public in fields.items() if n not in counted}
                values.update({n: old[public] for n, public in counted.items()})
                new = part.count(t, **values)
                row.update({public: old[public] for public in counted.values()})
                row.update({self.kept_at[public]: new[n] for n, public in counted.items()})
        return row

    def kept(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return the counters to keep, of hyperparameters that were counted."""
        return {name: row[place] for name, place in self.kept_at.items()}

    def counted_rows(
        self,
        rows: Sequence[dict[str, Any]],
        t: Sequence[Any],
        old: Mapping[str, Sequence[Any]],
        uniform: bool = False,
    ) -> list[dict[str, Any]]:
        """Return :meth:`count` of several parameters; what they share they share again.

        ``uniform`` says that ``t`` and ``old`` are the same for all, for a compiler, which would
        make a guard of each comparison.
        """
        if torch.compiler.is_compiling():
            return self._counted_while_compiling(rows, t, old, uniform)
        known: dict[Any, dict[str, Any]] = {}
        result = []
        for k, (row, step) in enumerate(zip(rows, t)):
            own = {name: column[k] for name, column in old.items()}
            # a tensor has an identity, a number a value
            key = (id(row), *(id(x) if isinstance(x, Tensor) else x for x in (step, *own.values())))
            if key not in known:
                known[key] = self.count(row, step, own)
            result.append(known[key])
        return result

    def _counted_while_compiling(
        self,
        rows: Sequence[dict[str, Any]],
        t: Sequence[Any],
        old: Mapping[str, Sequence[Any]],
        uniform: bool,
    ) -> list[dict[str, Any]]:
        uniform = uniform and not tree.compiler_is_old()
        found: list[dict[str, Any]] = []
        for k, row in enumerate(rows):
            if uniform and k and row is rows[k - 1]:
                found.append(found[-1])
            else:
                found.append(self.count(row, t[k], {n: column[k] for n, column in old.items()}))
        return found

    def check_slots(self, given: Iterable[str], owner: object) -> None:
        """Refuse a state that another transformation has made.

        Raises:
            ValueError: Naming the slots that are unknown or missing.
        """
        names = set(given)
        unknown = sorted(names - {*self.slot_names, *self.counters})
        missing = [n for n in self.slot_of if n in self.required and n not in names]
        missing += [n for n in self.counters if n not in names]
        if unknown or missing:
            what = f"has {unknown}" if unknown else f"lacks {missing}"
            raise ValueError(
                f"The state belongs to another optimizer: it {what}, while "
                f"{misuse.clipped(str(owner))} keeps {[*self.slot_names, *self.counters]}."
            )

    def rows_of(self, position: int, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Pick a part's own hyperparameters; rows that are one object stay one object."""
        fields, each = self.fields[position], tree.compiler_is_old()
        previous: dict[str, Any] | None = None
        picked: dict[str, Any] = {}
        result = []
        for row in rows:
            if each or row is not previous:
                picked = {name: row[public] for name, public in fields.items()}
                previous = row
            result.append(picked)
        return result


def _place_of(name: str, counter: Counter) -> str:
    return f"next {name}" if counter.ahead else name


def _free_name(name: str, taken: Any) -> str:
    candidate, occurrence = name, 1
    while candidate in taken:
        occurrence += 1
        candidate = f"{name}_{occurrence}"
    return candidate
