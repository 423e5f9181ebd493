"""Tensors that are spread over processes (``DTensor``): what a rule of a whole tensor asks of them.

Most operations are right for them as they are, and so are most rules. Nothing here imports
``torch.distributed.tensor``: that a tensor is spread is told by what it has.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def is_spread(x: Any) -> bool:
    """Whether something is a tensor that is spread over processes."""
    return type(x) is not Tensor and hasattr(type(x), "full_tensor")


def any_spread(tensors: Iterable[Any]) -> bool:
    """Whether a tensor among several is."""
    return any(hasattr(t, "full_tensor") for t in set(map(type, tensors)))


def whole(x: Any) -> Any:
    """Return a tensor as every process can have it; what is no ``DTensor`` as it is.

    Of a 0-d one: plain and distributed tensors, or those of two meshes, cannot be added otherwise.
    """
    return x.full_tensor() if is_spread(x) else x


def spread_as(x: Tensor, like: Any) -> Tensor:
    """Return a tensor of which each process keeps the part that it has of another one.

    Of a tensor that all processes have nothing is sent for it.
    """
    if not is_spread(like):
        return x
    if not is_spread(x):
        x = type(like).from_local(x, like.device_mesh)  # replicated, if not told otherwise
    return x if x.placements == like.placements else x.redistribute(placements=like.placements)  # pyright: ignore


def placed(x: Any, like: Any) -> Any:
    """Return a result of a rule spread as the gradient is, and anything else as a state may be.

    A rule leaves results where they fall: sums that are still to be added up, which cannot be
    saved, and single rows that all processes have, which cannot be added to those that one has.
    """
    if not is_spread(like) or not isinstance(x, Tensor):
        return x
    if x.shape == like.shape:
        return spread_as(x, like)
    if is_spread(x) and any(p.is_partial() for p in x.placements):  # pyright: ignore
        return type(like).from_local(whole(x), like.device_mesh)
    return x


def greatest(x: Tensor) -> Tensor:
    """Return the largest absolute value of a tensor, 0-d and the same on every process.

    A process may have no entry of it, and no maximum by itself; and a ``nan`` of any is one of all.
    """
    if not is_spread(x) or (torch.is_grad_enabled() and x.requires_grad):
        return whole(x.abs().max())
    spread: Any = x
    own = spread.to_local()
    found = own.abs().max() if own.numel() else own.new_zeros(()).abs()
    for dimension in range(spread.device_mesh.ndim):
        several = [torch.empty_like(found) for _ in range(spread.device_mesh.size(dimension))]
        group = spread.device_mesh.get_group(dimension)
        torch.distributed.all_gather(several, found, group=group)
        found = torch.stack(several).max()
    return found


def mean_of_processes(value: Any, tensors: Iterable[Any]) -> Any:
    """Return the mean of a number over the processes that the first spread tensor is on.

    Of a loss each process has that of its own part of a batch, and gradients are those of the mean.
    A number that all have in common stays as it is, and so does any where no tensor is spread.
    """
    like = next(filter(is_spread, tensors), None)
    if like is None:
        return value
    dtype = value.dtype if isinstance(value, Tensor) else torch.float64
    total = torch.as_tensor(whole(value), dtype=dtype).detach().to(device=like.device, copy=True)
    for dimension in range(like.device_mesh.ndim):
        torch.distributed.all_reduce(total, group=like.device_mesh.get_group(dimension))
    return total / like.device_mesh.size()
