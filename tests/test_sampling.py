"""The sample that ``make test`` runs has every value of every parameter."""

from __future__ import annotations

import itertools

import pytest
from sampling import kept, positions


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
