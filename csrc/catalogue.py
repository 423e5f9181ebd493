"""Which graphs get a compiled kernel on the CPU: those that the benchmarks name.

All others are run by the interpreter (bytecode.py), which gives the same bits and takes about twice
as long in the cache. Kernels are found by what they compute, so a chain of the user's own gets a
compiled one as well if its graph is among these. After a change run ``make kernels``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torchopt
from torchopt.core.transform import GradientTransformation
from torchopt.kernels.generate.graph import Kernel
from torchopt.kernels.generate.learned import ENTRIES, NUMBER, SINGLE, hyper_operand
from torchopt.kernels.generate.program import build


#: Function -> the configurations whose graphs differ; every combination is generated.
ROWS: list[tuple[Any, dict[str, list[Any]]]] = [
    (torchopt.sgd, {"momentum": [0.0, 0.9], "weight_decay": [0.0, 0.1]}),
    (torchopt.adam, {"weight_decay": [0.0, 0.1]}),
    (torchopt.adamw, {}),
    (torchopt.rmsprop, {}),
    (torchopt.adagrad, {}),
]

#: Function -> configurations, and which hyperparameter is learned, as one number and as one for
#: each entry: those that are common. Any others run without a kernel of their own.
LEARNED: list[tuple[Any, dict[str, list[Any]], str]] = [
    (torchopt.sgd, {"momentum": [0.0, 0.9]}, "lr"),
    (torchopt.adam, {}, "lr"),
    (torchopt.adamw, {}, "lr"),
]

#: Rules may treat the first step in another way (momentum buffers do).
STEPS = (1, 2)


def transformations() -> Iterator[GradientTransformation]:
    """Yield every configuration of :data:`ROWS` that exists."""
    for function, choices in ROWS:
        yield from _configurations(function, choices)


def _configurations(
    function: Any, choices: dict[str, list[Any]]
) -> Iterator[GradientTransformation]:
    for values in itertools.product(*choices.values()):
        arguments = dict(zip(choices, values))
        if arguments.get("nesterov") and arguments.get("momentum") == 0.0:
            continue  # refused: Nesterov momentum needs momentum
        yield function(**arguments)


def kernels() -> list[Kernel]:
    """Return the distinct kernels of all rows, in a fixed order."""
    found: dict[str, Kernel] = {}
    for tx in transformations():
        rows = [part.hyperparameters() for part in tx.parts]
        present = _slots_present(tx)
        for step in STEPS:
            program = build(tx.parts, rows, step, present, has_params=True)
            for kernel in program.kernels.values():
                if kernel.outputs:
                    found.setdefault(kernel.text, kernel)
    for function, choices, name in LEARNED:
        for tx in _configurations(function, choices):
            for kernel in _learned_kernels(tx, name):
                found.setdefault(kernel.text, kernel)
    return list(found.values())


def _learned_kernels(tx: GradientTransformation, name: str) -> Iterator[Kernel]:
    """Yield the kernels of a transformation one of whose hyperparameters is learned."""
    rows = [part.hyperparameters() for part in tx.parts]
    names = [
        field
        for row in rows
        for field, value in row.items()
        if not isinstance(value, bool)
        for _ in (value if isinstance(value, tuple) else (value,))
    ]
    operand = hyper_operand(names.index(name))
    for kind, step in itertools.product((SINGLE, ENTRIES), STEPS):
        kinds = tuple(kind if field == name else NUMBER for field in names)
        program = build(tx.parts, rows, step, _slots_present(tx), has_params=True, kinds=kinds)
        for mode in ("update", "apply"):
            yield program.kernels[mode]
            yield program.backward(mode, frozenset({operand}))[0]


def _slots_present(tx: GradientTransformation) -> list[bool]:
    import torch

    present = []
    for part in tx.parts:
        slots = part.first_slots(torch.zeros(1), **part.hyperparameters())
        present += [slot is not None for slot in slots]
    return present
