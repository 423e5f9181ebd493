"""The sample that ``make test`` runs has every value of every parameter."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
from sampling import kept, mark_thorough, positions, sample


class Row:
    """A row of a table that is like others of its kind."""

    def __init__(self, kind: int) -> None:
        self.kind = kind


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("lengths", [(9,), (9, 3), (2, 2), (4, 3, 5, 1), (1, 1)], ids=str)
def test_every_value_is_kept(lengths: tuple[int, ...], n: int) -> None:
    names = "abcd"[: len(lengths)]
    products = itertools.product(*map(range, lengths))
    values = [[object() for _ in range(length)] for length in lengths]
    given = [dict(zip(names, map(list.__getitem__, values, indices))) for indices in products]
    combinations = positions(given)
    chosen = [combinations[k] for k in kept(combinations, n)]
    for name, length in zip(names, lengths):
        assert {indices[name] for indices in chosen} == set(range(length))
    assert len(chosen) <= len(combinations) / n + sum(lengths)
    if n == 1:
        assert len(chosen) == len(combinations)


@pytest.mark.parametrize("each", [1, 3])
@pytest.mark.parametrize("rows", [4, 40, 80])
def test_a_longer_table_takes_each_times_as_long(rows: int, each: int) -> None:
    """Of every row that is not the first of its kind ``each`` are kept, and all laws are seen."""
    table = [Row(k % 4) for k in range(rows)]
    laws = [object() for _ in range(6)]
    given: list[dict[str, Any]] = [
        {"case": row, "law": law} for law, row in itertools.product(laws, table)
    ]
    chosen = [given[k] for k in sample(given, 2, each)]
    counts = Counter(id(combination["case"]) for combination in chosen)
    assert [counts[id(row)] for row in table[4:]] == [each] * (rows - 4)
    assert sum(counts[id(row)] for row in table[:4]) == 4 * len(laws) / 2
    later = [combination["law"] for combination in chosen if combination["case"] in table[4:]]
    assert rows == 4 or set(map(id, later)) == set(map(id, laws))


class Item:
    """What a test of two parameters is to the sampling."""

    def __init__(self, law: object, row: object, left_out: bool) -> None:
        self.nodeid, self.callspec = "test_law[...]", self
        self.params = {"law": law, "row": row}
        self.marks = {"sampled": pytest.mark.sampled(2).mark}
        if left_out:
            self.add_marker(pytest.mark.thorough)

    def get_closest_marker(self, name: str) -> Any:
        return self.marks.get(name)

    def add_marker(self, marker: pytest.MarkDecorator) -> None:
        self.marks[marker.name] = marker.mark


def test_what_is_left_out_anyway_covers_no_value() -> None:
    """Every law is kept, although half of the rows are for ``make test-all`` only."""
    laws, rows = [object() for _ in range(3)], [object() for _ in range(4)]
    items = [Item(law, row, k % 2 == 0) for law in laws for k, row in enumerate(rows)]
    mark_thorough(items)
    left = [item for item in items if "thorough" not in item.marks]
    assert {id(item.params["law"]) for item in left} == set(map(id, laws))
    assert {id(item.params["row"]) for item in left} == {id(rows[1]), id(rows[3])}
    assert len(left) < 6
