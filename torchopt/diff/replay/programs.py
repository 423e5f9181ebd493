"""A loop as a program: the steps, and the way back through them.

The derivative of :class:`Steps` is :class:`Pull`, which goes back as a schedule says. To be
differentiated itself, it takes the steps apart at carries that are recomputed from the start,
each part a node of the graph.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from torchopt.base.torch_internals import graph_task_keeps_graph, peek_interpreter_stack
from torchopt.diff.replay.alike import refuse_written
from torchopt.diff.replay.job import Job, cut
from torchopt.diff.replay.loop import apart
from torchopt.diff.replay.nodes import Program, apply
from torchopt.diff.replay.random_state import RandomState, undisturbed
from torchopt.diff.replay.records import Point
from torchopt.diff.replay.repeatable import Results, note_end, refuse_other_end
from torchopt.diff.replay.segment import Grads, Segment
from torchopt.diff.replay.store import Carry, Layered, Store
from torchopt.diff.replay.sweep import sweep
from torchopt.diff.replay.turn import Turn
from torchopt.diff.replay.watcher import Watcher


class Steps(Program):
    """Some steps in a row: of carry, ``xs`` and what is closed over, the last carry and ``ys``."""

    def __init__(self, job: Job, point: Point, length: int, first: bool = False) -> None:
        self.job, self.point, self.length = job, point, length
        self.first = first  # whether this is the loop itself, and not a part that is run again
        self.end: Point | None = None
        self.store: Store | None = None
        self.turn: Turn | None = None
        self.taken: list[Tensor] | None = None

    def differs(self) -> list[bool]:
        """Return by what a loop may be differentiated."""
        return self.job.differs()

    def constant(self) -> list[bool]:
        """Return which results of the loop have no derivative."""
        return [not d for d in self.job.results_differ] if self.first else []

    def take(self, tensors: Sequence[Tensor]) -> None:
        """Take the steps before they are asked for."""
        self.taken = self.values(tensors)

    def values(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Take the steps; the loop itself keeps carries for its backward pass."""
        if self.taken is not None:
            taken, self.taken = self.taken, None
            return taken
        job, keep, watcher = self.job, None, None
        turn: Turn | None = None
        if not self.first:
            self.point.random.put_back()
        elif peek_interpreter_stack() is None:  # what a level of vmap has made would outlive it
            watcher = job.watcher
            self.store = store = watcher.store or job.new_store()
            schedule = job.schedule(self.length)
            keep = store, schedule.kept()
            if watcher.store is None:  # which may go on in another process
                self.turn = turn = Turn.of(job, schedule)
        carry, xs, consts = job.inputs(tensors)
        leaves, rows = sweep(job, carry, self.point, xs, consts, self.length, keep, watcher, turn)
        self.end = Point(job.rest(leaves), RandomState.now(job.devices, self.point.random))
        if not self.first:
            rows = []
        ys = [y for y in job.loop.stacked(rows) if y is not None]
        results = fresh([*job.tensors(leaves), *ys], tensors, job.held)
        job.held = set()
        if self.first:
            note_end(job, self.length, job.leaves(results[: len(job.carry_at)], self.end))
            refuse_written(job, "by a later one than the first")
        return results

    def recorded(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Take the steps with all of their graph."""
        job = self.job
        self.point.random.put_back()
        carry, xs, consts = job.inputs(tensors)
        leaves, rows = job.leaves(carry, self.point), []
        for t in range(self.length):
            with job.reading(consts):
                leaves, y = job.loop.take(apart(leaves), job.x(xs, t))
            rows.append(y)
        if not self.first:
            rows = []
        ys = [y for y in job.loop.stacked(rows) if y is not None]
        return [*job.tensors(leaves), *ys]

    def derivative(self, present: list[bool]) -> Program:
        """Return the way back through the steps."""
        return Pull(self.job, self.point, self.length, present, self.store, self.turn)


class Pull(Program):
    """The way back through some steps: of their inputs and the cotangents, all derivatives."""

    def __init__(
        self,
        job: Job,
        point: Point,
        length: int,
        present: list[bool],
        store: Store | None = None,
        turn: Turn | None = None,
    ) -> None:
        self.job, self.point, self.length, self.present = job, point, length, present
        self.store, self.turn = store, turn

    def differs(self) -> list[bool]:
        """Return by what the way back may be differentiated."""
        return [*self.job.differs(), *(True for p in self.present if p)]

    def _cotangents(
        self, tensors: Sequence[Tensor]
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Return those of the last carry and those of ``ys``, with ``None`` where there is none."""
        rest = iter(tensors[len(self.job.differs()) :])
        all_of_them = [next(rest) if p else None for p in self.present]
        n = len(self.job.carry_at)
        return all_of_them[:n], self._by_leaf(all_of_them[n:])

    def _by_leaf(self, ys: Sequence[Tensor | None]) -> list[Tensor | None]:
        rest = iter(ys)
        given = [None if like is None else next(rest, None) for like in self.job.loop.y_likes]
        return [
            c if isinstance(like, Tensor) else None for c, like in zip(given, self.job.loop.y_likes)
        ]

    # Values --------------------------------------------------------------------------------------

    def values(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Go back as the schedule says."""
        job = self.job
        if self.store is not None:
            refuse_written(job, "after the loop")
        schedule = job.schedule(self.length)
        carry, xs, consts = job.inputs(tensors)
        back = Back(job, xs, consts, *self._cotangents(tensors))
        store = self._store(carry, xs, consts, schedule.kept())
        watcher = Watcher() if self.store is None else job.watcher
        given = tensors[len(job.differs()) :]
        done = watcher.start_backward(back, given, store is self.store)
        segment: Segment | None = None
        first = 0  # of its steps
        turned = None if self.turn is None else self.turn.taken()
        at_hand: Carry | None = None
        for kind, step in schedule.backward():
            if done is not None:  # an earlier process did this
                done = None if (kind, step) == ("pull", done) else done
            elif kind == "load":
                at_hand = store.get(step)
                at_hand.random.put_back()
                at_hand = Carry(list(at_hand.leaves), at_hand.random)
            elif kind == "drop":
                store.drop(step)
            elif kind == "pull":
                if segment is not None:  # this is the last of its steps
                    back.through(segment, first)
                    segment = at_hand = None
                watcher.backward(step, back, step == first)
            elif kind == "record" and turned is not None:
                segment, first = turned, self.length - len(turned)
                turned = None if step == self.length - 1 else turned
            elif at_hand is None:
                raise AssertionError(f"{kind} without a current carry")
            elif kind == "keep":
                at_hand = Carry(at_hand.leaves, RandomState.now(job.devices, at_hand.random))
                store.put(step, Carry(list(at_hand.leaves), at_hand.random))
            elif kind == "advance":
                leaves, _ = job.advance(at_hand.leaves, job.x(xs, step), consts)
                at_hand = Carry(leaves, at_hand.random)
            else:
                if segment is None:
                    segment = Segment(job, at_hand.leaves, consts, create_graph=False)
                    first = step
                self._record(segment, step, xs, consts)
        watcher.end_backward()
        return back.result([t for t, d in zip(tensors, job.differs()) if d])

    def _store(
        self, carry: list[Tensor], xs: list[Tensor], consts: list[Tensor], kept: list[int]
    ) -> Store:
        """Return a store that holds what the first sweep keeps, to be used up."""
        job = self.job
        if self.store is not None:
            if job.functional or graph_task_keeps_graph():
                return Layered(self.store, kept, job.new_store())
            return self.store
        store = job.new_store()
        self.point.random.put_back()
        if len(kept) == 1:
            store.put(0, Carry(job.leaves(carry, self.point), self.point.random))
        else:
            sweep(job, carry, self.point, xs, consts, max(kept) + 1, (store, kept))
        return store

    def _record(self, segment: Segment, step: int, xs: list[Tensor], consts: list[Tensor]) -> None:
        """Take a step with a graph; where it ended is known of some, and has to be there again."""
        job = self.job
        if self.store is None or step + 1 not in job.ends:
            segment.take(job.row(xs, step))
            return
        before = Carry(cut(segment.leaves), RandomState.now(job.devices))
        segment.take(job.row(xs, step))
        again = functools.partial(self._again, before, step, xs, consts)
        refuse_other_end(job, step, (cut(segment.leaves), cut(segment.ys[-1])), again)

    def _again(self, carry: Carry, step: int, xs: list[Tensor], consts: list[Tensor]) -> Results:
        """Take a step without a graph, and leave the generators as they are."""
        with undisturbed(self.job.devices):
            carry.random.put_back()
            return self.job.advance(list(carry.leaves), self.job.x(xs, step), consts)

    # With a graph --------------------------------------------------------------------------------

    def recorded(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Go back part by part, each of them a node."""
        job = self.job
        if self.turn is not None:  # its graph ends at the carry, and this one goes on
            self.turn.taken()
        refuse_written(job, "after the loop")
        carry, xs, consts = job.inputs(tensors)
        cotangents, ys = self._cotangents(tensors)
        by = [t for t, d in zip([*carry, *xs, *consts], job.differs()) if d]
        if self.length == 1:
            back = Back(job, xs, consts, cotangents, ys)
            self.point.random.put_back()
            leaves = job.leaves(carry, self.point)
            segment = Segment(job, leaves, consts, create_graph=True)
            segment.take(job.row(xs, 0))
            self._compare(1, segment.leaves)
            back.through(segment, 0)
            return back.result(by)
        ends = job.schedule(self.length).parts(0, self.length)
        sizes = [high - low for low, high in itertools.pairwise(ends)]
        parts_of_xs = list(zip(*(x.split(sizes) for x in xs))) or [()] * len(sizes)
        columns = [[None] * len(sizes) if y is None else y.split(sizes) for y in ys]
        parts_of_ys = list(zip(*columns)) or [()] * len(sizes)
        starts, points = [carry], [self.point]
        for end, size, x in zip(ends[1:], sizes[:-1], parts_of_xs):
            steps = Steps(job, points[-1], size)
            starts.append(apply(steps, [*starts[-1], *x, *consts]))
            assert steps.end is not None
            points.append(steps.end)
            self._compare(end, job.leaves(starts[-1], steps.end))
        back = Back(job, xs, consts, cotangents, ys)
        for i in reversed(range(len(sizes))):
            back.part(starts[i], parts_of_xs[i], parts_of_ys[i], points[i], sizes[i])
        return back.result(by)

    def _compare(self, step: int, leaves: Sequence[object]) -> None:
        """Refuse another end of some steps than when the loop was run, where that is known."""
        if self.store is not None and step in self.job.ends:
            refuse_other_end(self.job, step - 1, (cut(leaves), []))


class Back:
    """What has been gathered on the way back: cotangents of a carry, and derivatives."""

    def __init__(
        self,
        job: Job,
        xs: Sequence[Tensor],
        consts: Sequence[Tensor],
        carry: list[Tensor | None],
        ys: list[Tensor | None],
    ) -> None:
        self.job, self.xs, self.consts = job, xs, consts
        self.carry, self.ys = carry, ys
        self.by_xs: list[list[Tensor | None]] = []
        self.by_consts: list[Tensor | None] = [None] * len(consts)

    def through(self, segment: Segment, first: int) -> None:
        """Go back through some steps."""
        steps = range(first, first + len(segment))
        ys = [[None if c is None else c[t] for c in self.ys] for t in steps]
        found = segment.pull(self.carry, ys)
        self._add(found.carry, found.consts)
        for row in reversed(found.rows):
            self.by_xs.append([None if g is None else g[None] for g in row])

    def part(
        self,
        carry: Sequence[Tensor],
        xs: Sequence[Tensor],
        ys: Sequence[Tensor | None],
        point: Point,
        length: int,
    ) -> None:
        """Go back through several steps, as a node."""
        job = self.job
        of_y = [c for c, like in zip(ys, job.loop.y_likes) if like is not None]
        cotangents = [*self.carry, *of_y]
        pull = Pull(job, point, length, [c is not None for c in cotangents])
        given = [*carry, *xs, *self.consts, *(c for c in cotangents if c is not None)]
        rest = iter(apply(pull, given))
        grads = [next(rest) if d else None for d in job.differs()]
        by_carry, by_xs, by_consts = job.split(grads)  # pyright: ignore[reportArgumentType]
        self._add(list(by_carry), list(by_consts))
        self.by_xs.append(list(by_xs))

    def _add(self, by_carry: Grads, by_consts: Grads) -> None:
        self.carry = by_carry
        self.by_consts = [
            new if old is None else old if new is None else old + new
            for old, new in zip(self.by_consts, by_consts)
        ]

    def result(self, by: Sequence[Tensor]) -> list[Tensor]:
        """Return the derivatives by those tensors that may have one; zero where there is none."""
        columns = zip(*reversed(self.by_xs)) if self.by_xs else ()
        of_xs = [self._joined(column, x) for column, x in zip(columns, self.xs)]
        flat = [*self.carry, *of_xs, *self.by_consts]
        grads = [g for g, d in zip(flat, self.job.differs()) if d]
        return [torch.zeros_like(t) if g is None else g for t, g in zip(by, grads)]

    @staticmethod
    def _joined(column: Sequence[Tensor | None], x: Tensor) -> Tensor | None:
        if all(g is None for g in column):
            return None
        if len(column) > 1 and any(g is None for g in column):
            like = next(g for g in column if g is not None)
            column = [torch.zeros_like(like) if g is None else g for g in column]
        return torch.cat(list(column)) if len(column) > 1 else column[0]  # pyright: ignore[reportArgumentType]


def fresh(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], others: Iterable[int] = ()
) -> list[Tensor]:
    """Return outputs that are no views of inputs, nor of each other, nor other tensors."""
    seen = {*map(id, inputs), *others}
    result = []
    for tensor in outputs:
        if id(tensor) in seen or tensor._is_view():
            tensor = tensor.clone()
        seen.add(id(tensor))
        result.append(tensor)
    return result
