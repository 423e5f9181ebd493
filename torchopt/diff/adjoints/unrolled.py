"""Differentiate a loop by recording it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torchopt.diff.replay.loop import Loop


@dataclass(frozen=True)
class Unrolled:
    """Differentiate a loop by recording all of its steps."""

    def run(self, loop: Loop) -> tuple[list[Any], list[Any]]:
        """Run the loop; whatever is recording records it."""
        return loop.plain()
