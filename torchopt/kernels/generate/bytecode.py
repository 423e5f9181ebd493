"""Translate graphs to programs of the C library's interpreter: any rule is fused, by no compiler.

A program is a list of instructions, each an operation over a block of entries (those of
csrc/operations.inc). What they read and write are places: the inputs, the outputs, the numbers,
and registers, which are blocks that stay in the first-level cache. In the translation

* two operations become one where the library has that one, such as ``(a * n) + b``, if nothing
  else reads what is in between;
* a value goes straight to its output if it may: an output can be the memory of the input of the
  same parameter (:func:`overwrites`), and then nothing may read that input any more;
* every other value gets a register, which is free for another one after its last reader.

A program computes what a kernel compiled from the same graph computes, to the last bit.
"""

from __future__ import annotations

import heapq
import itertools
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from torchopt.kernels.generate.graph import Listing


#: What the interpreter takes (csrc/engine.h).
MAX_STREAMS, MAX_NUMBERS, MAX_REGISTERS, MAX_LENGTH = 63, 1024, 256, 65536
#: Numbers of an instruction: the operation, where the result goes, four arguments.
INSTRUCTION = 6

#: Operations -> what they are with their arguments exchanged.
_EXCHANGED = {"add": "add", "mul": "mul", "equal": "equal", "not_equal": "not_equal"}
_EXCHANGED_BEHIND = {**_EXCHANGED, "sub": "rsub", "div": "rdiv"}


class TooLargeError(Exception):
    """A graph is larger than the interpreter takes; the message says in what."""


class Instruction(NamedTuple):
    """An operation of csrc/operations.inc, the name of its result, those of its arguments."""

    operation: str
    result: str
    arguments: tuple[str, ...]


class Code:
    """A program, in memory that the C library reads.

    Attributes:
        instructions: What it does; results are ``"out <operand>"`` or registers, ``"%<number>"``.
        address: Where ``struct program`` of csrc/engine.h is.
    """

    def __init__(self, listing: Listing, operations: Mapping[str, int]) -> None:
        self.instructions = translate(listing, operations)
        outputs = [_place_of(operand) for operand in listing.results]
        results = {instruction.result for instruction in self.instructions}
        registers = 1 + max((int(r[1:]) for r in results if r[0] == "%"), default=-1)
        sizes = (
            _limited(len(listing.inputs), MAX_STREAMS, "inputs"),
            _limited(len(outputs), MAX_STREAMS, "outputs"),
            _limited(len(listing.numbers), MAX_NUMBERS, "numbers"),
            _limited(registers, MAX_REGISTERS, "values at a time"),
            _limited(len(self.instructions), MAX_LENGTH, "operations"),
        )
        numbers = (f"n{k}" for k in range(sizes[2]))
        names = (*listing.inputs, *outputs, *numbers, *(f"%{k}" for k in range(registers)))
        place = {name: k for k, name in enumerate(names)}
        self._code = array("i")
        for operation, result, arguments in self.instructions:
            line = [operations[operation], place[result], *(place[name] for name in arguments)]
            self._code.extend(line + [0] * (INSTRUCTION - len(line)))
        self._program = array("q", (*sizes, self._code.buffer_info()[0]))
        self.address = self._program.buffer_info()[0]


def _limited(size: int, most: int, what: str) -> int:
    if size > most:
        raise TooLargeError(f"its graph has {size} {what}, kernels on the CPU have at most {most}")
    return size


def translate(listing: Listing, operations: Mapping[str, int]) -> list[Instruction]:
    """Return the instructions of a graph, made of the operations that the library has."""
    chosen = _Choice(listing, operations)
    return _placed(chosen.instructions(), listing)


# Instructions -------------------------------------------------------------------------------------


class _Choice:
    """Which instructions compute the values of a graph."""

    def __init__(self, listing: Listing, operations: Mapping[str, int]) -> None:
        self._known = operations
        self._numbers = {f"n{k}" for k in range(len(listing.numbers))}
        self._fills = itertools.count()
        arguments = itertools.chain.from_iterable(args for _, _, args in listing.statements)
        self._uses = Counter([*arguments, *listing.results.values()])
        #: Value -> its instruction, in order; those of a single operation can still be part of
        #: another one.
        self._chosen: dict[str, Instruction] = {}
        self._single: set[str] = set()
        for name, op, args in listing.statements:
            self._add(name, op, tuple(args))

    def instructions(self) -> list[Instruction]:
        return list(self._chosen.values())

    def _kinds(self, names: Sequence[str]) -> str:
        return "".join("n" if name in self._numbers else "v" for name in names)

    def _add(self, name: str, op: str, args: tuple[str, ...]) -> None:
        for instruction, parts in self._joined(name, op, args):
            if instruction.operation in self._known:
                for part in parts:
                    del self._chosen[part]
                self._chosen[name] = instruction
                return
        self._chosen[name] = self._alone(name, op, args)
        self._single.add(name)

    def _alone(self, name: str, op: str, args: tuple[str, ...]) -> Instruction:
        """Return an operation as an instruction of its own."""
        if op in _EXCHANGED and self._kinds(args) == "nv":
            args = args[::-1]
        while f"{op}_{self._kinds(args)}" not in self._known:
            first = self._kinds(args).index("n")  # as a block of entries that are all the same
            filled = f"fill {next(self._fills)}"
            self._chosen[filled] = Instruction("copy_n", filled, (args[first],))
            args = (*args[:first], filled, *args[first + 1 :])
        return Instruction(f"{op}_{self._kinds(args)}", name, args)

    def _joined(
        self, name: str, op: str, args: tuple[str, ...]
    ) -> Iterator[tuple[Instruction, tuple[str, ...]]]:
        """Yield instructions for an operation and those before it, the best first; and the latter.

        The library need not have them.
        """
        inner = [self._inner(arg) for arg in args]
        if op == "where" and inner[0] is not None:
            condition, (first, second) = inner[0], args[1:]
            operation = condition.operation
            if operation.startswith("not_"):
                operation, first, second = operation[len("not_") :], second, first
            operation = f"{operation}_where_{self._kinds((first, second))}"
            yield Instruction(operation, name, (*condition.arguments, first, second)), args[:1]
        elif len(args) == 2:
            yield from self._joined_binary(name, op, args, inner)
        elif len(args) == 1 and inner[0] is not None:
            yield Instruction(f"{inner[0].operation}_{op}", name, inner[0].arguments), args

    def _joined_binary(
        self, name: str, op: str, args: tuple[str, ...], inner: Sequence[Instruction | None]
    ) -> Iterator[tuple[Instruction, tuple[str, ...]]]:
        a, b = inner
        if a is not None and b is not None and op in _EXCHANGED:
            for x, y in ((a, b), (b, a)):
                operation = f"{x.operation}_{op}_{y.operation}"
                yield Instruction(operation, name, (*x.arguments, *y.arguments)), args
        ways = ((a, args[1], op), (b, args[0], _EXCHANGED_BEHIND.get(op)))
        for first, other, then in ways:
            if first is None or then is None:
                continue
            tail = f"{then}_{self._kinds((other,))}"
            before = self._inner(first.arguments[0])
            if before is not None:  # three operations in a row
                yield (
                    Instruction(
                        f"{before.operation}_{first.operation}_{tail}",
                        name,
                        (*before.arguments, *first.arguments[1:], other),
                    ),
                    (first.result, before.result),
                )
            operation = f"{first.operation}_{tail}"
            yield Instruction(operation, name, (*first.arguments, other)), (first.result,)

    def _inner(self, name: str) -> Instruction | None:
        """Return the instruction of a value if it can become part of its only reader's."""
        return self._chosen[name] if self._uses[name] == 1 and name in self._single else None


# Places -------------------------------------------------------------------------------------------


def overwrites(output: str, listing: Listing) -> str | None:
    """Return the input operand whose memory an output operand can be (inplace.py), if there is one.

    Derivatives are always new tensors.
    """
    operand = "p" if output == "u" else output
    backward = any(name.startswith("bar_") for name in listing.inputs)
    return operand if operand in listing.inputs and not backward else None


def _place_of(operand: str) -> str:
    return f"out {operand}"


def _placed(computed: list[Instruction], listing: Listing) -> list[Instruction]:
    """Give every value a place, and move to the outputs what could not be computed there."""
    under = {operand: overwrites(operand, listing) for operand in listing.results}
    staged = []  # inputs that go to an output, while their own memory gets something else
    sources = dict(listing.results)
    for operand, value in sources.items():
        if value in under.values() and value != under[operand]:
            sources[operand] = f"staged {value}"
            staged.append(Instruction("copy_v", sources[operand], (value,)))
    lines = [*computed, *dict.fromkeys(staged)]
    read_last = {name: k for k, line in enumerate(lines) for name in line.arguments}
    place: dict[str, str] = {}
    for k, line in enumerate(lines):
        for operand, value in sources.items():
            if value == line.result and read_last.get(under[operand], -1) <= k:
                place[value] = _place_of(operand)
                break
    for operand, value in sources.items():
        if place.get(value) != _place_of(operand):
            kind = "n" if value[0] == "n" and value not in listing.inputs else "v"
            lines.append(Instruction(f"copy_{kind}", _place_of(operand), (value,)))
    return _in_registers(lines, place)


def _in_registers(lines: Sequence[Instruction], place: dict[str, str]) -> list[Instruction]:
    """Give a register to every value that has no place yet; the next one may have it after."""
    read_last = {name: k for k, line in enumerate(lines) for name in line.arguments}
    free, registers = list[int](), itertools.count()
    placed = []
    for k, (operation, result, arguments) in enumerate(lines):
        names = tuple(place.get(name, name) for name in arguments)
        for name in dict.fromkeys(arguments):
            register = place.get(name, "")
            if register[:1] == "%" and read_last[name] == k:
                heapq.heappush(free, int(register[1:]))
        if result not in place and not result.startswith("out "):
            place[result] = f"%{heapq.heappop(free) if free else next(registers)}"
        placed.append(Instruction(operation, place.get(result, result), names))
    return placed
