"""The state of an optimizer part by part, as TorchOpt 0.7.3 showed it: a tuple of named tuples.

An :class:`~torchopt.OptState` keeps its slots by name. Scripts for 0.7.3 write ``state[0].mu``,
``state[-1].count`` or ``tuple(detached(part) for part in state)``; this is what they get, and a
tuple of such parts is accepted as a state. The named tuples have the names that 0.7.3 gave them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torchopt.base.values import same
from torchopt.typing import PyTree, TensorTree


class EmptyState(NamedTuple):
    """The state of what needs none."""


class UninitializedState(NamedTuple):
    """No state yet."""


class ScaleByAdamState(NamedTuple):
    """The moments of Adam and the step count."""

    mu: TensorTree
    nu: TensorTree
    count: PyTree


class ScaleByRmsState(NamedTuple):
    """The second moment of RMSprop."""

    nu: TensorTree


class ScaleByRStdDevState(NamedTuple):
    """The moments of centered RMSprop."""

    mu: TensorTree
    nu: TensorTree


class ScaleByRssState(NamedTuple):
    """The sum of squares of Adagrad."""

    sum_of_squares: TensorTree


class TraceState(NamedTuple):
    """The buffer of momentum."""

    trace: TensorTree


class ScaleByScheduleState(NamedTuple):
    """The step count."""

    count: PyTree


#: Which slots make up which part; the first whose slots are all there is taken.
_PARTS: tuple[tuple[Any, dict[str, str]], ...] = (
    (ScaleByAdamState, {"mu": "exp_avg", "nu": "exp_avg_sq"}),
    (ScaleByRStdDevState, {"mu": "grad_avg", "nu": "square_avg"}),
    (ScaleByRmsState, {"nu": "square_avg"}),
    (ScaleByRssState, {"sum_of_squares": "sum"}),
    (TraceState, {"trace": "momentum_buffer"}),
)


def parts_of(step: PyTree, slots: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return a state as a tuple of parts: one for each rule with slots, and the step count.

    Slots that 0.7.3 did not have are a dict.
    """
    left = dict(slots)
    parts: list[Any] = []
    while left:
        name = next(iter(left))
        base, suffix = _without_suffix(name)
        for kind, fields in _PARTS:
            names = {field: slot + suffix for field, slot in fields.items()}
            if base in fields.values() and all(slot in left for slot in names.values()):
                values = {field: left.pop(slot) for field, slot in names.items()}
                counted = {"count": step} if "count" in kind._fields else {}
                parts.append(kind(**values, **counted))
                break
        else:
            parts.append({name: left.pop(name)})
    return (*parts, ScaleByScheduleState(step))


def joined(parts: Sequence[Any]) -> tuple[PyTree, dict[str, Any]] | None:
    """Return step count and slots of such a tuple; ``None`` if it is none.

    Raises:
        ValueError: If two parts have different step counts.
    """
    if not parts:
        return None
    counts: list[PyTree] = []
    slots: dict[str, Any] = {}
    for part in _flattened(parts):
        if isinstance(part, dict):
            slots.update(part)
            continue
        kinds = [fields for kind, fields in _PARTS if isinstance(part, kind)]
        if not kinds and not isinstance(part, (EmptyState, ScaleByScheduleState)):
            return None
        for field, slot in (kinds[0] if kinds else {}).items():
            slots[_free_name(slot, slots)] = getattr(part, field)
        if isinstance(part, (ScaleByAdamState, ScaleByScheduleState)):
            counts.append(part.count)
    if any(not same(count, counts[0]) for count in counts[1:]):
        raise ValueError(
            f"The parts of the state have different step counts: {counts}. A state has one count "
            "for all its parts."
        )
    return counts[0] if counts else 0, slots


def _flattened(parts: Sequence[Any]) -> list[Any]:
    found: list[Any] = []
    for part in parts:
        nested = isinstance(part, (tuple, list)) and not hasattr(part, "_fields")
        found += _flattened(part) if nested else [part]
    return found


def _without_suffix(name: str) -> tuple[str, str]:
    """Return a slot's name without the ``_2`` of its second occurrence in a chain, and that."""
    base, underscore, number = name.rpartition("_")
    return (base, underscore + number) if base and number.isdigit() else (name, "")


def _free_name(name: str, taken: Mapping[str, Any]) -> str:
    candidate, occurrence = name, 1
    while candidate in taken:
        occurrence += 1
        candidate = f"{name}_{occurrence}"
    return candidate
