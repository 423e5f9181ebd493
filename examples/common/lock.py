"""A lock on the output folder, so that two runs do not mix their files."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
import weakref
from pathlib import Path
from typing import IO


class FolderInUseError(Exception):
    """Another run holds the folder."""


class FolderLock:
    """Holds a folder until :meth:`release`, or until this process ends, however it ends.

    The lock is the operating system's, on the file ``.lock``; what stands in that file only tells
    others who holds it. So a file that a killed run has left behind locks nothing.

    Args:
        folder: An existing folder.

    Raises:
        FolderInUseError: If another run holds it, saying which.
        OSError: If the file cannot be written, or the file system has no locks.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".lock"
        self._file: IO[str] | None = self.path.open("a+")
        if not _locked(self._file):
            holder = _holder(self._file)
            self.release()
            raise FolderInUseError(
                f"{folder} is in use by another run{holder}. Wait for its end, or choose another "
                "--output."
            )
        _held.add(self)
        self._file.truncate(0)
        json.dump(_this_run(), self._file)
        self._file.flush()

    def release(self) -> None:
        """Let others have the folder. The file stays: to remove it would be a race."""
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):  # a disk that is full when the text is flushed
                file.close()


#: The locks of this process.
_held: weakref.WeakSet[FolderLock] = weakref.WeakSet()


def release_all() -> None:
    """Release every lock of this process."""
    for lock in list(_held):
        lock.release()
        _held.discard(lock)


def _locked(file: IO[str]) -> bool:
    """Lock an open file if no other process has; return whether it could be done."""
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(1 << 30)  # a byte far behind the text, which others may read
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _this_run() -> dict[str, str | int]:
    return {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _holder(file: IO[str]) -> str:
    """Return who has written into the lock file, in words."""
    try:
        file.seek(0)
        known = json.loads(file.read())
        return f" (process {known['process']} on {known['host']}, since {known['since']})"
    except (ValueError, KeyError, TypeError, OSError):  # it has not written yet
        return ""
