"""Differentiate a loop in forward mode, for few meta-parameters."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchopt.base.frozen_function import frozen
from torchopt.base.misuse.given import given
from torchopt.base.torch_internals import peek_interpreter_stack
from torchopt.diff.replay.alike import unknown_error
from torchopt.diff.replay.job import Job, is_smooth
from torchopt.diff.replay.loop import Loop
from torchopt.diff.replay.nodes import Program, apply
from torchopt.diff.replay.programs import Pull, Steps, fresh
from torchopt.diff.replay.random_state import RandomState
from torchopt.diff.replay.records import Point
from torchopt.diff.replay.run import is_recorded, prepared, refuse_levels, results_of
from torchopt.diff.replay.schedules import Segments
from torchopt.diff.replay.store import MemoryStore
from torchopt.diff.replay.watch import Substituted, requires_grad


@dataclass(frozen=True)
class Forward:
    r"""Carry the derivatives along with the loop, in forward mode.

    .. math::
        Z_0 = \frac{d c_0}{d \theta}, \qquad
        Z_{t+1} = \frac{\partial c_{t+1}}{\partial c_t} Z_t
                + \frac{\partial c_{t+1}}{\partial \theta}

    Memory does not grow with the number of steps; it is that of :math:`n` carries, and each step
    costs about :math:`1 + n` of its own, for :math:`n` numbers to differentiate by: those of the
    start, of ``xs`` and of tensors that the step closes over, as far as they require grad. It
    pays for a handful of hyperparameters and many steps. The first derivative is exact, and so
    are higher ones, which are computed by replaying the loop as ``Checkpointed("log")`` does.

    All directions are pushed at once by ``torch.func.vmap`` and ``jvp``, so the step must be one
    that these take: gradients inside by ``torch.func.grad``.

    Args:
        most: Refuse to differentiate by more numbers than this.

    Raises:
        TypeError: If ``most`` is no integer.
        ValueError: If it is less than 1; and from ``unroll``, if there are more numbers.
        RuntimeError: From ``unroll``: if an operation of the step has no forward derivative, naming
            it; if the step calls ``torch.autograd.grad``; inside ``torch.func`` or
            ``torch.compile``.

    Example:
        >>> import torch
        >>> from torchopt.diff import Forward, unroll
        >>> lr = torch.tensor(0.5, requires_grad=True)
        >>> step = lambda w, _: (w - lr * w, None)
        >>> w, _ = unroll(step, torch.tensor(1.0), length=3, adjoint=Forward())
        >>> torch.autograd.grad(w, lr)  # -3 (1 - lr) ** 2
        (tensor(-0.7500),)

    Reference:
        Franceschi et al., Forward and Reverse Gradient-Based Hyperparameter Optimization, ICML
        2017.
    """

    most: int = 64

    def __post_init__(self) -> None:
        if not isinstance(self.most, int) or isinstance(self.most, bool):
            raise TypeError(f"most must be an integer, got {given(self.most)}.")
        if self.most < 1:
            raise ValueError(f"most must be >= 1, got {self.most}.")

    def run(self, loop: Loop) -> tuple[list[Any], list[Any]]:
        """Run the loop as one node of the graph, which holds its derivatives."""
        if not torch.is_grad_enabled():
            return loop.plain()
        refuse_levels(self)
        if not is_recorded(loop):
            return loop.plain()
        if peek_interpreter_stack() is not None:
            raise RuntimeError(
                f"unroll(..., adjoint={self!r}) is for torch.autograd. Inside torch.func write "
                "torch.func.jacfwd around a loop with adjoint=Unrolled(), which is the same."
            )
        job = prepared(loop, lambda length: Segments(length, 1), MemoryStore)
        tensors = [*job.carry, *job.xs, *job.consts]
        by = [t.requires_grad and is_smooth(t) for t in tensors]
        number = sum(t.numel() for t, b in zip(tensors, by) if b)
        if not number:
            return loop.plain()
        if any(t.is_complex() for t, b in zip(tensors, by) if b):
            raise ValueError(
                f"{self!r} differentiates by real numbers only, and a tensor that requires grad is "
                "complex. Use Checkpointed()."
            )
        if number > self.most:
            raise ValueError(
                f"{self!r} would differentiate by {number} numbers, at {1 + number} times the cost "
                "of the loop. Use Checkpointed(), whose cost does not depend on how many there "
                f"are; or Forward(most={number})."
            )
        if job.calls:
            raise RuntimeError(
                f"unroll(..., adjoint={self!r}) needs a step that computes its gradients by "
                "torch.func.grad; this one calls torch.autograd.grad, which forward mode does "
                "not pass through."
            )
        read = job.watched.read
        job.watched = job.begun = None  # which would hold the graph of a step, and a carry
        program = _Along(job, Point(job.rest(loop.start), RandomState.now(job.devices)), by, read)
        results = apply(program, tensors)
        loop.step = frozen(loop.step)  # for higher derivatives
        return results_of(job, program, results)


class _Along(Steps):
    """The steps, with their derivatives along all directions."""

    def __init__(self, job: Job, point: Point, by: list[bool], read: list[Tensor]) -> None:
        super().__init__(job, point, job.loop.length, first=True)
        self.by, self.read = by, read
        self.pushed: list[Tensor | None] = []  # of each result, by all directions

    def values(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Take the steps and push all directions through them."""
        job, along = self.job, _directions(tensors, self.by)
        carry, xs, consts = job.split(tensors)
        push, push_x, push_const = job.split(along)
        leaves, rows, rows_along = job.leaves(carry, self.point), [], []
        for t in range(self.length):
            step = _Step(job, leaves, self.read)
            given_x = [*push, *(x if x is None else x[:, t] for x in push_x), *push_const]
            push, along_y = step.along([*job.tensors(leaves), *job.row(xs, t), *consts], given_x)
            leaves = step.leaves
            rows.append(step.y)
            rows_along.append(along_y)
        self.end = Point(job.rest(leaves), RandomState.now(job.devices, self.point.random))
        ys = [y for y in job.loop.stacked(rows) if y is not None]
        stacked = [
            None if any(x is None for x in column) else torch.stack(column, 1)
            for column, like in zip(zip(*rows_along), job.loop.y_likes)
            if like is not None
        ]
        self.pushed = [*push, *stacked]
        return fresh([*job.tensors(leaves), *ys], tensors)

    def constant(self) -> list[bool]:
        """Return which results have no derivative: neither in the first step nor in a later one."""
        differ = self.job.results_differ
        return [
            not d and (z is None or not z.any()) for d, z in zip(differ, self.pushed, strict=True)
        ]

    def derivative(self, present: list[bool]) -> Program:
        """Return the product of cotangents and the derivatives."""
        return _Product(self, present)


class _Product(Pull):
    """The product of cotangents and derivatives; derived further, that of the way back."""

    def __init__(self, along: _Along, present: list[bool]) -> None:
        super().__init__(along.job, along.point, along.length, present, None)
        self.along = along

    def values(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Contract each cotangent with what has been pushed to its result."""
        n = len(self.job.differs())
        total: Tensor | None = None
        pushed = [z for z, p in zip(self.along.pushed, self.present) if p]
        for z, cotangent in zip(pushed, tensors[n:]):
            if z is not None:
                part = z.reshape(z.shape[0], -1).conj() @ cotangent.flatten()
                part = part.real if part.is_complex() else part
                total = part if total is None else total + part
        results, at = [], 0
        for tensor, differs, by in zip(tensors, self.job.differs(), self.along.by):
            if not differs:
                continue
            if not by or total is None:
                results.append(torch.zeros_like(tensor))
            else:
                piece = total[at : at + tensor.numel()]
                results.append(piece.view(tensor.shape).to(tensor.dtype))
            at += tensor.numel() if by else 0
        return results


class _Step:
    """One step as a function of flat tensors."""

    def __init__(self, job: Job, leaves: list[Any], read: list[Tensor]) -> None:
        self.job, self.leaves, self.read = job, leaves, read
        self.y: list[Any] = []

    def _refuse(self, tensor: Tensor) -> None:
        raise unknown_error(self.job, tensor)

    def along(
        self, tensors: list[Tensor], along: list[Tensor | None]
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Take the step; return the derivatives of the carry's tensors and of the leaves of y."""
        job, at = self.job, [i for i, z in enumerate(along) if z is not None]

        def results(*moved: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
            here = list(tensors)
            for i, tensor in zip(at, moved):
                here[i] = tensor
            carry, xs, consts = job.split(here)
            start = list(self.leaves)
            for i, tensor in zip(job.carry_at, carry):
                start[i] = tensor
            checked = self.read, self._refuse, requires_grad
            substituted = Substituted(job.consts, consts, *checked)
            with job.autocast.again(), substituted:
                new, y = job.loop.take(start, job.from_row(xs) if xs else job.x((), 0))
            outputs = [*job.tensors(new), *y]
            smooth = [isinstance(x, Tensor) and is_smooth(x) for x in outputs]
            kept.append((new, y, smooth))
            values = tuple(x for x in outputs if isinstance(x, Tensor))
            return tuple(x for x, s in zip(outputs, smooth) if s), values

        kept: list[Any] = []

        def push(*directions: Tensor) -> Any:
            primals = tuple(tensors[i] for i in at)
            return torch.func.jvp(results, primals, directions, has_aux=True)[1:]

        directions = [z for z in along if z is not None]
        try:
            dims: Any = (0, None)  # the values are the same for all directions
            pushed, values = torch.func.vmap(push, out_dims=dims, randomness="same")(*directions)
        except RuntimeError as error:  # NotImplementedError is one
            found = re.search(r"forward AD with (\S+) that|vmap over (\S+), but", str(error))
            if found is None:
                raise
            raise RuntimeError(_without_forward(found[1] or found[2])) from error
        new, y, smooth = kept[-1]
        rest = iter(values)
        flat = [next(rest) if isinstance(x, Tensor) else x for x in (*job.tensors(new), *y)]
        n = len(job.carry_at)
        self.leaves = list(new)
        for i, tensor in zip(job.carry_at, flat[:n]):
            self.leaves[i] = tensor
        self.y = flat[n:]
        moved = iter(pushed)
        all_moved = [next(moved) if s else None for s in smooth]
        return all_moved[:n], all_moved[n:]


def _directions(tensors: Sequence[Tensor], by: list[bool]) -> list[Any]:
    """Return, for each tensor, its part of all unit directions; ``None`` where it has none."""
    number = sum(t.numel() for t, b in zip(tensors, by) if b)
    result, at = [], 0
    for tensor, b in zip(tensors, by):
        if not b:
            result.append(None)
            continue
        flat = torch.zeros(number, tensor.numel(), dtype=tensor.dtype, device=tensor.device)
        flat[at : at + tensor.numel()].fill_diagonal_(1)
        result.append(flat.view(number, *tensor.shape))
        at += tensor.numel()
    return result


def _without_forward(name: str) -> str:
    return (
        f"Forward() cannot differentiate this step: {name} has no derivative in forward mode, or "
        "none for many directions at once (vmap). Use Checkpointed(), which needs none, or another "
        "operation (of attention: torch.nn.attention.sdpa_kernel(SDPBackend.MATH))."
    )
