"""Steps that somebody takes one by one, each a node of the graph that remembers little.

Each step is a loop of its own, of length one, whose derivative replays it: a chain of nodes, right
at every order. A node saves the carry before its step. What it saves is packed, by PyTorch's hooks
for saved tensors, to a number: where it is needed, the tape recomputes the carry from the
nearest one that is kept. Autograd joins what the hook returns to the graph of what was saved, so
that second derivatives are those of the chain.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from torchopt.base.torch_internals import graph_task_keeps_graph, peek_interpreter_stack
from torchopt.diff.replay.job import Job
from torchopt.diff.replay.loop import Loop, Step
from torchopt.diff.replay.nodes import Program, apply
from torchopt.diff.replay.programs import Steps
from torchopt.diff.replay.random_state import RandomState, undisturbed
from torchopt.diff.replay.records import Point
from torchopt.diff.replay.run import prepared, refuse_levels
from torchopt.diff.replay.schedules import Segments
from torchopt.diff.replay.store import Carry, MemoryStore, Store
from torchopt.diff.replay.thinning import Thinning
from torchopt.typing import PyTree


class Tape:
    """The steps of one block, and some of the carries between them.

    Args:
        name: How errors call the adjoint.
        thinning: Which carries stay kept.
        store: Where they are.
        last: Through how many steps, counted from the last one, there is a derivative at all.
    """

    def __init__(
        self, name: str, thinning: Thinning, store: Store | None = None, last: int | None = None
    ) -> None:
        self.name, self.thinning, self.last = name, thinning, last
        self.store: Store = MemoryStore() if store is None else store
        self.length = [0]  # of all steps so far; nodes look at it when they are differentiated
        self.jobs: dict[int, tuple[weakref.ref[Job], Point]] = {}
        self.kept: dict[int, list[int]] = {}  # the versions that the tensors had
        self.forced: set[int] = set()
        self.refilled: dict[int, Carry] = {}
        self.results: list[tuple[weakref.ref[Tensor], int]] = []
        self.recomputed = 0
        # what all steps have in common, which each of them would hold otherwise
        self.like: tuple[Any, list[Any]] | None = None
        self.random: RandomState | None = None
        self.handles: list[_Handle] = []

    def take(self, step: Step, carry: PyTree) -> PyTree:
        """Take a step; its results are those of one node.

        Raises:
            RuntimeError: Inside torch.func.
        """
        self.refuse_levels()
        loop = Loop(step, carry, None, 1, self.like)
        self.like = loop.spec, loop.paths
        loop.unchanged = frozenset(range(len(loop.start)))
        t = self.length[0]
        job = prepared(loop, _one_step, MemoryStore, check=t == 0, random=self.random)
        job.calls = 0  # an optimizer's step records what it needs itself
        point = Point(job.rest(loop.start), job.watched.before)
        self._keep(t, job, point)
        self.jobs[t] = weakref.ref(job), point
        node = _Taken(job, point, t, self.length, self.last)
        hooks = saved_tensors_hooks(*_packing(self, t, len(job.carry_at)))
        with hooks:
            results = apply(node, [_without_hooks(x) for x in (*job.carry, *job.consts)])
        random: RandomState = job.watched.after
        random.put_back()
        self.random = random
        assert node.end is not None
        # the node would hold what it saves, and the graph behind it
        job.carry, job.watched, job.begun = [], None, None
        loop.start = loop.y_likes = []
        loop.y_likes = [None]
        self.length[0] = t + 1
        self.results = [(weakref.ref(x), x._version) for x in results]
        leaves, _ = loop.result(job.leaves(results, node.end), [None])
        return leaves

    def refuse_levels(self) -> None:
        """Refuse what a node of the graph cannot serve.

        Raises:
            RuntimeError: Inside torch.func.
        """
        if peek_interpreter_stack() is not None:
            raise RuntimeError(
                f"A block with adjoint={self.name} records nodes of torch.autograd, and cannot be "
                "inside of torch.func (grad, vmap, jvp). Use torch.autograd.grad, or "
                "torchopt.diff.unroll, which can."
            )
        refuse_levels(self.name)

    # Carries -------------------------------------------------------------------------------------

    def _keep(self, t: int, job: Job, point: Point) -> None:
        before = [(ref(), version) for ref, version in self.results]
        follows = len(before) == len(job.carry) and all(
            x is y and x._version == version for x, (y, version) in zip(job.carry, before)
        )
        if not follows:  # somebody has put other things into the network since
            self.forced.add(t)
        tensors = [x.detach() for x in job.carry]
        self.store.put(t, Carry(job.leaves(tensors, point), point.random))
        self.kept[t] = [x._version for x in tensors]
        drop = [s for s in self.thinning.superfluous(t, self.kept) if s not in self.forced]
        if self.last is not None:
            drop = [s for s in self.kept if s <= t - self.last]
        for s in drop:
            self._drop(s)

    def _drop(self, t: int) -> None:
        self.store.drop(t)
        del self.kept[t]

    def carry(self, t: int) -> list[Tensor]:
        """Return the tensors of the carry before a step, for its derivative.

        Raises:
            RuntimeError: If a tensor has been changed in place meanwhile.
        """
        for s in [s for s in self.refilled if s > t]:
            del self.refilled[s]
        if not graph_task_keeps_graph():
            # those that somebody has put there cannot be computed from earlier ones
            for s in [s for s in self.kept if s > t and s not in self.forced]:
                self._drop(s)
        near = max(s for s in (*self.kept, *self.refilled) if s <= t)
        if near in self.refilled:
            found = self.refilled[near]
        else:
            found = self._intact(near)
        if near < t:
            found = self._advanced(found, near, t)
        return [x for x in found.leaves if isinstance(x, Tensor)]

    def _intact(self, t: int) -> Carry:
        found = self.store.get(t)
        tensors = [x for x in found.leaves if isinstance(x, Tensor)]
        if isinstance(self.store, MemoryStore) and type(self.store) is MemoryStore:
            versions = [x._version for x in tensors]
            if versions != self.kept[t]:
                raise RuntimeError(
                    f"A tensor of the network before step {t} of this block was changed in place "
                    "afterwards, so that the derivative of the step cannot be computed. Replace "
                    "weights instead of changing them, or differentiate before."
                )
        return found

    def handle(self, index: int, tensor: Tensor) -> _Handle:
        """Return what a node holds instead of a tensor of its carry."""
        handle = _Handle(index, tensor.shape, tensor.dtype, tensor.device)
        if index < len(self.handles) and self.handles[index] == handle:
            return self.handles[index]
        self.handles[index:] = [handle]
        return handle

    def _advanced(self, found: Carry, low: int, high: int) -> Carry:
        keep = self.thinning.between(low, high)
        tensors = [x for x in found.leaves if isinstance(x, Tensor)]
        reference, _ = self.jobs[low]
        with undisturbed(_alive(reference).devices):
            for t in range(low, high):
                reference, point = self.jobs[t]
                job = _alive(reference)
                point.random.put_back()
                leaves, _ = job.advance(job.leaves(tensors, point), None, job.consts)
                self.recomputed += 1
                tensors = [x.detach() for x in leaves if isinstance(x, Tensor)]
                found = Carry(list(tensors), point.random)
                if t + 1 in keep:
                    self.refilled[t + 1] = found
        return found


def _alive(reference: weakref.ref[Job]) -> Job:
    job = reference()
    assert job is not None  # the node of a later step holds those of all steps before it
    return job


def _one_step(length: int) -> Segments:
    return Segments(length, 1)


class _Taken(Steps):
    """A step that has been taken once already, when it was watched."""

    def __init__(
        self, job: Job, point: Point, index: int, length: list[int], last: int | None
    ) -> None:
        super().__init__(job, point, 1, first=True)
        self.index, self.all, self.last = index, length, last

    def values(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return what was computed then."""
        job, watched = self.job, self.job.watched
        self.end = Point(job.rest(watched.leaves), watched.after)
        seen = {id(t) for t in tensors}
        return [
            x.detach().clone() if id(x) in seen or x._is_view() else x.detach()
            for x in job.tensors(watched.leaves)
        ]

    def derivative(self, present: list[bool]) -> Program:
        """Return the way back through the step, or none if it is too long ago."""
        if self.last is not None and self.all[0] - self.index > self.last:
            return _Nothing(self, present)
        return super().derivative(present)


class _Nothing(Program):
    """The derivative zero."""

    def __init__(self, program: Program, present: list[bool]) -> None:
        self.job, self.program, self.present = program.job, program, present

    def differs(self) -> list[bool]:
        """Return by what it may be differentiated."""
        return [*self.program.differs(), *(True for p in self.present if p)]

    def values(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return zeros."""
        return [torch.zeros_like(t) for t, d in zip(tensors, self.program.differs()) if d]

    recorded = values


class _Handle(NamedTuple):
    """What a node holds instead of a tensor of its carry."""

    place: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


def _without_hooks(tensor: Tensor) -> Tensor:
    """Return a tensor that a node may save packed.

    On torch 2.6 what is unpacked shares the accumulator of a leaf, and takes the leaf's hooks away
    when it goes.
    """
    return tensor.view_as(tensor) if tensor.is_leaf and tensor._backward_hooks else tensor


def _packing(tape: Tape, t: int, count: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return the hooks of one node: the first tensors that it saves are those of its carry."""
    packed = iter(range(count))
    found: list[list[Tensor]] = []

    def pack(tensor: Tensor) -> Any:
        index = next(packed, None)
        return tensor if index is None else tape.handle(index, tensor)

    def unpack(held: Any) -> Tensor:
        if not isinstance(held, _Handle):
            return held
        if tape.last is not None and tape.length[0] - t > tape.last:
            return torch.zeros(held.shape, dtype=held.dtype, device=held.device)
        if held.place == 0 or not found:
            found[:] = [tape.carry(t)]
        tensor = found[0][held.place]
        if held.place == count - 1:
            found.clear()
        return tensor

    return pack, unpack
