"""Where carries are kept between the first sweep and the backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from torchopt.diff.replay.random_state import RandomState


@dataclass(frozen=True)
class Carry:
    """All that a step depends on, at one moment between two steps.

    ``leaves`` are those of the carry in the order of its structure: tensors without a graph, and
    whatever else it holds.
    """

    leaves: list[Any]
    random: RandomState


class Store(Protocol):
    """Keeps carries by the step before which they were. One store serves one loop."""

    def put(self, step: int, carry: Carry) -> None:
        """Keep a carry; it may not be changed, and its tensors must not be changed in place."""
        ...

    def get(self, step: int) -> Carry:
        """Return a carry that is kept, with tensors on the devices that they came from."""
        ...

    def drop(self, step: int) -> None:
        """Forget a carry."""
        ...


class MemoryStore:
    """Keeps carries where they are."""

    def __init__(self) -> None:
        self.carries: dict[int, Carry] = {}

    def put(self, step: int, carry: Carry) -> None:
        """Keep a carry."""
        self.carries[step] = carry

    def get(self, step: int) -> Carry:
        """Return a kept carry."""
        return self.carries[step]

    def drop(self, step: int) -> None:
        """Forget a carry."""
        del self.carries[step]


class CpuStore(MemoryStore):
    """Keeps carries in the memory of the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.devices: dict[int, list[torch.device | None]] = {}

    def put(self, step: int, carry: Carry) -> None:
        """Copy a carry to the CPU."""
        self.devices[step] = [x.device if isinstance(x, Tensor) else None for x in carry.leaves]
        leaves = [x.to("cpu") if isinstance(x, Tensor) else x for x in carry.leaves]
        super().put(step, Carry(leaves, carry.random))

    def get(self, step: int) -> Carry:
        """Copy a carry back to where it came from."""
        carry = super().get(step)
        pairs = zip(carry.leaves, self.devices[step])
        leaves = [x.to(device) if isinstance(x, Tensor) else x for x, device in pairs]
        return Carry(leaves, carry.random)

    def drop(self, step: int) -> None:
        """Forget a carry."""
        super().drop(step)
        del self.devices[step]


class Layered:
    """A store over one that is left as it is, for a backward pass that others will follow."""

    def __init__(self, below: Store, kept: list[int], above: Store) -> None:
        self.below, self.kept, self.above = below, set(kept), above

    def put(self, step: int, carry: Carry) -> None:
        """Keep a carry above."""
        self.kept.discard(step)
        self.above.put(step, carry)

    def get(self, step: int) -> Carry:
        """Return a carry from where it is."""
        return (self.below if step in self.kept else self.above).get(step)

    def drop(self, step: int) -> None:
        """Forget a carry here; what is below stays."""
        if step in self.kept:
            self.kept.discard(step)
        else:
            self.above.drop(step)
