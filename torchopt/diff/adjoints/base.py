"""What an adjoint is to :func:`torchopt.diff.unroll`."""

from __future__ import annotations

from typing import Any, Protocol

from torchopt.diff.replay.loop import Loop


class Adjoint(Protocol):
    """A way to differentiate a loop; it decides how the loop is run."""

    def run(self, loop: Loop) -> tuple[list[Any], list[Any]]:
        """Run a loop; return the leaves of the last carry, and those of ``ys``."""
        ...
