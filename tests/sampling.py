"""Which of many combinations ``make test`` runs; ``make test-all`` runs all of them.

``@pytest.mark.sampled(n)`` beside several ``parametrize`` keeps about one of ``n`` combinations,
spread so that every value of every parameter (every optimizer, every law) is among them. The rest
is marked ``thorough``, which ``pyproject.toml`` leaves out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest


def kept(combinations: Sequence[dict[str, int]], n: int) -> set[int]:
    """Return which combinations of positions to keep: the diagonals, and what they leave out."""
    chosen = {k for k, indices in enumerate(combinations) if sum(indices.values()) % n == 0}
    seen = {item for k in chosen for item in combinations[k].items()}
    for k, indices in enumerate(combinations):
        if not seen.issuperset(indices.items()):
            chosen.add(k)
            seen.update(indices.items())
    return chosen


def positions(combinations: Sequence[dict[str, Any]]) -> list[dict[str, int]]:
    """Return the position of every value among those of its parameter, in order of appearance."""
    known: dict[str, dict[int, int]] = {}
    return [
        {
            name: known.setdefault(name, {}).setdefault(id(value), len(known[name]))
            for name, value in combination.items()
        }
        for combination in combinations
    ]


def mark_thorough(items: Sequence[Any]) -> None:
    """Mark what ``make test`` leaves out."""
    tests: dict[Any, list[Any]] = {}
    for item in items:
        if item.get_closest_marker("sampled") is not None:
            tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for group in tests.values():
        (n,) = group[0].get_closest_marker("sampled").args
        keep = kept(positions([item.callspec.params for item in group]), n)
        for k, item in enumerate(group):
            if k not in keep:
                item.add_marker(pytest.mark.thorough)
