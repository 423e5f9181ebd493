"""The backends: which device has kernels, and for what."""

from __future__ import annotations

import functools
import importlib.util

import torch

from torchopt.kernels.backends import cpu as native
from torchopt.kernels.backends import gpu
from torchopt.kernels.generate import emit_triton
from torchopt.kernels.generate.bytecode import Code, TooLargeError
from torchopt.kernels.generate.graph import Kernel
from torchopt.kernels.generate.program import Program


class NotLoaded(str):
    """Why a device has no kernels although it could have: users are warned of that."""


#: The compute capability from which on torch, too, compiles with Triton.
OLDEST_GPU = (7, 0)


def unavailable(device_type: str) -> str:
    """Return why no kernel runs on a type of device; the empty string if some do."""
    if device_type == "cpu":
        loaded = native.load()
        if isinstance(loaded, native.UnavailableError):
            return NotLoaded(f"the kernels for the CPU are not loaded: {loaded}")
        return ""
    if device_type == "cuda":
        return _cuda_unavailable()
    return f"there are no kernels for {device_type!r} devices"


@functools.cache
def _cuda_unavailable() -> str:
    if importlib.util.find_spec("triton") is None:
        return NotLoaded("the kernels for GPUs need triton, which is not installed")
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    problem = gpu.reason()
    return NotLoaded(f"the kernels for GPUs are not loaded: {problem}") if problem else ""


@functools.cache  # one entry for each GPU
def _too_old(device: torch.device) -> str:
    """Return why Triton has no compiler for one of the GPUs, or the empty string."""
    if torch.version.hip is not None:
        return ""
    capability = torch.cuda.get_device_capability(device)
    if capability >= OLDEST_GPU:
        return ""
    return (
        f"triton needs a GPU of compute capability {'.'.join(map(str, OLDEST_GPU))} or newer, "
        f"this one has {'.'.join(map(str, capability))}"
    )


def missing(device: torch.device, program: Program, mode: str) -> str:
    """Return why a device cannot run a program; the empty string if it can."""
    reason = unavailable(device.type)
    if reason:
        return reason
    if "g" not in program.kernels[mode].inputs and "p" not in program.kernels[mode].inputs:
        return "its rule reads neither gradient nor parameter"
    if device.type == "cuda" and (reason := _too_old(device)):
        return reason
    # which derivatives are wanted by hyperparameters is known to rows.py
    modes = (mode,) if program.kinds else (mode, f"backward_{mode}")
    reasons = (unsupported(device.type, program.kernels[m]) for m in modes)
    return next(filter(None, reasons), "")


def unsupported(device_type: str, kernel: Kernel) -> str:
    """Return why a backend cannot run a graph; the empty string if it can."""
    if device_type == "cuda":  # where kernels are generated when they are needed
        op = emit_triton.absent(kernel)
        return f"there are no kernels with {op!r} for GPUs" if op else ""
    try:
        if kernel.outputs:
            function_of(kernel)
    except TooLargeError as error:
        return str(error)
    return ""


#: Text of a kernel -> its program.
_programs: dict[str, Code] = {}
#: How many are kept: a user's own rules, made in a loop, may be any number.
PROGRAMS = 1024


def function_of(kernel: Kernel) -> int | Code:
    """Return the position of a kernel in the C library, or a program for its interpreter.

    Raises:
        TooLargeError: If the graph is too large.
    """
    position = find(kernel.name)
    if position is not None:
        return position
    code = _programs.get(kernel.text)
    if code is None:
        code = Code(kernel.listing, native.library().operations)
        while len(_programs) >= PROGRAMS:
            _programs.pop(next(iter(_programs)), None)
        _programs[kernel.text] = code
    return code


@functools.lru_cache(maxsize=1024)  # a user's own rules may be of any number
def find(name: str) -> int | None:
    """Return the position of a compiled kernel in the C library, or ``None``."""
    return native.library().find(name)
