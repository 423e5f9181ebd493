"""Where the tensors of a kernel call lie, and in which dtype each of its operands is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Union

import torch
from torch import Tensor

from torchopt.core.packed import Packed


#: Operands that have the dtype of the parameters; the others are float32 if that is half precision.
OF_PARAMETERS = frozenset({"g", "p", "u", "bar_u"})

#: One tensor of each parameter, ``None`` for zeros.
Column = Union[list[Any], Packed]


def addresses(tensors: Column) -> list[int]:
    """Return the address of every tensor, 0 for ``None``."""
    if isinstance(tensors, Packed):
        flat = tensors.flat
        return list(map(flat.data_ptr().__add__, tensors.packing.places(flat.element_size())))
    try:
        found = list(map(Tensor.data_ptr, tensors))  # pyright: ignore[reportArgumentType]
    except TypeError:
        found = [0 if x is None else x.data_ptr() for x in tensors]
    if 0 in found:
        for x, address in zip(tensors, found):
            # a kernel reads zeros there, which is right for autograd's zeros without memory only
            if x is not None and not address and x.numel() and not x._is_zerotensor():
                raise RuntimeError(
                    f"A tensor of shape {tuple(x.shape)} has no memory: its storage was resized "
                    "(untyped_storage().resize_). Give it its memory back before the update."
                )
    return found


def divided(starts: Sequence[int], sizes: Sequence[int], entry: int, pieces: int) -> list[int]:
    """Return the addresses of the pieces of tensors; ``sizes`` are those of the pieces."""
    return [
        start and start + piece * sizes[k * pieces] * entry
        for k, start in enumerate(starts)
        for piece in range(pieces)
    ]


def dtype_of(operand: str, own: torch.dtype) -> torch.dtype:
    """Return the dtype of a operand where parameters have the dtype ``own``."""
    return own if operand in OF_PARAMETERS else slot_dtype(own)


def slot_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the slots of a parameter, and of the arithmetic."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def narrow_mask(operands: Sequence[str]) -> int:
    """Return, as bits, which operands have the dtype of the parameters."""
    return sum(1 << k for k, operand in enumerate(operands) if operand in OF_PARAMETERS)
