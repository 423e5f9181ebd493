"""Facts about the machine that a measurement must be read with."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path
from typing import Any


#: A load average from which on other work disturbs.
BUSY = 0.5


def facts() -> dict[str, Any]:
    """Return processor, cores, load and date."""
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "system": platform.platform(),
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def busy(found: dict[str, Any]) -> str:
    """Return a warning if the machine had other work before the measurement, or nothing.

    Threads of OpenMP spin while they wait for one that has lost its core: a step of
    ``torch.optim.Adam(fused=True)`` over small tensors then takes 100 times as long.
    """
    load = found["load_average"][0]
    if load < BUSY:
        return ""
    return f"The machine was busy before (load {load}): ratios on several threads may be far off."


def cpu_model() -> str:
    """Return the name of the processor, with family and model where the name says little."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    first = text.split("\n\n")[0]
    entries = dict(line.split(":", 1) for line in first.splitlines() if ":" in line)
    found = {key.strip(): value.strip() for key, value in entries.items()}
    name = found.get("model name", platform.machine())
    if "cpu family" in found:
        name += f" (family {found['cpu family']}, model {found.get('model', '?')})"
    return name
