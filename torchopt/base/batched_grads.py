"""``torch.autograd.grad(..., is_grads_batched=True)``, as ``vectorize=True`` asks for it.

The batches that it makes are of an older kind than those of ``torch.vmap``: no level of torch.func,
and no node that is recorded by hand can hold them. What such a node would be differentiated by is
lost without a word. So a backward pass maps these nodes over the batch by ``torch.vmap`` instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchopt.base.torch_internals import (
    add_legacy_batch_dim,
    is_legacy_batchedtensor,
    levels_of_batched_grads,
    outside_of_batched_grads,
    remove_legacy_batch_dim,
)


def has_batches(values: Iterable[Any]) -> bool:
    """Whether there is a batch of such a call among some values; the compiler has none."""
    return not torch.compiler.is_compiling() and any(
        isinstance(x, Tensor) and is_legacy_batchedtensor(x) for x in values
    )


def over_batches(
    function: Callable[..., Iterable[Tensor | None]], values: Sequence[Any]
) -> list[Any]:
    """Return ``function(*values)``, mapped over those values that are batches of such a call.

    Raises:
        NotImplementedError: If one of them is a batch of two such calls.
    """
    if not has_batches(values):
        return list(function(*values))
    level = levels_of_batched_grads()
    there: list[bool] = []

    def tensors(*given: Any) -> tuple[Tensor, ...]:
        found = list(function(*given))
        there[:] = [x is not None for x in found]
        return tuple(x for x in found if x is not None)

    dims = tuple(0 if has_batches([x]) else None for x in values)
    plain = [
        x if dim is None else remove_legacy_batch_dim(x, level, 1, 0)
        for x, dim in zip(values, dims)
    ]
    if has_batches(plain):
        raise NotImplementedError(
            "A derivative by is_grads_batched=True (vectorize=True) is taken of a batch of another "
            "such call: use torch.func.vmap for one of the two."
        )
    with outside_of_batched_grads():
        results = iter(torch.vmap(tensors, in_dims=dims)(*plain))
    return [add_legacy_batch_dim(next(results), 0, level) if t else None for t in there]
