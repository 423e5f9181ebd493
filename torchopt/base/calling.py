"""Where a call came from."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch


_OWN_FOLDERS = tuple(
    f"{folder}{os.sep}" for folder in (Path(__file__).parents[1], Path(torch.__file__).parent)
)


def level_of_user() -> int:
    """Return the ``stacklevel`` at which a warning of the caller points to the user's code."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OWN_FOLDERS):
        frame, level = frame.f_back, level + 1
    return level
