"""A batch of linear systems as the algorithms see it, and what they return."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from torchopt.linear_solve.outcome import Outcome, code_of
from torchopt.linear_solve.product import Map
from torchopt.linear_solve.vectors import anything, norm


CONVERGED = code_of(Outcome.CONVERGED)


class Remembering(Protocol):
    """What remembers a solution."""

    def fitted(self, b: Tensor, product: Map) -> tuple[Tensor, Tensor] | None:
        """Return where to begin, and the residual there."""
        ...

    def keep(self, x: Tensor, iterations: int) -> None:
        """Keep a solution."""
        ...

    def part(self, name: str) -> Remembering:
        """Return what remembers the solutions that a derivative asks for."""
        ...


@dataclass(frozen=True)
class System:
    """Systems :math:`A x = b`, one for each entry of the batch dimensions; nothing is recorded.

    Attributes:
        product: The product with :math:`A` of vectors ``(*batch, n)``.
        adjoint: That with its adjoint.
        b: The right-hand sides.
        start: Where to begin, or ``None`` for zero.
        precondition: An approximate inverse.
        tol: The largest norm of a residual, ``(*batch, 1)``.
        maxiter: Most iterations.
        tags: What is promised of :math:`A`.
        is_real: Whether no entry belongs to a complex number.
        memory: Of the solution of a system like this, where to begin if there is no start.
    """

    product: Map
    adjoint: Map
    b: Tensor
    start: Tensor | None
    precondition: Map
    tol: Tensor
    maxiter: int
    tags: frozenset[str]
    is_real: bool
    memory: Remembering | None = None

    @property
    def n(self) -> int:
        """How many unknowns there are."""
        return self.b.shape[-1]

    def none(self) -> Tensor:
        """Return a mask that holds nowhere, ``(*batch, 1)``."""
        return torch.zeros_like(self.b[..., :1], dtype=torch.bool)

    def begun(self) -> tuple[Tensor, Tensor]:
        """Return where to begin, and the residual there."""
        b, start = self.b, self.start
        if start is None:
            found = None if self.memory is None else self.memory.fitted(b, self.product)
            return (torch.zeros_like(b), b) if found is None else found
        # a start that is not finite is none
        fine = (norm(b) == 0) | ~torch.isfinite(start).all(-1, keepdim=True)
        x = torch.where(fine, 0.0, start)
        return x, torch.where(fine, b, b - self.product(x))

    def zeros(self, dtype: torch.dtype = torch.int64) -> Tensor:
        """Return one zero for each system, ``(*batch, 1)``."""
        return torch.zeros_like(self.b[..., :1], dtype=dtype)


@dataclass(frozen=True)
class Solved:
    """What an algorithm returns: one row for each system."""

    x: Tensor
    iterations: Tensor
    code: Tensor  #: Of outcomes.
    residual: Tensor | None = None  #: The norm of ``b - A x``; ``None``: to be computed.
    extra: Tensor | None = None  #: A number that the algorithm reports besides.
    method: str | None = None  #: What was chosen to solve it.


@dataclass(frozen=True)
class Cycle:
    """What some iterations found.

    Attributes:
        step: The correction.
        iterations: Their numbers.
        code: Why there is no going on, or 0.
        reason: What to call it if the correction did not help; 0 is ``STAGNATED``.
    """

    step: Tensor
    iterations: Tensor
    code: Tensor
    reason: Tensor | None = None


#: Runs iterations for ``A d = r`` until the norm of a residual is at most ``tol``, at most ``most``
#: of them, only where the mask holds.
CycleOf = Callable[[Tensor, Tensor, Tensor, int], Cycle]

#: Whether a step, between two residuals ``(step, r, new_r)``, led nearer to the solution by the
#: measure that a method makes smaller and smaller.
Nearer = Callable[[Tensor, Tensor, Tensor], Tensor]


def restarted(
    system: System,
    cycle: CycleOf,
    least_fall: float = 0.5,
    cycles: int = 0,
    nearer: Nearer | None = None,
) -> Solved:
    """Run iterations until the true residual is small; the loop around all Krylov methods.

    What an iteration believes of its residual drifts from the truth, in float32 soon. So whenever
    it believes to be done, ``b - A x`` is recomputed, and the iterations go on from there. A
    correction that makes it worse is not taken. Worse is a larger norm of the residual, unless
    the method is one that makes another measure smaller: then the residual may rise for a long
    time on a good way, and a correction that made that measure smaller is taken, too, provided
    that the iterations met nothing that they are not made for.

    Args:
        system: The systems.
        cycle: The iterations.
        least_fall: A cycle after which the residual is larger than this times the one before has
            stagnated.
        cycles: How many such cycles in a row end it, beyond one.
        nearer: The measure; ``None`` is the norm of the residual.
    """
    b = system.b
    x, r = system.begun()
    size = norm(r)
    iterations, code, idle = system.zeros(), system.zeros(), system.zeros()
    while True:
        code = _judge(system, size, iterations, code)
        going = code == 0
        if not anything(going):
            break
        left = system.maxiter - int(iterations[going].min())
        found = cycle(r, torch.where(going, system.tol, math.inf), going, left)
        new_x = x + torch.where(going, found.step, 0.0)
        new_r = b - system.product(new_x)
        new_size = norm(new_r)
        iterations = iterations + torch.where(going, found.iterations, 0)
        better = new_size < size
        if nearer is not None:
            led = nearer(found.step, r, new_r) & (found.code == 0)
            better = better | (led & torch.isfinite(new_size))
        better = going & better
        slow = going & ~(new_size <= torch.clamp_min(least_fall * size, 0))
        idle = torch.where(slow, idle + 1, 0)
        x, r = torch.where(better, new_x, x), torch.where(better, new_r, r)
        failed = going & (found.code != 0)
        stuck = going & (idle > cycles)
        size = torch.where(better, new_size, size)
        code = torch.where(failed & (size > system.tol), found.code, code)
        burst = going & (code == 0) & ~torch.isfinite(new_size)
        # of finite numbers the iteration itself made others: it divided by almost nothing
        whole = torch.isfinite(found.step).all(-1, keepdim=True)
        kind = torch.where(whole, code_of(Outcome.NON_FINITE), code_of(Outcome.BREAKDOWN))
        code = torch.where(burst, kind, code)
        stuck = stuck & (size > system.tol) & (code == 0)
        over = iterations >= system.maxiter
        ended = torch.where(over, code_of(Outcome.MAX_STEPS), code_of(Outcome.STAGNATED))
        if found.reason is not None:
            ended = torch.where(found.reason != 0, found.reason, ended)
        code = torch.where(stuck, ended, code)
    return Solved(x, iterations, code, size)


def _judge(system: System, size: Tensor, iterations: Tensor, code: Tensor) -> Tensor:
    """Return codes with those of systems that are done."""
    code = torch.where((code == 0) & (size <= system.tol), CONVERGED, code)
    bad = (code == 0) & ~torch.isfinite(size)
    code = torch.where(bad, code_of(Outcome.NON_FINITE), code)
    late = (code == 0) & (iterations >= system.maxiter)
    return torch.where(late, code_of(Outcome.MAX_STEPS), code)
