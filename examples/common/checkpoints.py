"""Checkpoints and metrics that survive a kill at any moment."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch


def write_atomically(path: Path, write: Any) -> None:
    """Let ``write(temporary_path)`` write a file, then put it in place in one step.

    A kill leaves either the old file or the new one: the data reach the disk before the name does.

    Raises:
        OSError: If it cannot be written, as on a full disk; the old file is there then, and what
            was written of the new one is not.
    """
    temporary = path.with_name(path.name + ".partial")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Save tensors and plain values.

    Raises:
        OSError: If the file cannot be written; an earlier checkpoint is there then.
    """
    buffer = io.BytesIO()  # torch.save does not say why it cannot write a file
    torch.save(content, buffer)
    write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getbuffer()))


def load_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    """Read what :func:`save_checkpoint` wrote; only tensors and plain values, no code.

    Raises:
        ValueError: If the file is no such checkpoint, naming it.
    """
    data = io.BytesIO(path.read_bytes())  # what is wrong from here on is wrong with the contents
    try:
        content = torch.load(data, map_location=device, weights_only=True)
    except Exception as error:  # what a damaged file makes of the reader is anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is no checkpoint of this example: {reason}") from error
    if not isinstance(content, dict) or not isinstance(content.get("settings"), dict):
        raise ValueError(f"{path} is no checkpoint of this example: it has no 'settings'.")
    return content


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Say of a checkpoint whose contents do not fit that it is none of this example.

    Raises:
        ValueError: Instead of what goes wrong in the block.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is no checkpoint of this example: {reason}") from error


def check_settings(saved: dict[str, Any], asked: dict[str, Any], path: Path) -> None:
    """Refuse to resume with settings that would give another run.

    Raises:
        ValueError: Naming the first setting that differs.
    """
    for name, value in asked.items():
        if saved.get(name) != value:
            raise ValueError(
                f"{path} was written with {name}={saved.get(name)!r}, this run has {name}={value!r}"
                ". Resume with the same settings, or choose another output folder."
            )


class MetricsFile:
    """Metrics as JSON lines, one dict each with its ``iteration``.

    Args:
        path: The file.
        keep_until: Keep earlier lines up to this iteration (when resuming); ``None``: keep nothing.
        fields: What each line must have, as a number.

    Raises:
        ValueError: If there are lines to keep that are not of such a file; it stays as it is then.
    """

    def __init__(self, path: Path, keep_until: int | None, fields: Sequence[str] = ()) -> None:
        self.path = path
        kept = [] if keep_until is None else _read(path, keep_until, fields)
        self.rows: list[dict[str, Any]] = kept
        text = "".join(json.dumps(row) + "\n" for row in kept)
        write_atomically(path, lambda temporary: temporary.write_text(text))

    def add(self, row: dict[str, Any]) -> None:
        """Append one line."""
        self.rows.append(row)
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:  # what is full tells no name
            raise OSError(error.errno, error.strerror, str(self.path)) from error


def _read(path: Path, keep_until: int, fields: Sequence[str]) -> list[dict[str, Any]]:
    """Return the whole lines up to an iteration; a line cut off by a kill is dropped."""
    rows: list[dict[str, Any]] = []
    text = path.read_bytes() if path.exists() else b""
    lines = text.split(b"\n")
    for number, line in enumerate(lines[:-1], 1):  # what follows the last break was cut off
        try:
            row = json.loads(line)
            if row["iteration"] != number:
                raise ValueError(f"it is not of iteration {number}")
            if not all(isinstance(row[name], (int, float)) for name in fields):
                raise ValueError("it lacks numbers")
        except (ValueError, KeyError, TypeError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(
                f"{path} holds no metrics of this run (line {number}: {reason}). Remove it, or "
                "start over with --overwrite."
            ) from error
        if number <= keep_until:
            rows.append(row)
    return rows
