"""What a kernel call reads: tensors, and the numbers of each parameter or example of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchopt.kernels.backends.memory import slot_dtype
from torchopt.kernels.generate.program import Program
from torchopt.kernels.rules import Rules


Values = Sequence[tuple[Sequence[float], int]]


class Arguments(NamedTuple):
    """What a kernel call reads.

    Attributes:
        columns: The input operands.
        given: The hyperparameters that are tensors, as they are.
        values: Rows of hyperparameters and the step count.
        indices: The row of each parameter, or of each piece; ``None`` for the only one.
        pieces: Into how many pieces each tensor is divided: the examples of a batch, if they have
            numbers of their own.
    """

    columns: dict[str, Any]
    given: dict[str, list[Tensor]]
    values: Values
    indices: list[int] | None
    pieces: int


def with_hypers(
    columns: dict[str, Any],
    program: Program,
    rule: Rules,
    values: Values,
    indices: list[int] | None,
    sums: bool,
) -> Arguments:
    """Return the arguments of a call some of whose hyperparameters are tensors.

    Those with one entry are among the numbers; others get the shape of the gradient.

    Args:
        columns: The tensors of all operands.
        program: The kernels.
        rule: The same computation by the rules.
        values: Rows of hyperparameters and the step count.
        indices: The row of each parameter; ``None`` for the only one.
        sums: Whether derivatives are to be summed, for each example of a batch.
    """
    given = {s: columns.pop(s) for s in rule.hyper_dims}
    like: Any = columns["p"] if "p" in columns else columns["g"]
    pieces, known = 1, True
    for operand, own in given.items():
        if program.summed(operand):
            pieces = max(pieces, own[0].numel())
            known = known and (pieces == 1 or _is_known(operand, own, values))
            continue
        dtype = slot_dtype(like[0].dtype)
        columns[operand] = [
            h
            if h.dtype == dtype and h.shape == x.shape
            else rule.aligned(operand, k, h, x).to(dtype).expand(x.shape)
            for k, (h, x) in enumerate(zip(own, like))
        ]
    if pieces == 1 or (known and not sums):
        return Arguments(columns, given, values, indices, 1)
    each = [k for k in indices or [0] * len(like) for _ in range(pieces)]
    if known:
        return Arguments(columns, given, values, each, pieces)
    rows = [(list(values[k][0]), values[k][1]) for k in each]
    for operand, own in given.items():
        if program.summed(operand):
            found = torch.stack([h.detach().reshape(-1) for h in own]).tolist()
            for (row, _), number in zip(rows, (number for one in found for number in one)):
                row[int(operand[1:])] = number
    return Arguments(columns, given, rows, list(range(len(rows))), pieces)


def _is_known(operand: str, own: Sequence[Tensor], values: Values) -> bool:
    """Whether a batch of hyperparameters is one number for all examples, and was read."""
    repeated = all(step == 0 or size == 1 for h in own for step, size in zip(h.stride(), h.shape))
    return repeated and not any(isnan(row[int(operand[1:])]) for row, _ in values)
