"""Checkpoints and metrics that survive a kill at any moment."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import torch


def write_atomically(path: Path, write: Any) -> None:
    """Let ``write(temporary_path)`` write a file, then put it in place in one step.

    A kill leaves either the old file or the new one: the data reach the disk before the name does.
    """
    temporary = path.with_name(path.name + ".partial")
    write(temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Save tensors and plain values."""
    write_atomically(path, lambda temporary: torch.save(content, temporary))


def load_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    """Read what :func:`save_checkpoint` wrote; only tensors and plain values, no code.

    Raises:
        ValueError: If the file is no such checkpoint, naming it.
    """
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is no checkpoint of this example: {error}") from error
    if not isinstance(content, dict) or "settings" not in content:
        raise ValueError(f"{path} is no checkpoint of this example: it has no 'settings'.")
    return content


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
        keep_until: Keep earlier lines up to this iteration (when resuming); ``None`` starts anew.
    """

    def __init__(self, path: Path, keep_until: int | None) -> None:
        self.path = path
        kept = [] if keep_until is None else _read(path, keep_until)
        self.rows: list[dict[str, Any]] = kept
        text = "".join(json.dumps(row) + "\n" for row in kept)
        write_atomically(path, lambda temporary: temporary.write_text(text))

    def add(self, row: dict[str, Any]) -> None:
        """Append one line."""
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def _read(path: Path, keep_until: int) -> list[dict[str, Any]]:
    """Return the whole lines up to an iteration; a line cut off by a kill is dropped."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if row["iteration"] <= keep_until:
            rows.append(row)
    return rows
