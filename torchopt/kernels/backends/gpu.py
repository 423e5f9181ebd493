"""Run kernels on GPUs: generated at run time, one launch for all tensors of a call.

The launch goes to the current stream of the tensors' device, and the host waits for nothing. What
a launch must know (emit_triton.py) is copied there from pinned memory; a table that the same stream
has read before is kept and not copied again.

Under capture into a CUDA graph the copies are nodes of the graph: a replay reads the same host
memory again, which therefore is never given back (some kilobytes for each captured call). A replay
repeats what was captured, the *numbers* included: the hyperparameters and the step count, and so
the bias correction of Adam, are those of the capture, as with the rules, whose numbers are Python's
too, and as in ``torch.optim`` without ``capturable=True``. A captured inner loop, whose steps are
counted from the same start at each replay, is right. A single captured step that is replayed to
train on is wrong wherever the rule uses the step count or a hyperparameter is changed in between.
Make one call outside of the capture first, as ``torch.cuda.graph`` demands anyway: kernels cannot
be compiled during it.
"""

from __future__ import annotations

import functools
import linecache
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchopt.kernels.backends.device_tables import tables_on
from torchopt.kernels.backends.memory import Column, addresses
from torchopt.kernels.generate import emit_triton
from torchopt.kernels.generate.emit_triton import ALIGNMENT, BLOCK, OPTIONS, RECORD_HEAD
from torchopt.kernels.generate.graph import Kernel


def run(
    kernel: Kernel,
    inputs: dict[str, Column],
    outputs: dict[str, Column],
    like: list[Tensor],
    numbers: Sequence[Sequence[float]],
    rows: Sequence[int] | None,
) -> None:
    """Run a kernel from tensors into tensors; see :func:`torchopt.kernels.backends.launch.run`.

    Tensors on the CPU are for tests: there Triton's interpreter runs the kernel, which takes
    ``TRITON_INTERPRET=1`` in the environment.
    """
    sizes = tuple(map(Tensor.numel, like))
    firsts, programs = _layout(sizes)
    if programs == 0:
        return
    columns = [addresses(inputs[s]) for s in kernel.inputs]
    columns += [addresses(outputs[s]) for s in kernel.outputs]
    records = array("q")
    for record in zip(sizes, sizes, firsts, rows or [0] * len(sizes), *columns):
        records.extend(record)
    values = array("d", [number for row in numbers for number in row] or [0.0])
    contents: dict[Any, Callable[[], Tensor]] = {
        ("owners", sizes): lambda: _owners(sizes),
        ("records", len(columns), records.tobytes()): lambda: _records(records, len(columns)),
        ("numbers", values.tobytes()): lambda: torch.frombuffer(values, dtype=torch.float64),
    }
    device = like[0].device
    function = _function(kernel, str(like[0].dtype).removeprefix("torch."), device.type)
    if device.type == "cpu":
        function[(programs,)](*(make() for make in contents.values()), **OPTIONS)
        return
    with torch.cuda.device(device):
        function[(programs,)](*tables_on(device, contents), **OPTIONS)


def reason() -> str:
    """Return why Triton cannot compile for the GPUs of this machine; an empty string if it can."""
    try:
        from triton.runtime import driver

        if not _compiles(_define("def nothing(): ...\n", "nothing", "")):
            return "TRITON_INTERPRET is set, and the interpreter cannot read the memory of a GPU"
        driver.active.get_current_target()  # builds a helper: needs a C compiler and Python.h
    except Exception as error:
        return f"triton does not start here: {type(error).__name__}: {error}"
    return ""


@functools.lru_cache(maxsize=64)
def _layout(sizes: tuple[int, ...]) -> tuple[list[int], int]:
    """Return the first program of each tensor, and how many programs there are."""
    firsts, programs = [], 0
    for size in sizes:
        firsts.append(programs)
        programs += -(-size // BLOCK)
    return firsts, programs


def _owners(sizes: tuple[int, ...]) -> Tensor:
    blocks = torch.tensor([-(-size // BLOCK) for size in sizes])
    return torch.arange(len(sizes), dtype=torch.int32).repeat_interleave(blocks)


def _records(records: array[int], operands: int) -> Tensor:
    """Return the table, and in it which tensors may be moved several entries at once."""
    table = torch.frombuffer(records, dtype=torch.int64).view(-1, RECORD_HEAD + operands)
    aligned = (table[:, RECORD_HEAD:] % ALIGNMENT == 0).all(1)
    table[:, 1] *= aligned
    return table.flatten()


#: Text of the kernel, dtype, type of device -> what Triton launches. The text stands for the name.
_functions: dict[tuple[str, str, str], Any] = {}
#: How many are kept: a user's own rules, made in a loop, may be any number.
FUNCTIONS = 256


def _function(kernel: Kernel, stored: str, device_type: str) -> Any:
    key = (kernel.text, stored, device_type)
    function = _functions.get(key)
    if function is None:
        function = _define(emit_triton.source(kernel, stored), kernel.name, stored)
        if _compiles(function) != (device_type == "cuda"):
            raise RuntimeError(
                "Kernels written in Triton run on GPUs, and with TRITON_INTERPRET=1 in the "
                f"environment on the CPU; the tensors are on {device_type!r}."
            )
        while len(_functions) >= FUNCTIONS:  # the oldest one, and its source
            oldest = _functions.pop(next(iter(_functions)))
            linecache.cache.pop(oldest.fn.__code__.co_filename, None)
        _functions[key] = function
    return function


def _compiles(function: Any) -> bool:
    from triton.runtime import JITFunction

    return isinstance(function, JITFunction)


def _define(source: str, name: str, stored: str) -> Any:
    """Make a kernel of its text.

    Triton reads the source of a function through ``inspect``, which asks ``linecache``; an entry
    without a time of change is taken to need no file.
    """
    import triton
    import triton.language

    path = f"<torchopt kernel {name} {stored}>"
    linecache.cache[path] = (len(source), None, source.splitlines(keepends=True), path)
    scope: dict[str, Any] = {"__name__": f"{__name__}.generated", "tl": triton.language}
    exec(compile(source, path, "exec"), scope)  # the text is made of graphs, by emit_triton.py only
    return triton.jit(scope[name])
