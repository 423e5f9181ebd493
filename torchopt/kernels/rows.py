"""The hyperparameters of several parameters at once: rows that are alike but for their values."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from operator import is_
from typing import Any

import torch
from torch import Tensor

from torchopt.base.torch_internals import peek_interpreter_stack
from torchopt.kernels.backends import availability as backends
from torchopt.kernels.generate.learned import NUMBER, SINGLE
from torchopt.kernels.generate.program import Program
from torchopt.kernels.generate.tracing import UntraceableError
from torchopt.kernels.matching import Read, Segment
from torchopt.kernels.reading import PLAIN


class Rows:
    """What a segment reads of rows whose flags and kinds agree; tensors are read at each call.

    Attributes:
        given: The row of each parameter.
        distinct: Those that are different objects.
        indices: Which of them each parameter has; ``None`` if there is one only.
        first: What was read of the first one.
    """

    def __init__(
        self,
        given: Sequence[dict[str, Any]],
        distinct: list[dict[str, Any]],
        indices: list[int] | None,
        first: Read,
        columns: dict[int, list[Any]],
    ) -> None:
        self.given, self.distinct, self.indices, self.first = given, distinct, indices, first
        kinds = first.kinds or (NUMBER,) * len(first.values)
        self._numbers = {j: c for j, c in columns.items() if kinds[j] == NUMBER}
        self.singles = {j: c for j, c in columns.items() if kinds[j] == SINGLE}
        self.tensors = {f"h{j}": c for j, c in columns.items() if kinds[j] != NUMBER}
        self._changing = frozenset(f"h{j}" for j in columns)

    def program(
        self, segment: Segment, t: Any, present: tuple[bool, ...], has_params: bool
    ) -> tuple[Program | None, list[list[float]]]:
        """Return the program of all of them, if it is one, and the numbers of each distinct row.

        Tensors with one entry are read now.
        """
        rows = [list(self.first.values) for _ in self.distinct]
        for j, column in self._numbers.items():
            for row, number in zip(rows, column):
                row[j] = number
        for j, column in self.singles.items():
            one = len(column) == 1 or all(map(is_, column, repeat(column[0])))
            found = repeat(column[0].item()) if one else map(Tensor.item, column)
            for row, number in zip(rows, found):
                row[j] = float(number)
        first = self.first._replace(values=rows[0])
        program = segment.variant(self.distinct[0], first, t, present, has_params).program
        if program is None or self._changing.isdisjoint(program.guarded):
            return program, rows
        return (program if all(program.conditions.hold(row, t) for row in rows) else None), rows

    def stand_for(self, given: Sequence[dict[str, Any]]) -> bool:
        """Whether these are the rows that were read, and can be read again."""
        if self.tensors and peek_interpreter_stack() is not None:
            return False
        if given is self.given:
            return True
        return self.indices is None and all(map(is_, given, repeat(self.distinct[0])))

    def of_each(self, operand: str) -> list[Tensor]:
        """Return the tensor of each parameter that a operand stands for."""
        column = self.tensors[operand]
        if self.indices is None:
            return column * len(self.given)
        return [column[k] for k in self.indices]


def read_rows(segment: Segment, given: Sequence[dict[str, Any]]) -> Rows | None:
    """Read the rows of all parameters; ``None`` if they have to be looked at one by one."""
    base = given[0]
    first = segment.read(base)
    if first.reason or (first.kinds and peek_interpreter_stack() is not None):
        return None
    distinct, indices = [base], None
    if not all(map(is_, given, repeat(base))):
        positions: dict[int, int] = {}
        indices = [positions.setdefault(id(row), len(positions)) for row in given]
        distinct = list({id(row): row for row in given}.values())
    elif not first.kinds:
        return Rows(given, distinct, None, first, {})
    for name in segment.public:
        if type(base[name]) is bool and any(row[name] is not base[name] for row in distinct):
            return None
    columns: dict[int, list[Any]] = {}
    for j, (name, place) in enumerate(segment.places(base)):
        column = [row[name] for row in distinct]
        if place is not None:
            column = [pair[place] for pair in column]
        kind = first.kinds[j] if first.kinds else NUMBER
        if kind == NUMBER and all(map(is_, column, repeat(column[0]))):
            continue
        if not _are(kind, column):
            return None
        columns[j] = column
    return Rows(given, distinct, indices, first, columns)


def _are(kind: str, column: list[Any]) -> bool:
    """Whether all of a column are of one kind, and can be read."""
    if kind == NUMBER:
        return {float, int}.issuperset(map(type, column))
    return (
        PLAIN.issuperset(map(type, column))
        and {x.layout for x in column} == {torch.strided}
        and {x.is_cpu and x.numel() == 1 for x in column} == {kind == SINGLE}
    )


def unfit_hypers(
    program: Program, mode: str, tensors: dict[str, list[Tensor]], like: Sequence[Tensor]
) -> str:
    """Return why kernels cannot take hyperparameters that are tensors, or the derivative by them.

    Args:
        program: The kernels.
        mode: Of the program.
        tensors: Those of each parameter, by operand.
        like: The gradients of the parameters.
    """
    recorded, on_cpu = torch.is_grad_enabled(), like[0].is_cpu
    levels = peek_interpreter_stack() is not None  # they record graphs of their own
    wanted: set[str] = set()
    for operand in program.hypers(mode):
        column = tensors[operand]
        if levels or (recorded and any(x.requires_grad for x in column)):
            wanted.add(operand)
        if program.summed(operand):
            if operand in wanted and not on_cpu:
                return "a derivative by a hyperparameter on the CPU is wanted on another device"
            continue
        for x, g in zip(column, like):
            if not _broadcasts(x.shape, g.shape):
                return f"a hyperparameter has shape {tuple(x.shape)}, not {tuple(g.shape)}"
            if x.device != g.device:
                return f"devices differ: {x.device} and {g.device}"
    try:
        kernel = program.backward(mode, frozenset(wanted))[0]
    except UntraceableError as error:
        return f"its rule has no derivative here: {error}"
    return backends.unsupported(like[0].device.type, kernel)


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    if shape == to:
        return True
    try:
        return torch.broadcast_shapes(shape, to) == to
    except RuntimeError:
        return False
