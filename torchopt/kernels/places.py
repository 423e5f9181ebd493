"""Where the tensors of several parameters stand in the flat lists that nodes of the graph take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from torchopt.core.packed import Packing
from torchopt.core.unpacking import marked, packed, unpacked


#: A operand, and the row of the parameter; ``ALL`` for a flat tensor of all parameters.
Place = tuple[str, int]
ALL = -1


def places(operands: Sequence[str], count: int, flat: frozenset[str]) -> list[Place]:
    """Return the places of all tensors of some operands; those in ``flat`` are one tensor each."""
    return [
        (operand, row)
        for operand in operands
        for row in ((ALL,) if operand in flat else range(count))
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
    for (operand, row), x in zip(at, tensors):
        if x is None:
            continue
        if row != ALL:
            found[operand, row] = x
            continue
        parts = marked(x)
        for k, part in enumerate(unpacked(x, packing)):
            if parts is None or k in parts:
                found[operand, k] = part
    return found


def collected(
    at: Sequence[Place], found: Mapping[Place, Any], packing: Packing | None
) -> list[Tensor | None]:
    """Return the tensors in the order of their places, ``None`` where there is none."""
    return [
        found.get((operand, row))
        if row != ALL or packing is None
        else packed([found.get((operand, k)) for k in range(len(packing.sizes))], packing)
        for operand, row in at
    ]
