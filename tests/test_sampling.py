"""The sample that ``make test`` runs has every value of every parameter."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from sampling import is_thorough, kept, mark_thorough, positions, sample


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


class Call:
    """What a combination of two values is to the sampling."""

    def __init__(self, law: object, row: object, left_out: bool) -> None:
        self.params = {"law": law, "row": row}
        self.marks = [pytest.mark.thorough.mark] if left_out else []


def test_what_is_left_out_anyway_covers_no_value() -> None:
    """Every law is kept, although half of the rows are for ``make test-all`` only."""
    laws, rows = [object() for _ in range(3)], [object() for _ in range(4)]
    calls = [Call(law, row, k % 2 == 0) for law in laws for k, row in enumerate(rows)]
    mark_thorough("test_law", calls, {"sampled": pytest.mark.sampled(2).mark}.get)
    left = [call for call in calls if not is_thorough(call)]
    assert {id(call.params["law"]) for call in left} == set(map(id, laws))
    assert {id(call.params["row"]) for call in left} == {id(rows[1]), id(rows[3])}
    assert len(left) < 6


def test_a_run_by_default_and_one_of_everything_know_the_same_tests(
    pytester: pytest.Pytester,
) -> None:
    folder = Path(__file__).parent
    for name in ("sampling.py", "conftest.py"):
        pytester.makepyfile(**{name[:-3]: (folder / name).read_text(encoding="utf-8")})
    pytester.makeini(
        "[pytest]\naddopts = -m 'not thorough'\nmarkers =\n thorough\n sampled(n)\n complete"
    )
    pytester.makepyfile(
        test_it="""
        import pytest

        @pytest.mark.sampled(3)
        @pytest.mark.parametrize("a", range(6))
        @pytest.mark.parametrize("b", range(5))
        def test_sampled(a, b): pass

        @pytest.mark.thorough
        @pytest.mark.parametrize("a", range(4))
        def test_left_out(a): pass

        @pytest.mark.parametrize("a", [pytest.param(1, marks=pytest.mark.thorough)])
        def test_left_out_by_its_only_value(a): pass

        def test_plain(): pass
        """
    )
    by_default = names_of(pytester.runpytest("--collect-only", "-q"))
    sampled = {name for name in by_default if "test_sampled" in name}
    assert by_default - sampled == {"test_it.py::test_plain"}
    assert {name.partition("[")[2].rstrip("]").split("-")[0] for name in sampled} == {*"01234"}
    every = names_of(pytester.runpytest("--collect-only", "-q", "-m", ""))
    assert len(every) == 30 + 4 + 1 + 1
    assert sampled < every
    assert names_of(pytester.runpytest("--collect-only", "-q", "-m", "not thorough and sampled"))
    others = pytester.runpytest("--collect-only", "-q", "-m", "thorough")
    assert names_of(others) == every - by_default


def names_of(result: pytest.RunResult) -> set[str]:
    """Return the ids that ``--collect-only`` printed."""
    return {line for line in result.outlines if line.startswith("test_it.py::")}
