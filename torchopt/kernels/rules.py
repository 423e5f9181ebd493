"""The computation of a kernel by the rules it was generated from: the reference and fallback."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from torchopt.base.numerics import to_compute_dtype
from torchopt.core.packed import Packing
from torchopt.kernels.generate.learned import is_hyper
from torchopt.kernels.generate.program import GRADIENT, PARAMETER, UPDATE, slot_operand
from torchopt.kernels.matching import Segment


@dataclasses.dataclass(eq=False)
class Rules:
    """The parts of a segment, applied to flat tensors as a kernel is.

    Attributes:
        segment: The transformations.
        rows: The hyperparameters of each parameter.
        steps: The step count of each parameter.
        present: For each slot, whether it is a tensor.
        has_params: Whether the rules are given the parameter.
        apply: Whether the update is added to the parameter.
        inputs: The operands of the tensors.
        outputs: The operands of the results.
        hyper_dims: How many dimensions each hyperparameter among ``inputs`` has, by its operand.
            Tensors may come with dimensions of a batch more, all of them before their own.
        packed_in: Those of ``inputs`` that are one flat tensor for all parameters.
        packed_out: Those of ``outputs`` that shall be.
        packing: Where the parameters stand in flat tensors.
    """

    segment: Segment
    rows: list[dict[str, Any]]
    steps: list[int]
    present: tuple[bool, ...]
    has_params: bool
    apply: bool
    inputs: list[str]
    outputs: list[str]
    hyper_dims: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    packed_in: frozenset[str] = frozenset()
    packed_out: frozenset[str] = frozenset()
    packing: Packing | None = None

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs, operand by operand."""
        count, rest = len(self.steps), list(tensors)
        columns: dict[str, Sequence[Tensor]] = {}
        for operand in self.inputs:
            if operand in self.packed_in:
                assert self.packing is not None
                columns[operand] = self.packing.unpack(rest.pop(0))
            else:
                columns[operand], rest = rest[:count], rest[count:]
        results = []
        for k, row in enumerate(self.rows):
            given = {s: c[k] for s, c in columns.items()}
            if self.hyper_dims:
                like = next(x for s, x in given.items() if not is_hyper(s))
                hypers = {s: self.aligned(s, k, given.pop(s), like) for s in self.hyper_dims}
                row = self.segment.with_hypers(row, hypers)
            results.append(self._one(given, self.segment.rows(row), self.steps[k]))
        flat: list[Tensor] = []
        for operand in self.outputs:
            column = [result[operand] for result in results]
            if operand in self.packed_out:
                assert self.packing is not None
                column = [self.packing.pack(column)]
            flat += column
        return tuple(flat)

    def hypers(self, operand: str) -> list[Tensor]:
        """Return the hyperparameter of each parameter that a operand stands for."""
        name, place = self.segment.places(self.rows[0])[int(operand[1:])]
        values = [row[name] for row in self.rows]
        return values if place is None else [pair[place] for pair in values]

    def aligned(self, operand: str, k: int, h: Tensor, like: Tensor) -> Tensor:
        """Return a hyperparameter so that it broadcasts to the tensors of its parameter."""
        own = self.hyper_dims[operand][k]
        batch = h.dim() - own
        if batch == 0:
            return h
        between = (1,) * (like.dim() - batch - own)
        return h.reshape(*h.shape[:batch], *between, *h.shape[batch:])

    def subset(self, rows: Sequence[int]) -> Rules:
        """Return the rules of some parameters, nothing of them packed."""
        return dataclasses.replace(
            self,
            rows=[self.rows[k] for k in rows],
            steps=[self.steps[k] for k in rows],
            hyper_dims={s: [dims[k] for k in rows] for s, dims in self.hyper_dims.items()},
            packed_in=frozenset(),
            packed_out=frozenset(),
            packing=None,
        )

    def _one(self, given: dict[str, Tensor], rows: list[dict[str, Any]], t: int) -> dict[str, Any]:
        g = given.get(GRADIENT, given.get(PARAMETER))
        assert g is not None, "every kernel reads the gradient or the parameter"
        u = to_compute_dtype(g)
        # what the kernel does not read has no influence, but a rule may ask whether it is there
        p = to_compute_dtype(given.get(PARAMETER, g)) if self.has_params else None
        results: dict[str, Any] = {}
        position = 0
        for part, row in zip(self.segment.parts, rows):
            operands = [slot_operand(position + k) for k in range(len(part.slot_names()))]
            slots = tuple(
                given.get(s, u) if self.present[position + k] else None
                for k, s in enumerate(operands)
            )
            dtype = u.dtype
            u, new = part.rule(u, p, t, slots, **row)
            u = u.to(dtype)  # a hyperparameter may have a wider one
            results.update((s, x if x is None else x.to(dtype)) for s, x in zip(operands, new))
            position += len(operands)
        u = u.to(g.dtype)
        results[UPDATE] = given[PARAMETER] + u if self.apply else u
        return results
