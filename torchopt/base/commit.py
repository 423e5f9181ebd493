"""Write results so that an interrupt leaves either all old values or all new ones."""

from __future__ import annotations

from collections.abc import Callable


def all_or_nothing(write: Callable[[], None]) -> None:
    """Call ``write``; if it is interrupted, call it again before the interrupt goes on.

    It must be idempotent: assignments of values that have been computed before.
    """
    try:
        write()
    except BaseException:  # KeyboardInterrupt above all
        write()
        raise
