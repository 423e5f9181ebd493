"""What an adjoint is to a block whose steps are taken one by one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torchopt.base.misuse.given import given
from torchopt.diff.replay.tape import Tape


@dataclass(frozen=True)
class InBlock:
    """How a block takes its steps.

    Attributes:
        tape: What replays them; ``None`` records them.
        first_order: Whether the gradient of the inner loss is a constant.
    """

    tape: Tape | None = None
    first_order: bool = False


def in_block(adjoint: Any) -> InBlock:
    """Return how a block takes its steps under an adjoint.

    Raises:
        TypeError: If it is no adjoint.
        ValueError: If it cannot serve a block.
    """
    if not hasattr(type(adjoint), "run"):
        raise TypeError(
            "inner_loop expects adjoint=Checkpointed(), or another object of torchopt.diff, got "
            f"{given(adjoint)}."
        )
    method = getattr(adjoint, "in_block", None)
    if method is None:
        raise ValueError(
            f"{adjoint!r} needs all steps of a loop at once, and a block tells them one by one. "
            "Write the loop as torchopt.diff.unroll(step, carry, xs, adjoint=...), or take "
            "Checkpointed() for the block."
        )
    return method()
