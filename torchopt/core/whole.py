"""Slots that are one tree for all parameters: the states of pairs (:mod:`torchopt.core.pair`).

The engine knows slots with an entry for each parameter. A call takes these trees along beside them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torchopt.core.engine import Call
from torchopt.core.plan import Plan
from torchopt.core.protocols import TransformationLike
from torchopt.typing import PyTree


#: Where saved states, and ``Optimizer.state``, keep those of pairs beside the entries of the
#: parameters: torch.optim allows for other keys.
PAIRS = "pairs"


@dataclasses.dataclass
class PairState:
    """The state of one pair during a call, and the parameters that it is for (``None``: all)."""

    value: PyTree
    chosen: frozenset[int] | None


def begin(plan: Plan, states: Mapping[str, PyTree], call: Call) -> None:
    """Give a call the states of the pairs of a plan, made where there are none."""
    for name, (pair, masks) in plan.whole.items():
        chosen = None
        for mask in masks:
            kept = frozenset(i for i, taken in enumerate(mask(call)) if taken)
            chosen = kept if chosen is None else chosen & kept
        value = states[name] if name in states else pair.first_state(call, chosen)
        call.pairs[id(pair)] = PairState(value, chosen)


def end(plan: Plan, call: Call) -> dict[str, PyTree]:
    """Return the states of the pairs after a call, by the names of their slots."""
    return {name: call.pairs[id(pair)].value for name, (pair, _) in plan.whole.items()}


def split(plan: Plan, slots: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, PyTree]]:
    """Return the slots of parameters and the states of pairs apart."""
    own = {name: column for name, column in slots.items() if name not in plan.whole}
    return own, {name: value for name, value in slots.items() if name in plan.whole}


def check(plan: Plan, given: Any, owner: type) -> None:
    """Refuse the states of other pairs.

    Raises:
        ValueError: Naming the slots that were given and those that there are.
    """
    if not isinstance(given, Mapping) or (given and given.keys() != plan.whole.keys()):
        names = list(given) if isinstance(given, Mapping) else given
        raise ValueError(
            f"The state belongs to another optimizer: it has {names} for all parameters together, "
            f"{owner.__name__} has {list(plan.whole)}."
        )


def distinct(transformations: Sequence[Any]) -> list[Any]:
    """Return transformations of which no two share a pair, for each keeps a state of its own."""
    seen: set[int] = set()
    result = []
    for tx in transformations:
        if own := _pairs_of(tx):
            if own & seen:
                tx = tx.renewed()
                own = _pairs_of(tx)
            seen |= own
        result.append(tx)
    return result


def _pairs_of(tx: TransformationLike) -> set[int]:
    return {id(pair) for part in tx.parts for pair, _ in part.whole_slots().values()}


def taken_out(plan: Plan, saved: Any, owner: type) -> tuple[Any, dict[str, PyTree]]:
    """Return a saved state without the states of pairs, and those.

    Raises:
        ValueError: If they are those of other pairs.
    """
    entries = saved.get("state") if isinstance(saved, Mapping) else None
    if not isinstance(entries, Mapping) or PAIRS not in entries:
        return saved, {}
    pairs = entries[PAIRS]
    check(plan, pairs, owner)
    rest = {key: entry for key, entry in entries.items() if key != PAIRS}
    return {**saved, "state": rest}, dict(pairs)
