"""Where the parts of a transformation find what is theirs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torchopt.base import misuse, tree


class Plan:
    """Where each part of a transformation finds its hyperparameters and slots by public name.

    A plan is equal to itself only: said here, because torch.compile takes it as a constant.
    """

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = tuple(parts)
        self.hyper_specs: dict[str, Any] = {}
        self.values: dict[str, Any] = {}
        self.slot_names: tuple[str, ...] = ()
        self.optional_slots: set[str] = set()
        self.fields: list[dict[str, str]] = []
        self.slots: list[tuple[str, ...]] = []
        #: Slots that are one tree for all parameters: whose they are, and under which masks.
        self.whole: dict[str, tuple[Any, tuple[Any, ...]]] = {}
        for part in self.parts:
            specs = part.hyper_specs()
            fields = {name: _free_name(name, self.hyper_specs) for name in specs}
            self.hyper_specs.update({fields[name]: spec for name, spec in specs.items()})
            names = tuple(_free_name(name, self.slot_names) for name in part.slot_names())
            self.fields.append(fields)
            self.slots.append(names)
            self.slot_names += names
            values = part.hyperparameters()
            self.values.update({fields[name]: values[name] for name in specs})
            own = part.slot_names()
            whole = part.whole_slots()
            self.whole.update({n: whole[slot] for n, slot in zip(names, own) if slot in whole})
            self.optional_slots |= {n for n, slot in zip(names, own) if slot in part.optional_slots}

    def check_slots(self, given: Iterable[str], owner: object) -> None:
        """Refuse a state that another transformation has made.

        Raises:
            ValueError: Naming the slots that are unknown or missing.
        """
        names = set(given)
        unknown = sorted(names - set(self.slot_names))
        missing = [n for n in self.slot_names if n not in names and n not in self.optional_slots]
        if unknown or missing:
            what = f"has {unknown}" if unknown else f"lacks {missing}"
            raise ValueError(
                f"The state belongs to another optimizer: it {what}, while "
                f"{misuse.clipped(str(owner))} keeps {list(self.slot_names)}."
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


def _free_name(name: str, taken: Any) -> str:
    candidate, occurrence = name, 1
    while candidate in taken:
        occurrence += 1
        candidate = f"{name}_{occurrence}"
    return candidate
