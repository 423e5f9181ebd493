"""Take flat tensors apart and put them together, and remember which parts of them count.

By the rules a tensor that a loss does not depend on has no derivative: ``None``, and nothing is
computed for it. A flat tensor with the derivatives of several parameters has zeros there instead,
so it carries a mark that says which of its parts are meant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchopt.base.torch_internals import is_legacy_batchedtensor, peek_interpreter_stack


_MARK = "_torchopt_parts"


def unpacked(flat: Tensor, packing: Any) -> list[Tensor]:
    """Return copies of the parts of a flat tensor, connected to it by one node of the graph."""
    if peek_interpreter_stack() is not None or is_legacy_batchedtensor(flat):
        return [part.clone() for part in packing.unpack(flat)]
    return list(_Unpack.apply(packing, flat))  # pyright: ignore[reportArgumentType]


def packed(parts: Sequence[Tensor | None], packing: Any) -> Tensor | None:
    """Return a flat tensor of those parts that there are; ``None`` if there are none."""
    there = [k for k, part in enumerate(parts) if part is not None]
    if not there:
        return None
    known: Any = parts[there[0]]
    flat = packing.pack(
        [
            known.new_zeros(shape) if part is None else part
            for part, shape in zip(parts, packing.shapes)
        ]
    )
    if len(there) < len(parts):
        setattr(flat, _MARK, (frozenset(there), flat._version))
    return flat


def marked(flat: Tensor) -> frozenset[int] | None:
    """Return which parts of a flat derivative are meant; ``None`` for all."""
    there, version = getattr(flat, _MARK, (None, 0))
    # autograd may have added another derivative in place
    return there if there is not None and flat._version == version else None


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(packing: Any, flat: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        views = flat.split(packing.sizes)
        return tuple(view.view(shape).clone() for view, shape in zip(views, packing.shapes))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.packing = inputs[0]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *bars: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, packed(bars, ctx.packing)
