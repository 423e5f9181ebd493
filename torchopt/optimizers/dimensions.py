"""Tensors and the matrices that Shampoo and SOAP keep for them, one for each dimension."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Union

import torch
from torch import Tensor

from torchopt.core.slots import Slot


#: How many dimensions have a matrix of their own: of a tensor that has more, the last ones are one.
DIMENSIONS = 4


def sizes_of(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the sizes of the dimensions of a tensor as they are preconditioned.

    Example:
        >>> sizes_of((16, 8, 3, 3)), sizes_of((16, 8, 3, 3, 3)), sizes_of(())
        ((16, 8, 3, 3), (16, 8, 3, 9), (1,))
    """
    if len(shape) > DIMENSIONS:
        return (*shape[: DIMENSIONS - 1], math.prod(shape[DIMENSIONS - 1 :]))
    return tuple(shape) or (1,)


def for_dimensions(
    name: str,
    needed: Callable[..., bool],
    start: Union[float, Callable[..., Tensor]] = 0.0,
    square: bool = True,
) -> tuple[Slot, ...]:
    """Return the slots ``name_0``, ``name_1`` ...: a matrix, or a vector, for each dimension.

    Args:
        name: The name without the number of the dimension.
        needed: Whether a dimension has one: ``(size, among, **hyperparameters)``, of the size of
            the dimension and those of all of them.
        start: As for :class:`torchopt.Slot`; a function takes the size, too, after the parameter.
        square: ``False`` for a vector.
    """
    return tuple(
        Slot(
            f"{name}_{k}",
            start=functools.partial(_start, start, k) if callable(start) else start,
            shape=functools.partial(_shape, k, 2 if square else 1),
            when=functools.partial(_needed, needed, k),
        )
        for k in range(DIMENSIONS)
    )


def _start(start: Callable[..., Tensor], k: int, param: Tensor, **_: Any) -> Tensor:
    return start(param, sizes_of(param.shape)[k])


def _shape(k: int, dimensions: int, shape: torch.Size) -> tuple[int, ...]:
    return sizes_of(shape)[k : k + 1] * dimensions


def _needed(needed: Callable[..., bool], k: int, shape: torch.Size, **hyperparameters: Any) -> bool:
    sizes = sizes_of(shape)
    return k < len(sizes) and needed(sizes[k], sizes, **hyperparameters)


def identity(param: Tensor, size: int) -> Tensor:
    """Return the matrix that leaves a dimension as it is, as the start of a slot."""
    return torch.eye(size, dtype=param.dtype, device=param.device)


def by_dimension(slots: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """Return the slots of several :func:`for_dimensions`, those of a dimension together."""
    return list(zip(*(slots[k : k + DIMENSIONS] for k in range(0, len(slots), DIMENSIONS))))


def gram(g: Tensor, k: int) -> Tensor:
    """Return the inner products of the slices of a tensor along a dimension."""
    rows = g.movedim(k, 0).reshape(g.shape[k], -1)
    return rows @ rows.mT


def times(g: Tensor, matrix: Tensor, k: int) -> Tensor:
    """Return a tensor whose vectors along a dimension are multiplied by a matrix, from the left."""
    return (g.movedim(k, -1) @ matrix.mT).movedim(-1, k)


def is_due(t: Any, frequency: int) -> Any:
    """Whether something that is done at the first step, and each so many after it, is due."""
    return frequency == 1 or (t - 1) % frequency == 0
