"""A loop whose carry is a sum: its derivative needs no carry but the first."""

from __future__ import annotations

from torch import Tensor

from torchopt.diff.replay.store import Carry


class SumStore:
    """Keeps the tensors of the first carry only, and of the others what is no tensor.

    A step ``carry + f(x)`` has the same derivative at every carry, so any will do to replay it. The
    random states are those of each step.
    """

    def __init__(self) -> None:
        self.carries: dict[int, Carry] = {}
        self.first: list[object] | None = None

    def put(self, step: int, carry: Carry) -> None:
        """Keep a carry."""
        if self.first is None:
            self.first = carry.leaves
        leaves = [
            first if isinstance(leaf, Tensor) else leaf
            for first, leaf in zip(self.first, carry.leaves)
        ]
        self.carries[step] = Carry(leaves, carry.random)

    def get(self, step: int) -> Carry:
        """Return a carry from which the step has the right derivative."""
        return self.carries[step]

    def drop(self, step: int) -> None:
        """Forget a carry."""
        del self.carries[step]
