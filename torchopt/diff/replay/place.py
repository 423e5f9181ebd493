"""A folder that one process writes to: whether it can, and may, and whether there is room."""

from __future__ import annotations

import importlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from torchopt.diff.replay.schedules import size


LOCK = ".torchopt-lock"

#: The lock of each folder that this process writes to: how often, and the open file.
_held: dict[str, list[int]] = {}


def claim(folder: Path) -> None:
    """Make a folder and keep other processes out of it, until :func:`leave` or the end of this one.

    Raises:
        OSError: If nothing can be written there.
        RuntimeError: If another process uses it.
    """
    key = str(folder)
    if key in _held:
        _held[key][0] += 1
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _locked(folder / LOCK)
    except OSError as error:
        raise OSError(
            error.errno,
            f"store={key!r} cannot keep checkpoints, for nothing can be written there "
            f"({error.strerror}). Nothing has been run. Give a folder that this process may write "
            "to",
        ) from error
    if file is None:
        raise RuntimeError(
            f"{key} is in use by another process ({_whose(folder / LOCK)}), and one folder is for "
            "one run. Wait until that has ended, or give this run a folder of its own."
        )
    _held[key] = [1, file]


def leave(folder: Path, process: int) -> None:
    """Let others in again, when whoever has claimed the folder in this process is done."""
    held = _held.get(str(folder))
    if held is None or os.getpid() != process:  # a forked process claims for itself
        return
    held[0] -= 1
    if not held[0]:
        del _held[str(folder)]
        (folder / LOCK).unlink(missing_ok=True)
        os.close(held[1])


def _locked(path: Path) -> int | None:
    """Return an open file that is locked, or ``None`` if another process has it."""
    locks: Any = importlib.import_module("fcntl") if os.name == "posix" else None
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if locks is not None:  # the system takes the lock from a process that was killed
                locks.flock(file, locks.LOCK_EX | locks.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            return None
        try:
            same = os.fstat(file).st_ino == path.stat().st_ino
        except FileNotFoundError:
            same = False
        if same:
            os.truncate(file, 0)
            os.write(file, str(os.getpid()).encode())
            return file
        os.close(file)  # its owner has removed it meanwhile


def _whose(path: Path) -> str:
    try:
        return f"number {path.read_text(encoding='utf-8')}"
    except OSError:
        return "it has just ended"


def refuse_without_room(folder: Path, needed: int) -> None:
    """Refuse to begin what the disk has no room for.

    Raises:
        OSError: With both numbers.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"The carries of this run take {size(needed)}, and {folder} has room for {size(free)}. "
            'Nothing has been run. Keep fewer, by every="log" or "revolve", or make room.'
        )


def refuse_others(folder: Path, prefix: str, settings: dict[str, str]) -> None:
    """Refuse a folder that holds another run, or what is none.

    Raises:
        ValueError: Naming what differs.
    """
    for path in sorted(folder.glob("T*-settings")):
        if path.name == f"{prefix}settings":
            continue
        there = _read_settings(path)
        differ = [key for key, value in settings.items() if there.get(key) != value]
        shown = ", ".join(
            f"{key} ({there.get(key)} there, {settings[key]} here)"
            if key in ("the number of steps", "the adjoint", "the versions")
            else key
            for key in differ
        )
        whose = path.name.removesuffix("settings")
        raise ValueError(
            f"{folder} holds checkpoints of another run. What differs: {shown}. Give this run a "
            f"folder of its own, or remove its checkpoints ({whose}*) if nobody will resume it."
        )


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # no JSON, or no text
        found = None
    if not isinstance(found, dict):
        raise ValueError(
            f"{path} is no file of a run, though it is called like one. Give this run a folder of "
            "its own, or remove it."
        )
    return found
