"""What a differentiable step asks the engine for, and the state after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torchopt.core import hyper, resolving
from torchopt.core.engine import Call, packs
from torchopt.core.gather import Members, gather
from torchopt.core.packed import Packed, PackedDict, Packing
from torchopt.core.plan import Plan
from torchopt.core.transform import GradientTransformation
from torchopt.nn.parameters import named_places
from torchopt.optim.meta_state import GroupState
from torchopt.optim.steady import Entry


def known_names(module: nn.Module) -> resolving.Known:
    """Return the names of all parameters of a network, and the further ones of tied weights."""
    names: dict[int, str] = {}
    others: dict[str, list[str]] = {}
    for name, _, _, tensor in named_places(module, "_parameters"):
        if id(tensor) in names:
            others.setdefault(names[id(tensor)], []).append(name)
        names.setdefault(id(tensor), name)
    return resolving.Known(list(names.values()), others)


def names_of(groups: Sequence[dict[str, Any]], entries: Sequence[Entry]) -> list[str]:
    """Return names of parameters, with the number of the group if there are several."""
    single = len(groups) == 1
    return [entry.name if single else f"{entry.group}.{entry.name}" for entry in entries]


def known_of_all(groups: Sequence[dict[str, Any]]) -> resolving.Known:
    """Return the names of all parameters of all networks, as masks see them."""
    if len(groups) == 1:
        return known_names(groups[0]["params"])
    names: list[str] = []
    others: dict[str, list[str]] = {}
    for index, group in enumerate(groups):
        known = known_names(group["params"])
        names += [f"{index}.{name}" for name in known.names]
        others.update(
            {f"{index}.{n}": [f"{index}.{o}" for o in more] for n, more in known.others.items()}
        )
    return resolving.Known(names, others)


def new_call(
    tx: GradientTransformation,
    groups: Sequence[dict[str, Any]],
    states: Sequence[GroupState],
    entries: Sequence[Entry],
    params: list[Tensor],
    grads: list[Any],
) -> Call:
    """Gather a step of which nothing is known."""
    plan = tx.plan
    states = _without_reshaped(plan, states, entries, params)
    known = [state.steps for state in states]
    single = len(groups) == 1
    names = names_of(groups, entries)
    before = [known[entry.group].get(entry.name, 0) for entry in entries]
    members = []
    for index, group in enumerate(groups):
        for name, spec in plan.hyper_specs.items():
            hyper.check(name, group[name], spec)  # they may have been changed since
        own = [k for k, entry in enumerate(entries) if entry.group == index]
        own_names = [entries[k].name for k in own]
        count = max((before[k] for k in own), default=0)
        around = partial(known_names, group["params"])
        own_params = [params[k] for k in own]
        members.append(Members(group, own_params, lambda n=own_names: n, count, around))
    reference = dict(zip(names, params))
    slots: dict[str, Any] = {}
    call = Call(grads, params, [n + 1 for n in before], slots, [], lambda: names, reference)
    call.known = members[0].known if single else partial(known_of_all, groups)
    fresh = [entry.name not in known[entry.group] for entry in entries]
    # what is packed is contiguous, and so is what a kernel computes with it; a kernel would pack
    # the pairs of reals that it sees of complex numbers
    dense = all(map(Tensor.is_contiguous, params)) and not any(map(Tensor.is_complex, params))
    complete = single and (not known[0] or known[0].keys() == set(names))
    call.pack_slots = complete and dense and packs(plan)
    packed = states[0].packed_slots(names) if call.pack_slots and known[0] else {}
    if call.pack_slots:
        of_slots = next(iter(packed.values()), None)
        call.packing = Packing([p.shape for p in params]) if of_slots is None else of_slots.packing
    for slot in plan.slot_names:
        slots[slot] = packed.get(slot) or [
            states[entry.group].slots[slot].get(entry.name) for entry in entries
        ]
    counters = {
        n: [states[e.group].counters[n].get(e.name, c.start) for e in entries]
        for n, c in plan.counters.items()
    }
    return gather(tx, members, call, counters, fresh=fresh)


def _without_reshaped(
    plan: Plan, states: Sequence[GroupState], entries: Sequence[Entry], params: Sequence[Tensor]
) -> Sequence[GroupState]:
    """Leave out parameters of another shape than their slots: new ones under an old name."""
    kept = list(states)
    if not any(state.steps for state in states) and not any(map(_has_slots, states)):
        return kept
    for slot in plan.slot_names:
        shapes = [_shapes_of(state.slots[slot]) for state in states]
        for entry, param in zip(entries, params):
            shape = shapes[entry.group].get(entry.name)
            if shape is not None and shape != plan.slot_of[slot].shape_for(param):
                kept[entry.group] = kept[entry.group].without(entry.name)
    return kept


def _has_slots(state: GroupState) -> bool:
    return any(len(column) for column in state.slots.values())


def _shapes_of(column: Any) -> dict[str, torch.Size]:
    """Return the shapes of a slot by parameter name."""
    if type(column) is PackedDict:
        return dict(zip(column.names, column.packed.packing.shapes))
    return {name: x.shape for name, x in column.items() if x is not None}


def next_states(
    states: Sequence[GroupState],
    entries: Sequence[Entry],
    call: Call,
    slots: dict[str, list[Any]],
    track: bool,
    kept_at: Mapping[str, str],
) -> list[GroupState]:
    """Return the states after a step.

    ``track`` says whether slots keep their graph, ``kept_at`` where rows have the counters.
    """
    following = [
        GroupState(
            dict(state.steps),
            {
                slot: {} if isinstance(slots[slot], Packed) else dict(column)
                for slot, column in state.slots.items()
            },
            {counter: dict(column) for counter, column in state.counters.items()},
        )
        for state in states
    ]
    for k, entry in enumerate(entries):
        state = following[entry.group]
        step = call.t[k] if call.g[k] is not None else call.t[k] - 1
        state.steps[entry.name] = int(step)
        for counter, column in state.counters.items():
            if call.g[k] is not None:
                value = call.hyper[k][kept_at[counter]]
                cut = isinstance(value, Tensor) and not track
                column[entry.name] = value.detach() if cut else value
    names = tuple(entry.name for entry in entries)
    for slot, column in slots.items():
        if isinstance(column, Packed) and len(names) == len(column):
            kept = column if track else column.detach()
            following[0].slots[slot] = PackedDict(names, kept)
            continue
        for entry, value in zip(entries, column):
            kept = value if track or value is None else value.detach()
            following[entry.group].slots[slot][entry.name] = kept
    return following
