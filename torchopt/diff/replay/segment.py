"""Some steps with their graph, which is gone back through at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchopt.diff.gradient import vjp
from torchopt.diff.replay.alike import refuse_dependent, refuse_unknown
from torchopt.diff.replay.loop import apart


Job = Any  # which imports this file
Grads = list["Tensor | None"]


class Pulled(NamedTuple):
    """Derivatives of some steps by their tensors, ``None`` where there is none."""

    carry: Grads  #: By the tensors of the carry.
    rows: list[Grads]  #: By those of each step's input.
    consts: Grads  #: By those that are closed over.


class Segment:
    """Some steps in a row, each taken from where the one before it has ended.

    Args:
        job: The loop.
        leaves: Those of the carry that the first of them starts from.
        consts: What a step reads instead of what it closes over.
        create_graph: Whether its inputs are part of a graph themselves.
    """

    def __init__(
        self, job: Job, leaves: Sequence[Any], consts: Sequence[Tensor], create_graph: bool
    ) -> None:
        self.job, self.create_graph = job, create_graph
        self.start, self.leaves = leaves, list(leaves)
        self.ys: list[list[Any]] = []
        self.given: list[Tensor] = job.tensors(self.leaves)
        self.rows: list[list[Tensor]] = []
        self.consts = list(consts)
        #: All inputs, those that a step is given anew in the middle too.
        self.own: list[Tensor] = []
        if job.functional:  # a graph ends with its level: the way back takes the step
            return
        with job.at_its_level():
            self.given = _inputs(self.given, job.carry_differs, create_graph)
            if job.replaces:
                self.consts = _inputs(self.consts, [True] * len(self.consts), create_graph)
                self.own += self.consts
        self.own += self.given
        self._go_on_from(self.given)

    def __len__(self) -> int:
        return len(self.rows)

    def _go_on_from(self, tensors: Sequence[Tensor]) -> None:
        for i, tensor in zip(self.job.carry_at, tensors):
            self.leaves[i] = tensor

    def take(self, row: Sequence[Tensor]) -> None:
        """Take the next step.

        Raises:
            RuntimeError: If a leaf depends on what it did not depend on in the first step.
        """
        if self.job.functional:
            self.rows.append(list(row))
        else:
            refuse_dependent(self.job, self.step(row))

    def step(self, row: Sequence[Tensor]) -> list[Any]:
        """Take the next step, and return its results."""
        job = self.job
        with job.at_its_level():
            if self.rows:
                self._go_on_from(self._connected())
            inputs = _inputs(row, job.xs_differ, self.create_graph)
        self.own += inputs
        self.rows.append(inputs)
        self.leaves, y = self._taken(self.leaves, inputs)
        self.ys.append(y)
        return [*job.tensors(self.leaves), *y]

    def _connected(self) -> list[Tensor]:
        """Return what the next step is given: as much as it would be given alone."""
        job, tensors = self.job, []
        for tensor, differs in zip(job.tensors(self.leaves), job.carry_differs):
            if tensor.requires_grad != differs:
                tensor = tensor.detach().requires_grad_(differs)
                self.own.append(tensor)
            tensors.append(tensor)
        if not job.calls:
            return tensors
        with torch.enable_grad():
            return apart(tensors)

    def _taken(self, leaves: Sequence[Any], row: Sequence[Tensor]) -> tuple[list[Any], list[Any]]:
        job = self.job
        with torch.enable_grad(), job.at_its_level(), job.reading(self.consts):
            x = job.from_row(row) if row else job.x((), 0)
            return job.loop.take(list(leaves), x)

    def _outputs(self) -> list[Any]:
        return [*self.job.tensors(self.leaves), *(y for ys in self.ys for y in ys)]

    def _again(self) -> tuple[list[Any], list[Tensor]]:
        """Take all steps once more; return their results, and what they were given."""
        other = Segment(self.job, self.start, self.consts, self.create_graph)
        for row in self.rows:
            other.take(row)
        return other._outputs(), other.own

    # Back ----------------------------------------------------------------------------------------

    def pull(self, carry: Grads, ys: Sequence[Grads]) -> Pulled:
        """Return the derivatives of the steps by their tensors.

        Args:
            carry: The cotangents of the tensors of the last carry.
            ys: Those of the leaves of each step's ``y``.

        Raises:
            RuntimeError: If a step depends on a tensor that the first one does not read.
        """
        job = self.job
        if job.functional:
            return self._pull_functional([*carry, *ys[0]])
        outputs = self._outputs()
        if not self.create_graph and job.loop.length > 1:
            refuse_unknown(job, outputs, self.own, self._again)
        pairs = _pairs(outputs, [*carry, *(c for y in ys for c in y)])
        by = [t for t, d in zip(self._tensors(), self._differ()) if d]
        if not pairs or not by:
            return self._placed([None] * len(by))
        results, seeds = zip(*pairs)
        with without_hooks(self.consts):
            keep = self.create_graph or job.keeps_outside
            grads = vjp(results, seeds, by, self.create_graph, keep)
        return self._placed(grads)

    def _tensors(self) -> list[Tensor]:
        return [*self.given, *(x for row in self.rows for x in row), *self.consts]

    def _differ(self) -> list[bool]:
        job = self.job
        of_consts = [True] * len(job.consts)
        return [*job.carry_differs, *(job.xs_differ * len(self.rows)), *of_consts]

    def _placed(self, grads: Sequence[Tensor | None]) -> Pulled:
        """Put derivatives where their tensors are."""
        rest = iter(grads)
        flat = [next(rest) if d else None for d in self._differ()]
        c, x, n = len(self.given), len(self.job.xs_differ), len(self.rows)
        rows = [flat[c + k * x : c + (k + 1) * x] for k in range(n)]
        return Pulled(flat[:c], rows, flat[c + n * x :])

    def _pull_functional(self, cotangents: Grads) -> Pulled:
        """Take the one step, and go back through it."""
        job, leaves = self.job, list(self.leaves)
        flat = self._tensors()
        at = [i for i, d in enumerate(self._differ()) if d]
        wanted = [i for i, c in enumerate(cotangents) if c is not None]

        def outputs(*by: Tensor) -> tuple[Tensor, ...]:
            here = list(flat)
            for i, tensor in zip(at, by):
                here[i] = tensor
            carry, row, others = job.split(here)
            for i, tensor in zip(job.carry_at, carry):
                leaves[i] = tensor
            with job.reading(others):
                new, y = job.loop.take(leaves, job.from_row(row) if row else job.x((), 0))
            results = [*job.tensors(new), *y]
            return tuple(results[i] for i in wanted)

        if not wanted or not at:
            return self._placed([None] * len(at))
        pull = torch.func.vjp(outputs, *(flat[i] for i in at))[1]
        return self._placed(pull(tuple(c for c in cotangents if c is not None)))


@contextlib.contextmanager
def without_hooks(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Let nobody hear of a part of the derivative by tensors: their hooks are for the whole.

    Nor does ``retain_grad`` gather parts, which autograd would do without any hook of Python's.
    """
    held = [(t._backward_hooks, dict(t._backward_hooks)) for t in tensors if t._backward_hooks]
    retained = [(t, t.grad) for t in tensors if t.retains_grad]
    try:
        for hooks, _ in held:
            hooks.clear()
        for tensor, _ in retained:
            tensor.grad = None
        yield
    finally:
        for hooks, content in held:
            hooks.update(content)
        for tensor, grad in retained:
            tensor.grad = grad


def _inputs(tensors: Sequence[Tensor], differ: Sequence[bool], connected: bool) -> list[Tensor]:
    """Return tensors to differentiate by: leaves of the graph, or nodes of their own of one."""
    return [
        tensor.view_as(tensor)
        if d and connected and tensor.requires_grad
        else tensor.detach().requires_grad_(d)
        for tensor, d in zip(tensors, differ)
    ]


def _pairs(
    outputs: Sequence[Any], cotangents: Sequence[Tensor | None]
) -> list[tuple[Tensor, Tensor]]:
    return [
        (output, cotangent)
        for output, cotangent in zip(outputs, cotangents)
        if cotangent is not None and isinstance(output, Tensor) and output.requires_grad
    ]
