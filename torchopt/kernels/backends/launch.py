"""Run a kernel over lists of real tensors: layouts, outputs, addresses.

Every tensor that comes here is dense, strided and on one device; anything else about its layout is
checked, and mended by a copy. Only here and in inplace.py are addresses of tensors taken.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from torchopt.core.packed import Packed, Packing
from torchopt.kernels.backends import availability as backends
from torchopt.kernels.backends import cpu as native
from torchopt.kernels.backends import gpu
from torchopt.kernels.backends.memory import (
    OF_PARAMETERS,
    Column,
    addresses,
    divided,
    dtype_of,
    narrow_mask,
    slot_dtype,
)
from torchopt.kernels.generate.bytecode import Code
from torchopt.kernels.generate.graph import Kernel


#: Asks for the sum of a operand over each parameter.
SUM = "sum"

Numbers = Sequence[float]


def launch(
    kernel: Kernel,
    inputs: dict[str, Column],
    like: list[Tensor],
    wanted: dict[str, list[bool] | Packing | str | None],
    numbers: Sequence[Numbers],
    rows: Sequence[int] | None,
    pieces: int = 1,
) -> dict[str, Column]:
    """Return new tensors with the outputs of a kernel.

    Args:
        kernel: What to compute.
        inputs: Operand -> one tensor of each parameter, perhaps packed; ``None`` reads as zeros.
        like: For each parameter the tensor whose shape, layout and device its outputs get.
        wanted: Output operand -> which parameters need it; ``None`` for all, a packing for all in
            one flat tensor, ``SUM`` for the sum over each parameter, in one tensor of float64.
        numbers: Rows of the kernel's numbers.
        rows: The row of each parameter, or piece; ``None`` for the only one.
        pieces: Into how many pieces tensors are divided, which have numbers and sums of their own.
    """
    packed = pieces > 1 or Packed in map(type, inputs.values())
    packed = packed or Packing in map(type, wanted.values())
    readable = {s: c.readable() if type(c) is Packed else c for s, c in inputs.items()}
    like, inputs = _same_layout(like, readable, packed)
    own = like[0].dtype
    wide = slot_dtype(own)
    outputs: dict[str, Column] = {}
    sums: Tensor | None = None
    summed = [k for k, operand in enumerate(kernel.output_operands) if wanted[operand] is SUM]
    if summed:
        sums = torch.empty((len(summed), len(like) * pieces), dtype=torch.float64)
    for operand in kernel.output_operands:
        dtype = own if operand in OF_PARAMETERS else wide
        mask = wanted[operand]
        if mask is SUM:
            outputs[operand] = [None] * len(like)
        elif isinstance(mask, Packing):
            flat = torch.empty(mask.total, dtype=dtype, device=like[0].device)
            outputs[operand] = Packed(flat, mask)
        elif mask is not None and not all(mask):
            outputs[operand] = [
                torch.empty_like(x, dtype=dtype) if needed else None
                for x, needed in zip(like, mask)
            ]
        elif dtype == own:
            outputs[operand] = list(map(torch.empty_like, like))
        else:
            outputs[operand] = [torch.empty_like(x, dtype=dtype) for x in like]
    special: tuple[Any, ...] = (summed, sums, pieces) if summed or pieces > 1 else ()
    run(kernel, inputs, outputs, like, numbers, rows, *special)
    for k, operand in enumerate(kernel.output_operands[j] for j in summed):
        assert sums is not None
        outputs[operand] = sums[k]  # pyright: ignore[reportArgumentType]
    return outputs


def run(
    kernel: Kernel,
    inputs: dict[str, Column],
    outputs: dict[str, Column],
    like: list[Tensor],
    numbers: Sequence[Numbers],
    rows: Sequence[int] | None,
    summed: Sequence[int] = (),
    sums: Tensor | None = None,
    pieces: int = 1,
) -> None:
    """Run a kernel from tensors into tensors; for each parameter all have one dense layout.

    ``sums`` gets the sums over each tensor of the output operands at the positions ``summed``.
    """
    if like[0].is_cuda:
        if pieces > 1:
            inputs = {operand: _views(column, pieces) for operand, column in inputs.items()}
            outputs = {operand: _views(column, pieces) for operand, column in outputs.items()}
            like = _views(like, pieces)
        gpu.run(kernel, inputs, outputs, like, numbers, rows)
        return
    library, function, narrow_in, narrow_out = _facts(kernel)
    flat: Any = next((c for c in inputs.values() if isinstance(c, Packed)), None)
    sizes = list(map(Tensor.numel, like)) if flat is None else flat.packing.sizes
    in_places = [addresses(inputs[operand]) for operand in kernel.inputs]
    out_places = [addresses(outputs[operand]) for operand in kernel.outputs]
    if pieces > 1:
        sizes = [size // pieces for size in sizes for _ in range(pieces)]
        bytes_of = {s: dtype_of(s, like[0].dtype).itemsize for s in (*kernel.inputs, *outputs)}
        in_places = [
            divided(p, sizes, bytes_of[s], pieces) for s, p in zip(kernel.inputs, in_places)
        ]
        out_places = [divided(p, sizes, bytes_of[s], pieces) for s, p in zip(outputs, out_places)]
    call = native.KernelCall(
        library,
        function,
        native.DTYPES[like[0].dtype],
        narrow_in,
        narrow_out,
        sizes,
        list(chain.from_iterable(in_places)),
        list(chain.from_iterable(out_places)),
        rows,
        len(kernel.numbers),
        sum(1 << k for k in summed),
        0 if sums is None else sums.data_ptr(),
    )
    call.run(list(chain.from_iterable(numbers)))


@functools.lru_cache(maxsize=256)
def _facts(kernel: Kernel) -> tuple[native.Library, int | Code, int, int]:
    """Return the library, what it runs, and which operands have the parameters' dtype."""
    return (
        native.library(),
        backends.function_of(kernel),
        narrow_mask(kernel.inputs),
        narrow_mask(kernel.output_operands),
    )


def _views(column: Column, pieces: int) -> list[Any]:
    """Return the pieces of tensors."""
    return [
        piece
        for x in column
        for piece in ([None] * pieces if x is None else x.view(pieces, -1).unbind())
    ]


def _same_layout(
    like: list[Tensor], inputs: dict[str, Column], packed: bool
) -> tuple[list[Tensor], dict[str, Column]]:
    """Return everything with one dense layout for each parameter; copies where it is another."""
    columns = [column for column in inputs.values() if type(column) is list]
    if not any(column is like for column in columns):
        columns.append(like)
    given: list[Any] = [x for column in columns for x in column if x is not None]
    # an expanded, transposed, overlapping tensor is not contiguous; a negative bit is lazy data
    if all(map(Tensor.is_contiguous, given)) and not any(map(Tensor.is_neg, given)):
        return like, inputs
    # empty_like keeps the strides of a dense tensor and gives every other one dense strides; what
    # is packed is contiguous
    layout = torch.contiguous_format if packed else torch.preserve_format
    templates = [torch.empty_like(x, memory_format=layout) for x in like]
    return templates, {
        operand: column
        if isinstance(column, Packed)
        else [
            None if x is None else _with_strides(x, template)
            for x, template in zip(column, templates)
        ]
        for operand, column in inputs.items()
    }


def _with_strides(x: Tensor, template: Tensor) -> Tensor:
    if x.stride() == template.stride() and not x.is_neg():
        return x
    return torch.empty_like(template, dtype=x.dtype).copy_(x)
