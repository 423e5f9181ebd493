"""Time an import in a fresh process of this interpreter."""

from __future__ import annotations

import subprocess
import sys


def import_milliseconds(package: str, after: str) -> float:
    """Return the cumulative import time of a package once another is loaded.

    Raises:
        RuntimeError: If the import fails.
    """
    # the folder of a variant is in the search path of this process only
    script = f"import sys; sys.path[:] = {sys.path!r}; import {after}; import {package}"
    command = [sys.executable, "-I", "-X", "importtime", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"import {package} failed:\n{done.stderr[-2000:]}")
    for line in reversed(done.stderr.splitlines()):
        # "import time: self [us] | cumulative | package", nested packages indented
        fields = line.removeprefix("import time:").split("|")
        if len(fields) == 3 and fields[2].rstrip() == f" {package}":
            return int(fields[1]) / 1000
    raise RuntimeError(f"{sys.executable} reported no import time of {package}.")
