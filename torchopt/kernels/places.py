"""Where the tensors of several parameters stand in the flat lists that nodes of the graph take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from torchopt.core.packed import Packing
from torchopt.core.unpacking import marked, packed, unpacked


#: A stream, and the row of the parameter; ``ALL`` for a flat tensor of all parameters.
Place = tuple[str, int]
ALL = -1


def places(streams: Sequence[str], count: int, flat: frozenset[str]) -> list[Place]:
    """Return the places of all tensors of some streams, those in ``flat`` being one tensor each."""
    return [
        (stream, row) for stream in streams for row in ((ALL,) if stream in flat else range(count))
    ]


def rows_given(at: Sequence[Place], tensors: Sequence[Tensor | None], count: int) -> list[int]:
    """Return the rows of which there is any tensor."""
    rows: set[int] = set()
    for (_, row), x in zip(at, tensors):
        if x is None:
            continue
        if row != ALL:
            rows.add(row)
            continue
        parts = marked(x)
        if parts is None:
            return list(range(count))
        rows |= parts
    return sorted(rows)


def spread(
    at: Sequence[Place], tensors: Sequence[Tensor | None], packing: Packing | None
) -> dict[Place, Tensor]:
    """Return the tensors that there are by place, flat ones taken apart."""
    found: dict[Place, Tensor] = {}
    for (stream, row), x in zip(at, tensors):
        if x is None:
            continue
        if row != ALL:
            found[stream, row] = x
            continue
        parts = marked(x)
        for k, part in enumerate(unpacked(x, packing)):
            if parts is None or k in parts:
                found[stream, k] = part
    return found


def collected(
    at: Sequence[Place], found: Mapping[Place, Any], packing: Packing | None
) -> list[Tensor | None]:
    """Return the tensors in the order of their places, ``None`` where there is none."""
    return [
        found.get((stream, row))
        if row != ALL or packing is None
        else packed([found.get((stream, k)) for k in range(len(packing.sizes))], packing)
        for stream, row in at
    ]
