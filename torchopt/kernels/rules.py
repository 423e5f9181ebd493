"""The computation of a kernel by the rules it was generated from: the reference and fallback."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from torchopt.engine import HALF
from torchopt.kernels.program import GRADIENT, PARAMETER, UPDATE, slot_stream


@dataclasses.dataclass(frozen=True)
class Rules:
    """The parts of a run, applied to flat tensors as a kernel is.

    Attributes:
        parts: The transformations.
        rows: For each parameter, the hyperparameters of each part.
        steps: The step count of each parameter.
        present: For each slot, whether it is a tensor.
        apply: Whether the update is added to the parameter.
        inputs: The streams of the tensors.
        outputs: The streams of the results.
    """

    parts: Sequence[Any]
    rows: list[list[dict[str, Any]]]
    steps: list[int]
    present: tuple[bool, ...]
    apply: bool
    inputs: list[str]
    outputs: list[str]

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs, stream by stream."""
        count = len(self.steps)
        results = []
        for k in range(count):
            given = {s: tensors[j * count + k] for j, s in enumerate(self.inputs)}
            results.append(self._one(given, self.rows[k], self.steps[k]))
        return tuple(result[stream] for stream in self.outputs for result in results)

    def _one(self, given: dict[str, Tensor], rows: list[dict[str, Any]], t: int) -> dict[str, Any]:
        g = given.get(GRADIENT, given.get(PARAMETER))
        assert g is not None, "every kernel reads the gradient or the parameter"
        u = _wide(g)
        # what the kernel does not read has no influence, but a rule may ask whether it is there
        p = _wide(given.get(PARAMETER, g))
        results: dict[str, Any] = {}
        position = 0
        for part, row in zip(self.parts, rows):
            streams = [slot_stream(position + k) for k in range(len(part.slot_names()))]
            slots = tuple(
                given.get(s, u) if self.present[position + k] else None
                for k, s in enumerate(streams)
            )
            u, new = part.rule(u, p, t, slots, **row)
            results.update(zip(streams, new))
            position += len(streams)
        u = u.to(g.dtype)
        results[UPDATE] = given[PARAMETER] + u if self.apply else u
        return results


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in HALF else x
