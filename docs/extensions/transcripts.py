"""Run lines of Python as an interactive session would, and return what it would show."""

from __future__ import annotations

import ast
import contextlib
import io
from typing import Any


def transcript(source: str) -> str:
    """Return ``source`` with prompts, each statement followed by what it printed."""
    namespace: dict[str, Any] = {}
    shown = []
    lines = source.splitlines()
    for statement in ast.parse(source).body:
        own = lines[statement.lineno - 1 : statement.end_lineno]
        shown += [f"{'>>>' if k == 0 else '...'} {line}".rstrip() for k, line in enumerate(own)]
        output = io.StringIO()
        interactive = ast.Interactive(body=[statement])
        with contextlib.redirect_stdout(output):
            exec(compile(interactive, "<example>", "single"), namespace)
        shown += output.getvalue().splitlines()
    return "\n".join(shown)
