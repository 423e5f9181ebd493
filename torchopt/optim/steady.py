"""What a differentiable step finds again: parameters, and all that the one before found out.

A step like the one before need only compare.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from torchopt.base.signatures import KnownSignatures
from torchopt.base.values import is_plain
from torchopt.core.engine import Call
from torchopt.core.gather import initialise_packed
from torchopt.core.packed import Packed, PackedDict, Packing
from torchopt.core.transform import GradientTransformation
from torchopt.nn.parameters import ParameterSite, ParameterWalk, modules_of
from torchopt.optim.meta_state import GroupState


_requires_grad = operator.attrgetter("requires_grad")
_shape_of = operator.attrgetter("shape")
_name_of = operator.attrgetter("name")


class Entry(NamedTuple):
    """One parameter of one group."""

    group: int
    name: str
    site: ParameterSite


class Trainable:
    """The parameters of all groups that require grad, at this moment.

    Attributes:
        frozen: By group, those that did not at some step: a state may be without them.
    """

    def __init__(self, frozen: Mapping[int, set[str]] | None = None) -> None:
        self.frozen = {index: set(names) for index, names in (frozen or {}).items()}
        self._walks: list[ParameterWalk] = []
        self._entries: list[list[Entry]] = []

    def now(self, groups: Sequence[dict[str, Any]]) -> tuple[list[Entry], list[Tensor]]:
        """Return the entries and their present tensors."""
        entries: list[Entry] = []
        params: list[Tensor] = []
        for index, group in enumerate(groups):
            walk = self._walks[index] if index < len(self._walks) else None
            own = None
            if walk is not None and walk.module is group["params"]:
                own = walk.tensors()
            if own is None:
                own = self._walk(index, group["params"])
            known = self._entries[index]
            if all(map(_requires_grad, own)):
                entries += known
                params += own
                continue
            for entry, tensor in zip(known, own):
                if tensor.requires_grad:
                    entries.append(entry)
                    params.append(tensor)
                else:
                    self.frozen.setdefault(index, set()).add(entry.name)
        return entries, params

    def modules(self, networks: Sequence[nn.Module]) -> list[nn.Module]:
        """Return networks and their sub-modules, each once."""
        if len(networks) == len(self._walks) == 1:
            walk = self._walks[0]
            if walk.module is networks[0] and walk.has_same_modules():
                return walk.modules
        return list({id(m): m for network in networks for m in modules_of(network)}.values())

    @property
    def count(self) -> int:
        """How many networks have been walked over."""
        return len(self._walks)

    def add(self, walk: ParameterWalk) -> None:
        """Take the walk over the next group's network, made already."""
        index = len(self._walks)
        self._walks.append(walk)
        self._entries.append([Entry(index, site.name, site) for site in walk.sites])

    def _walk(self, index: int, module: Any) -> list[Tensor]:
        walk = ParameterWalk(module)
        del self._walks[index:], self._entries[index:]
        self.add(walk)
        return [site.tensor for site in walk.sites]


def _entries(tree: Mapping[str, Any]) -> list[Any]:
    """Return names and values, one after the other, and where they end."""
    return [*tree, *tree.values(), None]


def _is_steady(value: Any) -> bool:
    """Whether a hyperparameter is one that is the same at the next step if it is the same object.

    Or holds the same objects, if it is a dict.
    """
    if type(value) is dict:
        return all(is_plain(x) or isinstance(x, Tensor) for x in value.values())
    if type(value) is tuple:
        return all(is_plain(x) or isinstance(x, Tensor) for x in value)
    return is_plain(value) or isinstance(value, Tensor)


class Steady:
    """The hyperparameters and the slots of a step whose next one may be like it.

    Args:
        group: The only group of the optimizer.
        rows: Its hyperparameters, of each parameter.
        names: The names of the parameters.
        packing: How the slots are packed.
        absent: Slots that no parameter has, as the state keeps them.
    """

    def __init__(
        self,
        group: dict[str, Any],
        rows: list[dict[str, Any]],
        names: tuple[str, ...],
        packing: Packing,
        absent: dict[str, Any],
    ) -> None:
        self.rows, self.names, self.packing, self.absent = rows, names, packing, absent
        self._fields = list(rows[0])
        self._values = [group[name] for name in self._fields]
        # what may get other entries by name; the tensors in it are read at each step
        self._trees = [(v, _entries(v)) for v in self._values if isinstance(v, Mapping)]
        self._initial: dict[str, Any] = {}  # the slots of parameters like those in known
        self._known = KnownSignatures()

    @classmethod
    def after(
        cls, groups: Sequence[dict[str, Any]], call: Call, slots: Mapping[str, Any]
    ) -> Steady | None:
        """Return what a step found out; ``None`` if the next one must look again.

        Numbers cannot change behind our back, and entries of a tensor are read again; a schedule
        can.
        """
        if not call.pack_slots or call.packing is None or type(None) in map(type, call.g):
            return None
        if call.t.count(call.t[0]) != len(call.t):
            return None  # some have missed a step
        row = call.hyper[0]
        if not all(name in groups[0] and _is_steady(groups[0][name]) for name in row):
            return None  # a counter, which is another number at each step, or a schedule
        names = tuple(call.names())
        absent = {slot: c for slot, c in slots.items() if type(c) is not Packed}
        if any(value is not None for column in absent.values() for value in column):
            return None
        absent = {slot: dict.fromkeys(names) for slot in absent}
        return cls(groups[0], call.hyper, names, call.packing, absent)

    def call(
        self,
        tx: GradientTransformation,
        groups: Sequence[dict[str, Any]],
        states: Sequence[GroupState],
        entries: Sequence[Entry],
        params: list[Tensor],
        grads: list[Any],
    ) -> Call | None:
        """Return the call of the next step, or ``None`` if something differs."""
        names = self.names
        if len(groups) != 1 or len(entries) != len(names) or type(None) in map(type, grads):
            return None
        if not all(map(operator.is_, map(groups[0].get, self._fields), self._values)):
            return None
        if not all(all(map(operator.is_, _entries(v), known)) for v, known in self._trees):
            return None
        if not all(map(operator.eq, names, map(_name_of, entries))):
            return None
        if list(map(_shape_of, params)) != self.packing.shapes:
            return None
        known = states[0].steps
        counts = set(known.values()) or {0}
        step = counts.pop()
        if counts or (known and len(known) != len(names)):
            return None
        reference = dict(zip(names, params))
        call = Call(
            grads, params, [step + 1] * len(params), {}, self.rows, lambda: names, reference
        )
        call.pack_slots, call.packing = True, self.packing
        if not known:  # a count of 0 may come with slots that somebody gave
            fresh = self._fresh_slots(tx, call)
            call.slots = fresh or {}
            return None if fresh is None else call
        slots: dict[str, Any] = {}
        for slot, column in states[0].slots.items():
            if slot in self.absent:
                if column is not self.absent[slot]:
                    return None
                slots[slot] = [None] * len(names)
            elif type(column) is not PackedDict or column.names is not names:
                return None
            else:
                slots[slot] = column.packed
        call.slots = slots
        return call

    def _fresh_slots(self, tx: GradientTransformation, call: Call) -> dict[str, Any] | None:
        """Return the slots of a first step; the numbers that they are have no memory to share."""
        if self._known.knows(call.p):
            return {
                slot: column.unread() if type(column) is Packed else column
                for slot, column in self._initial.items()
            }
        slots = initialise_packed(tx, call, self.packing)
        if slots is None or {slot for slot, c in slots.items() if type(c) is not Packed} != set(
            self.absent
        ):
            return None
        if tx.plan.constant:
            self._initial = slots
            self._known.add(call.p)
        return slots

    def next_state(self, call: Call, slots: dict[str, Any], track: bool) -> GroupState | None:
        """Return the state after a step, ``None`` if the slots are no longer packed."""
        columns = dict(self.absent)
        for slot, column in slots.items():
            if slot not in columns:
                if type(column) is not Packed:
                    return None
                columns[slot] = PackedDict(self.names, column if track else column.detach())
        return GroupState(dict.fromkeys(self.names, int(call.t[0])), columns)
