"""Rules of one tensor over many small tensors of one shape: as a batch, by one ``vmap``.

A step of Adafactor over a hundred small matrices is some two thousand calls of small operations.
Stacked they are some thirty. Where a derivative is recorded nothing is stacked: what the loss does
not depend on would be joined to what it depends on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchopt.base.distributed import is_spread
from torchopt.base.torch_internals import in_forward_mode, peek_interpreter_stack
from torchopt.core.engine import Leaves


#: Fewer tensors than these are quicker one by one, and so are larger ones, which stacking copies.
LEAST_TENSORS = 4
MOST_ENTRIES = 1 << 14

Result = tuple[Tensor, tuple[Any, ...]]


def batches(leaves: Leaves) -> list[list[int]]:
    """Return the positions of tensors that one batch may take; none where that is no gain."""
    if len(leaves.g) < LEAST_TENSORS or torch.compiler.is_compiling():
        return []
    if torch.is_grad_enabled() or in_forward_mode() or peek_interpreter_stack() is not None:
        return []
    rows = {id(row): row for row in leaves.hyper}
    learned = {key for key, row in rows.items() if any(map(_has_tensor, row.values()))}
    columns = [leaves.g, leaves.p, *zip(*leaves.slots)]
    kinds = zip(*([_kind(x) for x in column] for column in columns))
    groups: dict[Any, list[int]] = {}
    for k, (kind, t, row) in enumerate(zip(kinds, leaves.t, leaves.hyper)):
        if type(t) is int and id(row) not in learned:
            groups.setdefault((kind, t, id(row)), []).append(k)
    return [
        positions
        for positions in groups.values()
        if len(positions) >= LEAST_TENSORS and _is_small(leaves.g[positions[0]])
    ]


def in_one_batch(
    rule: Callable[..., Result], leaves: Leaves, positions: Sequence[int]
) -> list[Result]:
    """Return what a rule returns for each of these positions, computed at once."""
    first = positions[0]
    t, row = leaves.t[first], leaves.hyper[first]
    columns = zip(*((leaves.g[k], leaves.p[k], *leaves.slots[k]) for k in positions))
    stacked = [None if c[0] is None else torch.stack(c) for c in columns]
    given = [x is not None for x in stacked]
    kept: list[bool] = []

    def of_one(*tensors: Tensor) -> tuple[Tensor, ...]:
        left = iter(tensors)
        g, p, *slots = [next(left) if there else None for there in given]
        update, new = rule(g, p, t, tuple(slots), **row)
        kept[:] = [x is not None for x in new]
        return (update, *(x for x in new if x is not None))

    results = torch.func.vmap(of_one)(*(x for x in stacked if x is not None))
    updates, *columns = (x.unbind() for x in results)
    rest = iter(columns)
    new = [next(rest) if there else (None,) * len(positions) for there in kept]
    return list(zip(updates, zip(*new) if new else [()] * len(positions)))


def _has_tensor(value: Any) -> bool:
    if isinstance(value, tuple):
        return any(map(_has_tensor, value))
    return isinstance(value, Tensor)


def _kind(x: Any) -> Any:
    return x if x is None else (x.shape, x.dtype, x.device, x.layout)


def _is_small(g: Tensor) -> bool:
    return g.numel() <= MOST_ENTRIES and g.layout == torch.strided and not is_spread(g)
