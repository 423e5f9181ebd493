"""The C engine (csrc/), loaded once, when it is first needed."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import json
import os
import platform
import re
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from torchopt.kernels.generate.bytecode import Code


ABI = 4
LIBRARY = Path(__file__).parents[1] / ("_fused.dll" if os.name == "nt" else "_fused.so")
DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
#: pip would take a wheel from its cache that was built without a compiler.
REINSTALL = (
    "reinstall torchopt where there is a C compiler: pip install --no-cache-dir "
    "--force-reinstall --no-deps torchopt"
)


class UnavailableError(Exception):
    """The native library cannot be used; the message says why and what to do."""


#: Where entries of ``struct call`` of csrc/engine.h stand; all of them have 64 bits.
_THREADS, _NUMBERS, _DONE = 6, 11, 12
#: In the place of a kernel's position: it is a program.
_PROGRAM = -1


class Library:
    """The loaded library."""

    def __init__(self, path: Path) -> None:
        _check_file(path)
        try:
            self._library = ctypes.CDLL(str(path))  # releases the GIL while it runs
        except OSError as error:
            raise UnavailableError(f"{path.name} does not load ({error}); {REINSTALL}") from error
        _check_symbols(self._library, path)
        self._library.torchopt_run.argtypes = [ctypes.c_void_p]
        self._library.torchopt_run.restype = ctypes.c_int64
        self._library.torchopt_find.argtypes = [ctypes.c_char_p]
        self._library.torchopt_find.restype = ctypes.c_int64
        self._library.torchopt_select.argtypes = [ctypes.c_char_p]
        self._library.torchopt_select.restype = ctypes.c_int64
        self._library.torchopt_operation.argtypes = [ctypes.c_int64]
        self._library.torchopt_operation.restype = ctypes.c_char_p
        self._library.torchopt_instruction_set.restype = ctypes.c_char_p
        self._library.torchopt_use_team.argtypes = [ctypes.c_void_p]
        self._library.torchopt_use_team.restype = None
        self._library.torchopt_use_team(_entry_of_openmp())
        #: Makes the call whose ``struct call`` is at an address; returns 0, or why it refuses.
        self.run: Any = self._library.torchopt_run
        names = iter(map(self._library.torchopt_operation, itertools.count()).__next__, None)
        #: The operations of programs (csrc/operations.inc), and their positions.
        self.operations = {name.decode(): k for k, name in enumerate(names)}

    @property
    def instruction_set(self) -> str:
        """The kernels in use: ``"generic"``, ``"avx2"`` or ``"avx512"``."""
        return self._library.torchopt_instruction_set().decode()

    def select(self, instruction_set: str) -> None:
        """Use the kernels for another instruction set.

        Raises:
            ValueError: If this machine has it not.
        """
        if self._library.torchopt_select(instruction_set.encode()) != 0:
            raise ValueError(f"This machine has no {instruction_set!r}.")

    def find(self, name: str) -> int | None:
        """Return the position of a kernel, or ``None`` if the library has it not."""
        position = self._library.torchopt_find(name.encode())
        return None if position < 0 else position


class KernelCall:
    """A call of a kernel over many tensors, which can be made again.

    It keeps the arrays that ``struct call`` points to.

    Args:
        library: The library.
        kernel: What :meth:`Library.find` returned, or a program.
        dtype: A value of :data:`DTYPES`: that of the operands in ``narrow_in`` and
            ``narrow_out``; in half precision the others are float32.
        narrow_in: Bit ``k`` is set if input operand ``k`` has the parameters' dtype.
        narrow_out: The same for output operands.
        sizes: Entries of each tensor.
        inputs: Addresses, operand by operand; 0 reads as zeros.
        outputs: Addresses, operand by operand; what is written to 0 is dropped.
        rows: The row of numbers of each tensor; ``None``: the only one.
        width: The length of a row.
        summed: Bit ``k`` is set if of output operand ``k`` the sum over each tensor is wanted.
        sums: The address of the sums, in float64, operand by operand.
    """

    def __init__(
        self,
        library: Library,
        kernel: int | Code,
        dtype: int,
        narrow_in: int,
        narrow_out: int,
        sizes: Sequence[int],
        inputs: Sequence[int],
        outputs: Sequence[int],
        rows: Sequence[int] | None = None,
        width: int = 0,
        summed: int = 0,
        sums: int = 0,
    ) -> None:
        self._library = library
        self._count = len(sizes)
        self._tables = [array("q", values) for values in (sizes, inputs, outputs, rows or ())]
        at = [table.buffer_info()[0] for table in self._tables]
        rows_at = at[3] if rows is not None else 0
        self._code = kernel if isinstance(kernel, Code) else None
        position = kernel if isinstance(kernel, int) else _PROGRAM
        program = 0 if self._code is None else self._code.address
        head = (position, dtype, narrow_in, narrow_out, self._count, width, 1)
        tail = (0, 0, program, summed, sums)
        self._call = array("q", (*head, at[0], rows_at, at[1], at[2], *tail))
        self._address = self._call.buffer_info()[0]

    def set_input(self, position: int, addresses: Sequence[int]) -> None:
        """Let an input operand be at other addresses."""
        start = position * self._count
        self._tables[1][start : start + self._count] = array("q", addresses)

    def run(self, numbers: Sequence[float]) -> None:
        """Run the kernel with rows of its numbers."""
        row = array("d", numbers)
        self._call[_NUMBERS] = row.buffer_info()[0]
        self._call[_THREADS] = torch.get_num_threads()
        code = self._library.run(self._address)
        if code != 0:
            raise RuntimeError(f"The fused engine refused a call (code {code}); please report it.")

    @property
    def done(self) -> bool:
        """Whether everything has been written since this was set to ``False``."""
        return bool(self._call[_DONE])

    @done.setter
    def done(self, value: bool) -> None:
        self._call[_DONE] = int(value)


@functools.cache
def load() -> Library | UnavailableError:
    """Return the library, or why there is none."""
    try:
        return Library(LIBRARY)
    except UnavailableError as error:
        return error


def library() -> Library:
    """Return the library.

    Raises:
        UnavailableError: If there is none.
    """
    loaded = load()
    if isinstance(loaded, UnavailableError):
        raise loaded
    return loaded


_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def _entry_of_openmp() -> int | None:
    """Return the address of ``GOMP_parallel`` of the OpenMP runtime that torch has loaded.

    ``None`` if there is none, or more than one: then the library uses threads of its own. So it
    does in a child of ``fork``, where the runtime would wait for threads that are the parent's; a
    library that is loaded already learns of a fork by itself (csrc/threads.c).
    """
    if _forked:
        return None
    try:
        maps = Path("/proc/self/maps").read_bytes()
    except OSError:
        return None  # not Linux
    paths = _openmp_runtimes(maps)
    if len(paths) != 1:
        return None
    try:
        runtime = ctypes.CDLL(paths.pop(), mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        return ctypes.cast(runtime.GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


def _openmp_runtimes(maps: bytes) -> set[str]:
    """Return the paths of OpenMP runtimes among mapped files; names may hold any byte but 0."""
    paths = set()
    for line in maps.split(b"\n"):
        fields = line.split(None, 5)  # address, permissions, offset, device, inode, path
        if len(fields) == 6:
            folder, _, name = fields[5].replace(b"\\012", b"\n").rpartition(b"/")
            if re.match(rb"lib(?:gomp|iomp5|omp)[^/\s]*\.so", name):
                paths.add(os.fsdecode(folder + b"/" + name))
    return paths


def _check_file(path: Path) -> None:
    """Look at the file before any of its code can run: loading a broken one may crash."""
    if not path.exists():
        archive = next((parent for parent in path.parents if parent.is_file()), None)
        if archive is not None:
            raise UnavailableError(
                f"torchopt was imported from inside {archive.name}, and no C library can be loaded "
                "from an archive; unpack it, or install torchopt with pip"
            )
        raise UnavailableError(f"torchopt was installed without its C library; {REINSTALL}")
    try:
        facts = json.loads(Path(f"{path}.json").read_text())
        facts = {name: str(facts[name]) for name in ("machine", "system", "sha256")}
        content = path.read_bytes()
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UnavailableError(
            f"{path.name}.json cannot be read ({error!r}); {REINSTALL}"
        ) from error
    if facts["machine"] != platform.machine() or facts["system"] != platform.system():
        raise UnavailableError(
            f"{path.name} was built for {facts['system']} on {facts['machine']}, this is "
            f"{platform.system()} on {platform.machine()}; {REINSTALL}"
        )
    if hashlib.sha256(content).hexdigest() != facts["sha256"]:
        raise UnavailableError(f"{path.name} is damaged (its checksum differs); {REINSTALL}")


def _check_symbols(loaded: Any, path: Path) -> None:
    """Read the constants that say what the library is; no code of it has run yet."""
    try:
        abi = ctypes.c_int64.in_dll(loaded, "torchopt_abi").value
        start = ctypes.c_char.in_dll(loaded, "torchopt_compiled_for")
        compiled_for = ctypes.string_at(ctypes.addressof(start)).decode()
    except ValueError as error:
        raise UnavailableError(f"{path.name} is no library of torchopt's; {REINSTALL}") from error
    if abi != ABI:
        raise UnavailableError(f"{path.name} has interface {abi} instead of {ABI}; {REINSTALL}")
    order = ["DEFAULT", "AVX2", "AVX512"]
    here = torch.backends.cpu.get_cpu_capability()
    if compiled_for != "DEFAULT" and (
        compiled_for not in order
        or here not in order
        or order.index(here) < order.index(compiled_for)
    ):
        raise UnavailableError(
            f"{path.name} was compiled for {compiled_for}, this processor has {here}; without "
            f"flags such as -march=native {REINSTALL}"
        )
