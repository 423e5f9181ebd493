"""Functions of tensors whose derivatives are computed by replaying, at every order.

One node of the graph (:class:`Isolated`) evaluates a program, and remembers no more than its
inputs. Its derivative is another program: of :class:`Steps` it is :class:`Pull`, which goes back
through the steps, and of that (and of any further one) it is :class:`Derivative`, which takes
steps apart at carries that are computed anew from the start, each part a node again. So carries
that are kept between the sweeps are values only and never part of a graph: were they, second
derivatives would be wrong without a word.

A node's inputs are cut from the graph before a program is run, and what the program is
differentiated by are new leaves. Hence it does not matter that a carry was itself computed from a
tensor that the step closes over: the derivative by that tensor is that of this program alone.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchopt.base.torch_internals import (
    graph_task_keeps_graph,
    peek_interpreter_stack,
    unwrap_if_dead,
)
from torchopt.diff.replay.job import Job, Point, _is_smooth
from torchopt.diff.replay.random_state import RandomState, undisturbed
from torchopt.diff.replay.store import Carry, Layered, Store


Maybe = Sequence[Any]


class Isolated(torch.autograd.Function):
    """The node of the graph that a program is."""

    generate_vmap_rule = True

    @staticmethod
    def forward(program: Program, *tensors: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Evaluate a program."""
        return tuple(program.values([t.detach() for t in tensors]))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Remember the inputs."""
        program, *tensors = inputs
        ctx.program = program
        # a result that nothing depends on has no gradient, and not zero: zero times nan is nan
        ctx.set_materialize_grads(False)
        if isinstance(program, Steps) and program.first and not program.job.functional:
            ctx.mark_non_differentiable(
                *(t for t, d in zip(output, program.job.results_differ) if not d)
            )
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Evaluate the derivative; as a node, if it is to be differentiated."""
        program: Program = ctx.program
        derivative = program.derivative([c is not None for c in cotangents])
        inputs = _alive([*ctx.saved_tensors, *(c for c in cotangents if c is not None)])
        with undisturbed(program.job.devices):
            if torch.is_grad_enabled():
                grads = apply(derivative, inputs)
            else:
                grads = derivative.values(inputs)
        rest = iter(grads)
        return None, *(next(rest) if d else None for d in program.differs())

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Evaluate the derivative along a direction."""
        program: Program = ctx.program
        pushed = Pushed(program, [t is not None for t in tangents])
        with undisturbed(program.job.devices):
            along = (t for t in tangents if t is not None)
            results = apply(pushed, _alive([*ctx.saved_tensors, *along]))
        rest = iter(results)
        return tuple(next(rest) if smooth else None for smooth in pushed.smooth)


def _alive(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors without the wraps of levels of torch.func that have ended.

    Operators of torch take them off, but levels that are opened inside of a program do not.
    """
    return [unwrap_if_dead(t) for t in tensors]


def apply(program: Program, tensors: Sequence[Tensor]) -> list[Any]:
    """Evaluate a program as a node."""
    return list(Isolated.apply(program, *tensors))  # pyright: ignore[reportArgumentType]


class Program(abc.ABC):
    """A function of a flat list of tensors."""

    job: Job

    @abc.abstractmethod
    def values(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Evaluate it; nothing is recorded."""

    @abc.abstractmethod
    def recorded(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Evaluate it where a graph is recorded."""

    @abc.abstractmethod
    def differs(self) -> list[bool]:
        """Return by which of its inputs it may be differentiated."""

    def derivative(self, present: list[bool]) -> Program:
        """Return the program of the inputs and of those cotangents that are there."""
        return Derivative(self, present)


class Steps(Program):
    """Some steps in a row: of carry, ``xs`` and what is closed over, the last carry and ``ys``."""

    def __init__(self, job: Job, point: Point, length: int, first: bool = False) -> None:
        self.job, self.point, self.length = job, point, length
        self.first = first  # whether this is the loop itself, and not a part that is run again
        self.end: Point | None = None
        self.store: Store | None = None

    def differs(self) -> list[bool]:
        """Return by what a loop may be differentiated."""
        return self.job.differs()

    def values(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Take the steps; the loop itself keeps carries for its backward pass."""
        job, keep = self.job, None
        if not self.first:
            self.point.random.put_back()
        elif peek_interpreter_stack() is None:  # what a level of vmap has made would outlive it
            self.store = job.new_store()
            keep = self.store, job.schedule(self.length).kept()
        carry, xs, consts = job.inputs(tensors)
        leaves, rows = job.sweep(carry, self.point, xs, consts, self.length, keep)
        self.end = Point(job.rest(leaves), RandomState.now(job.devices, self.point.random))
        if not self.first:
            rows = []
        ys = [y for y in job.loop.stacked(rows) if y is not None]
        return _fresh([*job.tensors(leaves), *ys], tensors)

    def recorded(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Take the steps with all of their graph."""
        job = self.job
        self.point.random.put_back()
        carry, xs, consts = job.inputs(tensors)
        leaves, rows = job.leaves(carry, self.point), []
        for t in range(self.length):
            with job.reading(consts):
                leaves, y = job.loop.take(leaves, job.x(xs, t))
            rows.append(y)
        if not self.first:
            rows = []
        ys = [y for y in job.loop.stacked(rows) if y is not None]
        return [*job.tensors(leaves), *ys]

    def derivative(self, present: list[bool]) -> Program:
        """Return the way back through the steps."""
        return Pull(self.job, self.point, self.length, present, self.store)


class Pull(Program):
    """The way back through some steps: of their inputs and the cotangents, all derivatives."""

    def __init__(
        self, job: Job, point: Point, length: int, present: list[bool], store: Store | None
    ) -> None:
        self.job, self.point, self.length, self.present = job, point, length, present
        self.store = store

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
            c if isinstance(like, Tensor) else None
            for c, like in zip(given, self.job.loop.y_likes)
        ]

    # Values --------------------------------------------------------------------------------------

    def values(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Go back as the schedule says."""
        job = self.job
        schedule = job.schedule(self.length)
        carry, xs, consts = job.inputs(tensors)
        back = _Back(job, xs, consts, *self._cotangents(tensors))
        store = self._store(carry, xs, consts, schedule.kept())
        kept = len(schedule.kept())
        at_hand: Carry | None = None
        for kind, step in schedule.backward():
            if kind == "load":
                at_hand = store.get(step)
                at_hand.random.put_back()
                at_hand = Carry(list(at_hand.leaves), at_hand.random)
            elif kind == "drop":
                store.drop(step)
                kept -= 1
            elif kind == "keep":
                assert at_hand is not None
                at_hand = Carry(at_hand.leaves, RandomState.now(job.devices, at_hand.random))
                store.put(step, Carry(list(at_hand.leaves), at_hand.random))
                kept += 1
                job.counts["carries"] = max(job.counts["carries"], kept)
            elif kind == "advance":
                assert at_hand is not None
                job.counts["advances"] += 1
                leaves, _ = job.advance(at_hand.leaves, job.x(xs, step), consts)
                at_hand = Carry(leaves, at_hand.random)
            else:
                assert at_hand is not None
                back.through(at_hand.leaves, step, create_graph=False)
                at_hand = None
        return back.result([t for t, d in zip(tensors, job.differs()) if d])

    def _store(
        self, carry: list[Tensor], xs: list[Tensor], consts: list[Tensor], kept: list[int]
    ) -> Store:
        """Return a store that holds what the first sweep keeps, to be used up."""
        job = self.job
        job.counts["carries"] = max(job.counts["carries"], len(kept))
        if self.store is not None:
            if job.functional or graph_task_keeps_graph():
                return Layered(self.store, kept, job.new_store())
            return self.store
        store = job.new_store()
        self.point.random.put_back()
        if len(kept) == 1:
            store.put(0, Carry(job.leaves(carry, self.point), self.point.random))
        else:
            job.sweep(carry, self.point, xs, consts, max(kept) + 1, (store, kept))
        return store

    # With a graph --------------------------------------------------------------------------------

    def recorded(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Go back part by part, each of them a node."""
        job = self.job
        carry, xs, consts = job.inputs(tensors)
        cotangents, ys = self._cotangents(tensors)
        by = [t for t, d in zip([*carry, *xs, *consts], job.differs()) if d]
        if self.length == 1:
            back = _Back(job, xs, consts, cotangents, ys)
            self.point.random.put_back()
            back.through(job.leaves(carry, self.point), 0, create_graph=True)
            return back.result(by)
        ends = job.schedule(self.length).parts(0, self.length)
        sizes = [high - low for low, high in zip(ends, ends[1:])]
        parts_of_xs = list(zip(*(x.split(sizes) for x in xs))) or [()] * len(sizes)
        columns = [[None] * len(sizes) if y is None else y.split(sizes) for y in ys]
        parts_of_ys = list(zip(*columns)) or [()] * len(sizes)
        starts, points = [carry], [self.point]
        for size, x in zip(sizes[:-1], parts_of_xs):
            steps = Steps(job, points[-1], size)
            starts.append(apply(steps, [*starts[-1], *x, *consts]))
            assert steps.end is not None
            points.append(steps.end)
        back = _Back(job, xs, consts, cotangents, ys)
        for i in reversed(range(len(sizes))):
            back.part(starts[i], parts_of_xs[i], parts_of_ys[i], points[i], sizes[i])
        return back.result(by)


class _Back:
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

    def through(self, leaves: list[Any], index: int, create_graph: bool) -> None:
        """Go back through one step."""
        y = [None if c is None else c[index] for c in self.ys]
        row = self.job.row(self.xs, index)
        grads = self.job.pull(leaves, row, self.consts, [*self.carry, *y], create_graph)
        by_xs = self._take(grads)
        self.by_xs.append([None if g is None else g[None] for g in by_xs])

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
        pull = Pull(job, point, length, [c is not None for c in cotangents], None)
        given = [*carry, *xs, *self.consts, *(c for c in cotangents if c is not None)]
        rest = iter(apply(pull, given))
        self.by_xs.append(self._take([next(rest) if d else None for d in job.differs()]))

    def _take(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        by_carry, by_xs, by_consts = self.job.split(grads)  # pyright: ignore[reportArgumentType]
        self.carry = list(by_carry)
        self.by_consts = [
            new if old is None else old if new is None else old + new
            for old, new in zip(self.by_consts, by_consts)
        ]
        return list(by_xs)

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


class Derivative(Program):
    """The derivative of any program: of its inputs and cotangents, its derivatives by the inputs."""

    def __init__(self, program: Program, present: list[bool]) -> None:
        self.job, self.program, self.present = program.job, program, present

    def differs(self) -> list[bool]:
        """Return by what it may be differentiated."""
        return [*self.program.differs(), *(True for p in self.present if p)]

    def values(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Evaluate it."""
        return self._evaluated(tensors, create_graph=False)

    def recorded(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Evaluate it where a graph is recorded."""
        return self._evaluated(tensors, create_graph=True)

    def _evaluated(self, tensors: Sequence[Tensor], create_graph: bool) -> list[Tensor]:
        differs = self.program.differs()
        inputs, cotangents = tensors[: len(differs)], tensors[len(differs) :]
        if self.job.functional:
            return self._functional(inputs, cotangents)
        rest = iter(cotangents)
        seeds = [next(rest) if p else None for p in self.present]
        at = self._at_consts()
        with torch.enable_grad():
            given = [
                self.job.consts[at[i]]
                if i in at
                else (t.view_as(t) if t.requires_grad and create_graph else _leaf(t, d))
                for i, (t, d) in enumerate(zip(inputs, differs))
            ]
            outputs = self.program.recorded(given)
        pairs = [
            (output, seed)
            for output, seed in zip(outputs, seeds)
            if seed is not None and output.requires_grad
        ]
        by = [t for t, d in zip(given, differs) if d]
        if not pairs:
            return [torch.zeros_like(t) for t in by]
        grads = torch.autograd.grad(
            [output for output, _ in pairs],
            by,
            [seed for _, seed in pairs],
            create_graph=create_graph,
            retain_graph=create_graph or self.job.keeps_outside,
            allow_unused=True,
        )
        return [torch.zeros_like(t) if g is None else g for t, g in zip(by, grads)]

    def _functional(
        self, inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
    ) -> list[Tensor]:
        at = [i for i, d in enumerate(self.program.differs()) if d]

        def outputs(*by: Tensor) -> tuple[Tensor, ...]:
            here = list(inputs)
            for i, tensor in zip(at, by):
                here[i] = tensor
            results = self.program.recorded(here)
            return tuple(r for r, p in zip(results, self.present) if p)

        _, pull = torch.func.vjp(outputs, *(inputs[i] for i in at))
        return list(pull(tuple(cotangents)))

    def _at_consts(self) -> dict[int, int]:
        first = len(self.job.carry_at) + len(self.job.xs_at)
        return {first + i: i for i in range(len(self.job.consts))}


class Pushed(Program):
    """The derivative of any program along a direction, under torch.func."""

    def __init__(self, program: Program, present: list[bool]) -> None:
        self.job, self.program, self.present = program.job, program, present
        self.smooth: list[bool] = []

    def differs(self) -> list[bool]:
        """Return by what it may be differentiated."""
        return [*self.program.differs(), *(True for p in self.present if p)]

    def values(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Evaluate it."""
        return self.recorded(tensors)

    def recorded(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Evaluate it where a graph is recorded."""
        n = len(self.present)
        inputs, tangents = tensors[:n], tensors[n:]
        at = [i for i, p in enumerate(self.present) if p]

        def outputs(*along: Tensor) -> tuple[Tensor, ...]:
            here = list(inputs)
            for i, tensor in zip(at, along):
                here[i] = tensor
            results = self.program.recorded(here)
            self.smooth = [_is_smooth(r) for r in results]
            return tuple(r for r, smooth in zip(results, self.smooth) if smooth)

        _, pushed = torch.func.jvp(outputs, tuple(inputs[i] for i in at), tuple(tangents))
        return list(pushed)


def _leaf(tensor: Tensor, differs: bool) -> Tensor:
    return tensor.detach().requires_grad_(differs)


def _fresh(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return outputs that are no views of inputs, nor of each other."""
    seen = {id(t) for t in inputs}
    result = []
    for tensor in outputs:
        if id(tensor) in seen or tensor._is_view():
            tensor = tensor.clone()
        seen.add(id(tensor))
        result.append(tensor)
    return result
