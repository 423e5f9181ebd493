"""How much memory a piece of work takes at its peak, measured in a process of its own."""

from __future__ import annotations

import gc
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch


STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def alone(function: Callable[..., Any], *args: Any, here: bool = False) -> Any:
    """Return what a function returns in a new process, which ends afterwards.

    Args:
        function: Of a module, so that the process finds it.
        args: Its arguments, picklable.
        here: Call it in this process instead, which is sooner, but tells little of memory.
    """
    if here:
        return function(*args)
    spawning = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawning) as pool:
        return pool.submit(function, *args).result()


def peak(work: Callable[[], Any], device: torch.device) -> float:
    """Return by how many MiB the memory in use rises at most while something is done.

    On a GPU it is what PyTorch has allocated there, else the resident memory of this process. The
    work should have been done once before, in small, so that no library is loaded meanwhile.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    before = _resident(reset=True)
    work()
    return _resident(reset=False) - before


def _resident(reset: bool) -> float:
    """Return the peak of resident memory in MiB; after a reset, that of now."""
    if STATUS.exists():
        if reset:
            CLEAR.write_text("5")  # the peak is that from now on
        line = next(x for x in STATUS.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    import resource

    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
