"""How much of the package one update runs: ``python docs/hops.py [PATH]`` counts functions.

Somebody who wants to know what an update does reads the functions that it enters, one after the
other, and each in another file is a hop. Four paths are counted (:data:`PATHS`), each twice: at its
first calls, which find things out, and later, when a call is like an earlier one.

* A function counts once, however often it is entered; what it defines inside (a closure) counts for
  itself, a comprehension and a lambda do not.
* Its lines are those from its first decorator to its last statement, with docstring and comments.
* Functions of PyTorch, of optree, of the standard library and in C do not count, nor does what runs
  in the backward pass.
* *maths* are those of the optimizer and of its arithmetic (``optimizers``, ``transforms``,
  ``base/numerics.py``).

The first calls are counted one path after the other in one process, so what a path has found out
serves those below it; the rule has been traced by then, which is not counted.
``tests/test_hops.py`` holds the numbers to :data:`LIMITS`: whoever makes them smaller writes the
new ones there. ``docs/architecture.md`` tells what the functions of a path are for.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import CodeType
from typing import Any, NamedTuple

import torch

import torchopt


PACKAGE = os.path.dirname(torchopt.__file__)
MATHS = ("optimizers" + os.sep, "transforms" + os.sep, os.path.join("base", "numerics.py"))


class Hops(NamedTuple):
    """The functions that a call enters, how many files they stand in and lines they have."""

    functions: int
    files: int
    lines: int


#: The most that a path may enter: at its first calls, and later.
LIMITS = {
    "adam().update by rules": (Hops(40, 13, 697), Hops(40, 13, 697)),
    "adam().update with kernels": (Hops(71, 22, 1340), Hops(42, 19, 920)),
    "Adam.step": (Hops(141, 38, 1920), Hops(33, 13, 400)),
    "MetaAdam.step": (Hops(134, 37, 2180), Hops(52, 24, 1080)),
}


def entered(call: Callable[[], Any]) -> list[CodeType]:
    """Return the code of the package's functions that a call enters, in order."""
    seen: dict[tuple[str, int, str], CodeType] = {}

    def note(frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE):
            seen.setdefault((code.co_filename, code.co_firstlineno, code.co_name), code)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return [code for code in seen.values() if not code.co_name.startswith("<")]


def counted(codes: list[CodeType]) -> Hops:
    """Count functions, files and lines."""
    lines = 0
    for code in codes:
        last = max(line for *_, line in code.co_lines() if line)
        lines += last - code.co_firstlineno + 1
    return Hops(len(codes), len({code.co_filename for code in codes}), lines)


def place(code: CodeType) -> str:
    """Return the file of a function, in the package."""
    return os.path.relpath(code.co_filename, PACKAGE)


def name_of(code: CodeType) -> str:
    """Return the name of a function, with its class from Python 3.11 on."""
    return getattr(code, "co_qualname", code.co_name)


# The paths ----------------------------------------------------------------------------------------


def _tree() -> dict[str, torch.Tensor]:
    return {"w": torch.randn(3, 4), "b": torch.randn(3)}


def _functional(use_accelerated_op: bool | None) -> Callable[[], None]:
    params, grads = _tree(), _tree()
    tx = torchopt.adam(1e-2, use_accelerated_op=use_accelerated_op)
    state = tx.init(params)

    def updates() -> None:
        nonlocal state
        for _ in range(3):
            state = tx.update(grads, state, params, inplace=False)[1]

    tx.update(grads, state, params, inplace=False)  # traces the rule
    return updates


def _in_place() -> Callable[[], None]:
    params = [torch.nn.Parameter(x) for x in _tree().values()]
    optimizer = torchopt.Adam(params, 1e-2)

    def steps() -> None:
        for p in params:
            p.grad = torch.randn_like(p)
        for _ in range(3):
            optimizer.step()

    return steps


def _differentiable() -> Callable[[], None]:
    net = torch.nn.Linear(4, 3)
    inner = torchopt.MetaAdam(net, 1e-2)

    def steps() -> None:
        for _ in range(3):
            inner.step(net(torch.randn(5, 4)).square().mean())

    return steps


#: For each path, what makes a function that makes three calls.
PATHS: dict[str, Callable[[], Callable[[], None]]] = {
    "adam().update by rules": lambda: _functional(False),
    "adam().update with kernels": lambda: _functional(None),
    "Adam.step": _in_place,
    "MetaAdam.step": _differentiable,
}


def measure() -> dict[str, tuple[list[CodeType], list[CodeType]]]:
    """Return what each path enters, at its first calls and later."""
    found = {}
    for name, make in PATHS.items():
        calls = make()
        first = entered(calls)
        calls()
        found[name] = first, entered(calls)
    return found


def main(shown: str = "") -> None:
    """Print the counts, and the functions of the paths whose names begin with ``shown``."""
    print(f"{'functions / files / lines':28}{'later':>16}{'of it maths':>16}{'at first':>18}")
    found = measure()
    for name, (first, later) in found.items():
        maths = [code for code in later if place(code).startswith(MATHS)]
        columns = [" / ".join(map(str, counted(codes))) for codes in (later, maths, first)]
        print(f"{name:28}{columns[0]:>16}{columns[1]:>16}{columns[2]:>18}")
    for name, (_, later) in found.items():
        if shown and name.startswith(shown):
            print(f"\n{name}, later:")
            print("\n".join(f"  {place(code)}  {name_of(code)}" for code in later))


if __name__ == "__main__":
    main(*sys.argv[1:])
