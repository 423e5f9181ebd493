"""Differentiate a loop by keeping some carries and taking its steps again."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Union

import torch
from torch import Tensor

from torchopt.base import tree
from torchopt.base.misuse.given import given
from torchopt.base.torch_internals import peek_interpreter_stack
from torchopt.diff.adjoints.block import InBlock
from torchopt.diff.replay import schedules
from torchopt.diff.replay.folder import Folder
from torchopt.diff.replay.loop import Loop
from torchopt.diff.replay.run import replayed
from torchopt.diff.replay.store import CpuStore, MemoryStore, Store
from torchopt.diff.replay.tape import Tape
from torchopt.diff.replay.thinning import Thinning
from torchopt.diff.replay.watcher import Bar, Report, Several, Told, Watcher
from torchopt.typing import PyTree


NAMES = ("sqrt", "log", "revolve")
STORES: dict[str, Callable[[], Store]] = {"memory": MemoryStore, "cpu": CpuStore}


@dataclass(frozen=True)
class Checkpointed:
    r"""Differentiate a loop exactly, keeping some carries and taking its steps again.

    The forward pass keeps carries, and records none of the steps but those that the backward pass
    begins with (only the latest loop keeps their graph; others take them again). The backward pass
    takes the steps from the last to the first, each of them once with a graph, and makes the
    carries in between again:

    .. math::
        \bar c_t = \Big(\frac{\partial c_{t+1}}{\partial c_t}\Big)^{\!\top} \bar c_{t+1}
                 + \Big(\frac{\partial y_t}{\partial c_t}\Big)^{\!\top} \bar y_t, \qquad
        \bar\theta = \sum_t \Big(\frac{\partial c_{t+1}}{\partial \theta}\Big)^{\!\top}
                     \bar c_{t+1} + \dots

    ===============  =================  =======================================================
    ``every``        carries kept       steps taken once more without a graph, of :math:`T`
    ===============  =================  =======================================================
    ``1``            T                  0: the memory of T carries and of one step
    ``n``            T / n + n - 1      T - T / n
    ``"sqrt"``       4 sqrt(T)          0, with the graphs of sqrt(T) / 4 steps at a time
    ``"log"``        log2(T) + 1        the fewest that are possible with so many carries
    ``"revolve"``    ``slots``          the fewest that are possible with so many carries
    ===============  =================  =======================================================

    :meth:`plan` counts them for a length. Derivatives of all orders are exact, by the start, by
    ``xs`` and by tensors that the step closes over: these are found by watching the first step, and
    where carries are not kept in a folder the second and the last one too. It works under
    ``torch.func`` as well, in reverse and forward mode and with ``vmap``. The first derivative
    takes the memory above; a derivative of it keeps a few carries for each part of the schedule.

    A step is taken more than once, so it has to be repeatable. The random state of PyTorch's
    default generators and autocast are put back; the first step is taken twice, and compared bit
    by bit. In a loop of fewer than 64 steps of which all carries are kept, it is the backward pass
    that compares it, which takes it again anyway.

    Args:
        every: Which carries to keep: each, every n-th, or by a schedule.
        slots: How many carries ``"revolve"`` keeps, the start included; by default twice as many
            as ``"log"``, which takes fewer steps again.
        store: Where: in ``"memory"``, where they are; on the ``"cpu"``; or in a folder (a path, or
            text such as ``"./run"``), for long runs. A run that was killed, in the forward or in
            the backward pass, continues there bit for bit when the same program is started again:
            of :math:`T` steps at most :math:`\sqrt T` are lost. Files are written by
            ``torch.distributed.checkpoint`` and renamed, named with T, step and a digest of what
            the run computes with, removed when they are used up, and kept after an error. What
            ``"sqrt"``, ``"log"`` and ``"revolve"`` make again on the way back stays in memory. One
            folder is for one process, and not inside ``torch.func``.
        graphs: How many steps are recorded before they are differentiated. More take more memory,
            and fewer steps are taken once more: ``Checkpointed(16, graphs=16)`` takes none. By
            default one, and for ``"sqrt"`` the segment between two carries; with ``graphs=1`` that
            keeps 2 sqrt(T) - 1 carries and takes T - sqrt(T) steps once more, for large steps.
        progress: ``True`` shows a bar for each direction in the terminal (by rich: ``pip install
            "torchopt[progress]"``); a function is called with ``"forward"`` or ``"backward"``, how
            many steps are done, and how many there are.

    Raises:
        TypeError: If ``every``, ``slots``, ``store`` or ``progress`` is of another kind; from
            ``unroll``: if the carry holds other things than tensors and numbers that change, which
            no folder keeps.
        ImportError: From ``unroll``: if ``progress`` is ``True`` and rich is not there.
        ValueError: If they are out of range or not known, or ``slots`` is given without
            ``"revolve"``. From ``unroll``: if the step changes a tensor in place, naming it, or
            closes over two tensors of which one was computed from the other, and a hand-written
            ``autograd.Function`` is given one; if the folder holds
            a run with other settings, naming what differs.
        OSError: From ``unroll``, before anything runs: if nothing can be written to the folder, or
            there is no room for the carries.
        RuntimeError: From ``unroll``, or from the backward pass of such a short loop: if the step
            is not repeatable, naming the leaf that differs. From ``unroll``: in a function that is
            compiled; inside two levels of forward mode. From the backward pass: if a leaf is
            constant in the first step and not in a later one; if what the steps read was changed;
            if a later step reads a tensor that nobody could see.

    Example:
        >>> import torch
        >>> from torchopt.diff import Checkpointed, unroll
        >>> lr = torch.tensor(0.5, requires_grad=True)
        >>> step = lambda w, _: (w - lr * w, None)
        >>> w, _ = unroll(step, torch.tensor(1.0), length=3, adjoint=Checkpointed("sqrt"))
        >>> torch.autograd.grad(w, lr)  # -3 (1 - lr) ** 2
        (tensor(-0.7500),)

    Reference:
        Griewank and Walther, Algorithm 799: Revolve, ACM Transactions on Mathematical Software
        2000. Chen et al., Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174.
    """

    every: Union[int, str] = 1
    slots: int | None = None
    store: Union[str, os.PathLike[str]] = "memory"
    graphs: int | None = None
    progress: Union[bool, Report] = field(default=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.every, str):
            if self.every not in NAMES:
                raise ValueError(f"every must be an integer or one of {NAMES}, got {self.every!r}.")
        elif _is_no_integer(self.every):
            raise TypeError(f"every must be an integer or one of {NAMES}, got {given(self.every)}.")
        elif self.every < 1:
            raise ValueError(f"every must be >= 1, got {self.every}.")
        if self.slots is not None:
            if _is_no_integer(self.slots):
                raise TypeError(f"slots must be an integer, got {given(self.slots)}.")
            if self.slots < 1:
                raise ValueError(f"slots must be >= 1, got {self.slots}.")
            if self.every != "revolve":
                raise ValueError(
                    f'slots={self.slots} is for every="revolve"; every={self.every!r} says itself '
                    "how many carries are kept."
                )
        _check_store(self.store)
        if self.graphs is not None:
            if _is_no_integer(self.graphs):
                raise TypeError(f"graphs must be an integer, got {given(self.graphs)}.")
            if self.graphs < 1:
                raise ValueError(f"graphs must be >= 1, got {self.graphs}.")
        if not isinstance(self.progress, bool) and not callable(self.progress):
            raise TypeError(
                "progress must be True, False or a function progress(direction, done, total), got "
                f"{given(self.progress)}."
            )

    def __repr__(self) -> str:
        others = dataclasses.fields(self)[1:]
        shown = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in others
            if f.repr and getattr(self, f.name) != f.default
        ]
        first = [] if self.every == 1 else [repr(self.every)]
        return f"Checkpointed({', '.join([*first, *shown])})"

    def plan(self, length: int, carry_bytes: int | PyTree = 0) -> schedules.Plan:
        """Return what a loop of this length takes, before anything runs.

        Args:
            length: The number of steps.
            carry_bytes: What one carry takes, or the carry itself.

        Example:
            >>> import torch
            >>> from torchopt.diff import Checkpointed
            >>> print(Checkpointed("revolve", slots=14).plan(10_000, {"w": torch.zeros(1000)}))
            10000 steps: 36129 taken once more, at most 14 carries kept, 56.0 kB
        """
        if _is_no_integer(length):
            raise TypeError(f"length must be an integer, got {given(length)}.")
        if length < 1:
            raise ValueError(f"length must be >= 1, got {length}.")
        if isinstance(carry_bytes, (str, float)):
            raise TypeError(
                "carry_bytes must be a whole number of bytes, or the carry itself, got "
                f"{given(carry_bytes)}."
            )
        if isinstance(carry_bytes, int) and carry_bytes < 0:
            raise ValueError(f"carry_bytes must be >= 0, got {carry_bytes}.")
        if not isinstance(carry_bytes, int):
            tensors = [x for x in tree.flatten(carry_bytes)[0] if isinstance(x, Tensor)]
            carry_bytes = sum(x.numel() * x.element_size() for x in tensors)
        return self.schedule(length).plan(carry_bytes)

    def schedule(self, length: int) -> schedules.Schedule:
        """Return which carries are kept, and what is done in which order."""
        return schedules.make(self.every, self.slots, length, self.graphs)

    def run(self, loop: Loop) -> tuple[list[Any], list[Any]]:
        """Run the loop as one node of the graph."""
        alone = torch.compiler.is_compiling() or peek_interpreter_stack() is not None
        graphs = 1 if alone else self.graphs  # torch.func ends its graphs

        def schedule(length: int) -> schedules.Schedule:
            return schedules.make(self.every, self.slots, length, graphs)

        new_store = STORES.get(str(self.store), MemoryStore)
        return replayed(loop, self, schedule, new_store, watcher=lambda: self._watcher(loop))

    def in_block(self) -> InBlock:
        """Return a tape for a block whose length nobody knows.

        Raises:
            ValueError: If carries are to be in a folder, or the length has to be known.
        """
        if self.every == "revolve":
            raise ValueError(
                "The binomial schedule divides a number of steps that is known beforehand, and a "
                'block tells its steps one by one: Checkpointed("log") keeps about as few carries.'
            )
        if str(self.store) not in STORES:
            raise ValueError(
                "A block cannot go on after a kill, for what happens between its steps is not "
                "known: store='memory' or 'cpu', or torchopt.diff.unroll for a folder."
            )
        if self.progress:
            raise ValueError("A block does not know how far it has got: progress is for unroll.")
        name = repr(self)
        return InBlock(Tape(name, Thinning(self.every), STORES[str(self.store)]()))

    def _watcher(self, loop: Loop) -> Watcher:
        told: list[Watcher] = []
        report: Union[Callable[..., Any], bool] = self.progress
        if report is True:
            report = Bar()
        if callable(report):
            told.append(Told(report, loop.length))
        if str(self.store) in STORES:
            return told[0] if told else Watcher()
        if peek_interpreter_stack() is not None:
            raise RuntimeError(
                f"{self!r} keeps its carries in a folder, and inside torch.func nobody could say "
                "when they are no longer needed. Use torch.autograd, or store='memory' or 'cpu'."
            )
        settings = f"every={self.every!r}, slots={self.slots!r}, graphs={self.graphs!r}"
        needed = self.plan(loop.length, tree.unflatten(loop.spec, loop.start)).bytes
        folder = Folder(os.fspath(self.store), loop, settings, needed)
        return Several(folder, *told)


def _check_store(store: Any) -> None:
    if not isinstance(store, (str, os.PathLike)):
        raise TypeError(f"store must be one of {tuple(STORES)} or a folder, got {given(store)}.")
    word = isinstance(store, str) and os.sep not in store
    if word and store not in STORES and not os.path.isdir(store):
        raise ValueError(
            f"store must be one of {tuple(STORES)} or a folder, got {store!r}. If that is to be a "
            f"folder, write './{store}'."
        )


def _is_no_integer(value: object) -> bool:
    return not isinstance(value, int) or isinstance(value, bool)
