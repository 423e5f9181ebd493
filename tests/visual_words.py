"""What torchopt.visual.explain says, for tests: each of its lines in one piece."""

from __future__ import annotations

from typing import Any

from torchopt.visual import explain as explain_wrapped


def explain(*args: Any) -> str:
    """Return what ``explain`` returns, but a line that was wrapped is one line again."""
    return explain_wrapped(*args).replace("\n  ", " ")
