"""A folder whose files are all generated."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import TracebackType


class Folder:
    """Write files into a folder; at the end of a ``with`` block it holds no others.

    A file that would not change is not touched, so that Sphinx reads only what has changed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.written: set[Path] = set()

    def write(self, name: str, text: str) -> None:
        """Write a text file."""
        self._write(name, text.encode())

    def copy(self, name: str, source: Path) -> None:
        """Copy a file."""
        self._write(name, source.read_bytes())

    def _write(self, name: str, content: bytes) -> None:
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        self.written.add(target)
        if not target.exists() or target.read_bytes() != content:
            target.write_bytes(content)

    def __enter__(self) -> Folder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None and self.path.exists():
            for path in self.path.rglob("*"):
                if path.is_file() and path not in self.written:
                    path.unlink()


#: ``](target)`` of a Markdown link or picture.
LINK = re.compile(r"\]\(([^)\s]+)\)")


def change_links(text: str, change: Callable[[str], str]) -> str:
    """Return Markdown with another target in each relative link."""

    def replaced(match: re.Match[str]) -> str:
        target = match[1]
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        return f"]({change(target)})"

    return LINK.sub(replaced, text)


def table(rows: list[list[str]]) -> str:
    """Return a Markdown table; the first row is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]]) + "\n"
