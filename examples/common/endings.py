"""How a run ends that cannot be done: one line instead of a traceback, and exit code 2."""

from __future__ import annotations

import contextlib
import errno
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from common import EXTRA, lock


class Refused(SystemExit):
    """A run that cannot be done, with the reason as its only argument."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.code = 2  # as of a wrong command line


def refuse(reason: str, cause: BaseException | None = None) -> NoReturn:
    """End the run: print the reason and leave with exit code 2."""
    print(reason, file=sys.stderr)
    raise Refused(reason) from cause


def missing(what: str, error: ImportError) -> NoReturn:
    """End a run that lacks a package which a module imports at its beginning."""
    refuse(f"{Path(sys.argv[0]).stem}: {what}: {EXTRA}", error)


@contextlib.contextmanager
def plain_endings(name: str, resumable: bool = True) -> Iterator[None]:
    """End a run that was interrupted, or cannot be done, with one line instead of a traceback.

    The folders that the run has locked are free again afterwards.

    Args:
        name: The example's name, as a user typed it.
        resumable: Whether it has ``--resume``.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(f"Interrupted{'. Pass --resume to continue' * resumable}.") from None
    except OSError as error:
        refuse(f"{name}: {_of_system(error, resumable)}", error)
    except (ValueError, ImportError) as error:
        refuse(f"{name}: {error}", error)
    finally:
        lock.release_all()


def _of_system(error: OSError, resumable: bool) -> str:
    """Return what the system has said, and what is left of the run."""
    if error.errno is None:  # one of ours, which says everything
        return str(error)
    where = "" if error.filename is None else f" ({error.filename})"
    text = f"{error.strerror}{where}."
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        text += " What was written before is whole; make room"
        text += f"{' and continue with --resume' * resumable}, or choose another --output."
    return text
