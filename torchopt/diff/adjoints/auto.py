"""Choose a way to differentiate a loop by the memory that there is."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Union

import torch
from torch import Tensor

from torchopt.base.misuse.given import given
from torchopt.base.torch_internals import peek_interpreter_stack
from torchopt.diff.adjoints.base import Adjoint
from torchopt.diff.adjoints.checkpointed import Checkpointed
from torchopt.diff.adjoints.unrolled import Unrolled
from torchopt.diff.replay.loop import Loop
from torchopt.diff.replay.probe import one_step
from torchopt.diff.replay.random_state import cuda_devices, undisturbed
from torchopt.diff.replay.run import is_recorded
from torchopt.diff.replay.schedules import size
from torchopt.diff.replay.watch import saved_behind
from torchopt.diff.replay.writes import bare
from torchopt.typing import PyTree


logger = logging.getLogger("torchopt.diff")
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Choice:
    """What :class:`Auto` has chosen, and why."""

    adjoint: Adjoint
    reason: str

    def __str__(self) -> str:
        return f"{self.adjoint}: {self.reason}"


def _by_time(length: int, carry: int, saved: int, budget: int) -> Iterator[Checkpointed]:
    """Yield what may fit, the fastest first; sizes are bytes."""
    yield Checkpointed()
    if peek_interpreter_stack() is None:  # under torch.func steps are recorded one by one
        segments = range(2, length + 1)
        fit = (n for n in segments if -(-length // n) * carry + n * saved <= budget)
        if n := next(fit, None):
            yield Checkpointed(n, graphs=n)
    yield Checkpointed("sqrt", graphs=1)


@dataclass(frozen=True)
class Auto:
    """Choose the fastest exact adjoint whose memory fits a budget, and say which one that is.

    One step is recorded to see what it saves and how large the carry is. ``Unrolled()`` is taken if
    what all steps save fits, then ``Checkpointed()`` if all carries and one step do, then
    ``Checkpointed(n, graphs=n)`` with the least n that fits, which takes no step once more either,
    then ``Checkpointed("sqrt", graphs=1)``, and then ``Checkpointed("revolve", slots)`` with as
    many slots as there is room for. Inside ``torch.func``, where PyTorch lets
    nobody see what is saved, it takes for granted that all steps do not fit, and that one step
    saves ten times the carry.

    The choice is logged (``logging.getLogger("torchopt.diff")``, level INFO), and given to
    ``report``. :meth:`choose` returns it without running the loop.

    Args:
        memory: The budget: bytes, or text such as ``"2GiB"`` or ``"500 MB"`` (both are powers of
            1,024).
        report: A function that is called with the :class:`Choice`, such as ``print``.

    Raises:
        TypeError: If ``memory`` is neither.
        ValueError: If it is not positive, or the text is none of a size; and from ``unroll``, if
            not even one step with two carries fits.

    Example:
        >>> import torch
        >>> from torchopt.diff import Auto, unroll
        >>> w0 = torch.ones(1000, requires_grad=True)
        >>> step = lambda w, _: (w.sin(), None)
        >>> Auto("20KiB").choose(step, w0, length=100).adjoint
        Checkpointed('revolve', slots=4)
        >>> w, _ = unroll(step, w0, length=100, adjoint=Auto("1MiB", report=print))
        Unrolled(): 100 steps save 400.0 kB, and 1.0 MB are there
    """

    memory: Union[int, str]
    report: Callable[[Choice], Any] | None = None

    def __post_init__(self) -> None:
        _bytes(self.memory)
        if self.report is not None and not callable(self.report):
            raise TypeError(f"report must be a function of a Choice, got {given(self.report)}.")

    def choose(
        self,
        step: Callable[[Any, Any], Any],
        carry: PyTree,
        xs: PyTree = None,
        *,
        length: int | None = None,
    ) -> Choice:
        """Return what a call of ``unroll`` with these arguments would take."""
        return self._choice(Loop(step, carry, xs, length))

    def _choice(self, loop: Loop) -> Choice:
        budget = _bytes(self.memory)
        carry = sum(_size(x) for x in loop.start if isinstance(x, Tensor))
        saved = 10 * carry
        if peek_interpreter_stack() is None:
            saved = _saved(loop)
            total = loop.length * saved
            if total <= budget:
                reason = f"{loop.length} steps save {size(total)}, and {size(budget)} are there"
                return Choice(Unrolled(), reason)
        room = budget - saved
        for adjoint in _by_time(loop.length, carry, saved, budget):
            plan = adjoint.plan(loop.length, carry)
            if plan.bytes + plan.graphs * saved <= budget:
                return Choice(
                    adjoint, f"{plan}; a step saves {size(saved)}, and {size(budget)} are there"
                )
        slots = room // max(1, carry)
        if slots < 2:
            raise ValueError(
                f"Auto has {size(budget)}, but one step saves {size(saved)} and a carry takes "
                f"{size(carry)}, and there must be room for two. Give it more memory, or take "
                'Checkpointed("revolve", store="cpu").'
            )
        adjoint = Checkpointed("revolve", slots=slots)
        plan = adjoint.plan(loop.length, carry)
        return Choice(adjoint, f"{plan}; a step saves {size(saved)}, and {size(budget)} are there")

    def run(self, loop: Loop) -> tuple[list[Any], list[Any]]:
        """Choose, say what, and run the loop so."""
        if torch.compiler.is_compiling() or not is_recorded(loop):
            return loop.plain()
        choice = self._choice(loop)
        logger.info("%s", choice)
        if self.report is not None:
            self.report(choice)
        return choice.adjoint.run(loop)


def _bytes(memory: int | str) -> int:
    """Return a number of bytes."""
    if isinstance(memory, int) and not isinstance(memory, bool):
        number = memory
    elif isinstance(memory, str):
        match = re.fullmatch(r"\s*(\d+\.?\d*)\s*([KMGT]?)i?B\s*", memory, re.IGNORECASE)
        if match is None:
            raise ValueError(f'memory must be like "2GiB" or "500 MB", got {memory!r}.')
        number = int(float(match[1]) * UNITS[match[2].upper()])
    else:
        raise TypeError(
            f'memory must be a number of bytes or text such as "2GiB", got {given(memory)}.'
        )
    if number <= 0:
        raise ValueError(f"memory must be positive, got {memory!r}.")
    return number


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _saved(loop: Loop) -> int:
    """Return how many bytes one step saves, beyond what is there without it."""
    with undisturbed(cuda_devices(loop.start)):
        (leaves, y), seen, _, own = one_step(loop, functional=False)
        seen.writes.undo()
    storages: dict[int, int] = {}
    for tensor in saved_behind([x for x in (*leaves, *y) if isinstance(x, Tensor)]):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    for x in loop.start:  # each step has a carry of its own
        if isinstance(x, Tensor):
            seen.read.pop(id(own.pop(0)), None)
    for tensor in seen.read.values():  # is there without the step
        storages.pop(bare(tensor).untyped_storage().data_ptr(), None)
    return sum(storages.values())
