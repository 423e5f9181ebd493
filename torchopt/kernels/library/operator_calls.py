"""What the operators of ``torch.library`` compute: checked lists of tensors through a kernel.

A kernel takes addresses and looks at nothing, and anybody can call an operator: here everything is
looked at.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchopt.kernels.backends import availability as backends
from torchopt.kernels.backends import cpu as native
from torchopt.kernels.backends.launch import launch
from torchopt.kernels.backends.memory import dtype_of
from torchopt.kernels.generate.graph import Kernel
from torchopt.kernels.generate.written import Written, read


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """The arguments of both operators that are no data."""

    graph: str
    values: Sequence[float]
    live: Tensor | None
    steps: Sequence[int]
    rows: Sequence[int] | None

    @property
    def written(self) -> Written:
        """What the text of the kernel says."""
        return read(self.graph)

    def arguments(self) -> tuple[Any, ...]:
        """Return the arguments in the order of the schema."""
        return self.graph, self.values, self.live, self.steps, self.rows

    def numbers(self, backward: bool = False) -> list[tuple[float, ...]]:
        """Return the rows of the kernel's numbers."""
        written = self.written
        function = written.backward_numbers if backward else written.numbers
        values = self.values if self.live is None else self.live.tolist()
        count = len(self.steps)
        if not count or len(values) % count:
            raise ValueError(
                f"{len(values)} values cannot be shared out to {count} rows: there must be as many "
                "for each entry of steps."
            )
        width = len(values) // count
        rows = [values[k * width : (k + 1) * width] for k in range(count)]
        try:
            found = [function(row, float(step)) for row, step in zip(rows, self.steps)]
        except IndexError:
            raise ValueError(f"The kernel reads more than the {width} values of a row.") from None
        except (ArithmeticError, TypeError) as error:  # complex numbers have no order and no abs
            raise ValueError(
                f"The kernel's numbers cannot be computed from {list(values)} at the steps "
                f"{list(self.steps)}: {error}."
            ) from error
        if any(type(number) is not float for row in found for number in row):
            raise ValueError(f"The kernel's numbers are not real for {list(values)}.")
        return found

    def row_of_each(self, count: int) -> Sequence[int]:
        """Return the row of each parameter."""
        if len(self.steps) > count:
            raise ValueError(
                f"There are {len(self.steps)} rows (entries of steps) for {count} parameters: give "
                "at most one for each parameter."
            )
        rows = [0] * count if self.rows is None else self.rows
        if len(rows) != count or not all(0 <= row < len(self.steps) for row in rows):
            raise ValueError(
                f"rows must name one of {len(self.steps)} rows for each of {count} parameters, got "
                f"{self.rows}."
            )
        return rows


def columns_of(operands: Sequence[str], items: Sequence[Any]) -> dict[str, list[Any]]:
    """Return flat items by operand."""
    count, rest = divmod(len(items), len(operands))
    if rest or not count:
        raise ValueError(
            f"The kernel takes the same number of {', '.join(operands)}; got {len(items)} in all."
        )
    return {s: list(items[k * count : (k + 1) * count]) for k, s in enumerate(operands)}


def inputs_of(
    call: Call, tensors: Sequence[Tensor], bars: Sequence[Tensor | None] | None = None
) -> tuple[dict[str, Any], list[Tensor]]:
    """Return the tensors by operand, and for each parameter the one that gives shape and layout.

    Raises:
        ValueError: If they do not fit together: a kernel takes addresses, and looks at nothing.
    """
    kernel = call.written.forward
    columns: dict[str, Any] = columns_of(kernel.inputs, tensors)
    like = columns.get("p", columns.get("g"))
    if like is None:
        raise ValueError("A kernel must read g or p, whose shapes and layouts its results have.")
    if bars is not None:
        columns |= columns_of([f"bar_{s}" for s in kernel.output_operands], bars)
    for operand, column in columns.items():
        if len(column) != len(like):
            raise ValueError(f"There are {len(column)} of {operand} for {len(like)} parameters.")
        for x, of in zip(column, like):
            if x is not None:
                _check(operand, x, of, like[0])
    return columns, like


def _check(operand: str, x: Tensor, of: Tensor, first: Tensor) -> None:
    dtype = dtype_of(operand, first.dtype)
    fits = x.shape == of.shape and x.dtype == dtype and x.device == first.device
    if not fits or x.layout != torch.strided or first.dtype not in native.DTYPES:
        raise ValueError(
            f"A tensor of {operand} is {x.dtype} of shape {tuple(x.shape)} on {x.device}; needed "
            f"is a dense {dtype} of shape {tuple(of.shape)} on {first.device}."
        )


def _check_backend(kernel: Kernel, device: torch.device) -> None:
    reason = backends.unavailable(device.type) or backends.unsupported(device.type, kernel)
    if reason:
        raise RuntimeError(f"There is no fused kernel: {reason}. The graph is\n{kernel.text}")


# Real and fake tensors ----------------------------------------------------------------------------


def _wanted(call: Call, count: int, wanted: Sequence[bool]) -> dict[str, list[bool]]:
    """Return which derivatives are wanted, by operand."""
    operands = call.written.backward.output_operands
    if len(wanted) != len(operands) * count:
        raise ValueError(
            f"wanted must have {count} entries for each of {operands}, got {len(wanted)} in all."
        )
    return columns_of(operands, wanted) if operands else {}


def update(tensors: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    """Run a kernel on real tensors."""
    call = Call(*rest)
    kernel = call.written.forward
    columns, like = inputs_of(call, tensors)
    _check_backend(kernel, like[0].device)
    numbers, rows = call.numbers(), call.row_of_each(len(like))
    everything = dict.fromkeys(kernel.output_operands)
    outputs = launch(kernel, columns, like, everything, numbers, _or_none(rows, numbers))
    return [x for operand in kernel.output_operands for x in outputs[operand]]


def update_backward(
    bars: Sequence[Tensor | None], tensors: Sequence[Tensor], *rest: Any
) -> list[Tensor]:
    """Run a backward kernel on real tensors; return the derivatives that are wanted."""
    *arguments, wanted = rest
    call = Call(*arguments)
    kernel = call.written.backward
    columns, like = inputs_of(call, tensors, bars)
    mask: Any = _wanted(call, len(like), wanted)
    if not any(wanted):
        return []
    _check_backend(kernel, like[0].device)
    numbers, rows = call.numbers(backward=True), call.row_of_each(len(like))
    own: dict[str, Any] = {operand: columns[operand] for operand in kernel.inputs}
    outputs = launch(kernel, own, like, mask, numbers, _or_none(rows, numbers))
    return [x for s in kernel.output_operands for x in outputs[s] if x is not None]


def _or_none(rows: Sequence[int], numbers: Sequence[Any]) -> Sequence[int] | None:
    return rows if len(numbers) > 1 else None


def fake_update(tensors: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    """Return tensors like those of :func:`update`."""
    call = Call(*rest)
    _, like = inputs_of(call, tensors)
    return [
        torch.empty_like(x, dtype=dtype_of(operand, like[0].dtype))
        for operand in call.written.forward.output_operands
        for x in like
    ]


def fake_update_backward(
    bars: Sequence[Tensor | None], tensors: Sequence[Tensor], *rest: Any
) -> list[Tensor]:
    """Return tensors like those of :func:`update_backward`."""
    *arguments, wanted = rest
    call = Call(*arguments)
    _, like = inputs_of(call, tensors, bars)
    return [
        torch.empty_like(x, dtype=dtype_of(operand, like[0].dtype))
        for operand, mask in _wanted(call, len(like), wanted).items()
        for x, needed in zip(like, mask)
        if needed
    ]
