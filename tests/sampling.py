"""Which of many combinations ``make test`` runs; ``make test-all`` runs all of them.

``@pytest.mark.sampled(n)`` beside several ``parametrize`` keeps about one of ``n`` combinations,
spread so that every value of every parameter (every optimizer, every law) is among them. The rest
is marked ``thorough``, which ``pyproject.toml`` leaves out.

So that a table of forty optimizers does not take ten times as long as one of four, values with a
``kind`` (the rows of ``cases.py``) are sampled in two ways: of the first of each kind about one of
``n`` combinations is kept, of every other row ``each`` (one), not the same for all. With
``by="family"`` rows are alike more easily.

Laws of the library's mechanisms are thinned without a mark, too: of a row that is not the first of
its family every fourth law takes one combination, every twelfth if it has one only, not the same
ones for all rows. Laws of what a row says itself (values, derivatives, bounds) are ``complete``.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
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


def followers(combinations: Sequence[dict[str, Any]], name: str = "kind") -> dict[int, list[int]]:
    """Return which combinations hold a value that is not the first of its kind, by that value."""
    first: dict[Any, Any] = {}
    found: dict[int, list[int]] = {}
    for k, combination in enumerate(combinations):
        for value in combination.values():
            kind = getattr(value, name, None)
            if kind is not None and first.setdefault(kind, value) is not value:
                found.setdefault(id(value), []).append(k)
    return found


def some(members: Sequence[int], turn: int, each: int) -> list[int]:
    """Return ``each`` members at equal distances, others at every turn."""
    each = min(each, len(members))
    return [members[(turn + j * len(members) // each) % len(members)] for j in range(each)]


def sample(
    combinations: Sequence[dict[str, Any]], n: int, each: int = 1, by: str = "kind"
) -> set[int]:
    """Return which combinations of values to keep; ``by`` says what makes rows alike."""
    behind = followers(combinations, by)
    aside = {k for members in behind.values() for k in members}
    ahead = [k for k in range(len(combinations)) if k not in aside]
    chosen = {ahead[k] for k in kept(positions([combinations[k] for k in ahead]), n)}
    for turn, members in enumerate(behind.values()):
        chosen.update(some(members, turn, each))
    return chosen


def thinned(combinations: Sequence[dict[str, Any]], start: int) -> set[int]:
    """Return which combinations of a law without a mark to keep; laws start at different rows."""
    behind = followers(combinations, "family")
    chosen = set(range(len(combinations))) - {k for members in behind.values() for k in members}
    for turn, members in enumerate(behind.values(), start):
        if turn % (4 if len(members) > 1 else 12) == 0:
            chosen.update(some(members, turn, 1))
    return chosen


def mark_thorough(name: str, calls: Sequence[Any], marker_of: Callable[[str], Any]) -> None:
    """Mark the combinations of one test that ``make test`` leaves out.

    Args:
        name: The test's, by which laws start at different rows.
        calls: Combinations, each with ``params`` and a list ``marks``. Values of those that are
            marked already are not covered by them.
        marker_of: Returns the test's own marker of a name, or ``None``.
    """
    group = [call for call in calls if not is_thorough(call)]
    marker = marker_of("sampled")
    if marker is None and marker_of("complete") is not None:
        return
    given = [call.params for call in group]
    if marker is not None:
        keep = sample(given, *marker.args, **marker.kwargs)
    else:
        keep = thinned(given, zlib.crc32(name.encode()))
    for k, call in enumerate(group):
        if k not in keep:
            call.marks.append(pytest.mark.thorough.mark)


def is_thorough(call: Any) -> bool:
    """Whether a combination is left out by ``make test``."""
    return any(mark.name == "thorough" for mark in call.marks)
