"""The loop over steps, as a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torchopt.diff.adjoints.base import Adjoint
from torchopt.diff.adjoints.unrolled import Unrolled
from torchopt.diff.replay.loop import Loop
from torchopt.typing import PyTree


def unroll(
    step: Callable[[Any, Any], tuple[Any, Any]],
    carry: PyTree,
    xs: PyTree = None,
    *,
    length: int | None = None,
    adjoint: Adjoint = Unrolled(),
) -> tuple[PyTree, PyTree]:
    """Take steps in a row."""
    loop = Loop(step, carry, xs, length)
    leaves, ys = adjoint.run(loop)
    return loop.result(leaves, ys)
