"""Solves that begin where the last ones of their kind ended."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchopt.base.misuse.given import given
from torchopt.linear_solve.product import Map
from torchopt.linear_solve.solver import LinearSolution, LinearSolver
from torchopt.linear_solve.vectors import dot, over
from torchopt.typing import TensorTree


class Memory:
    """The last solution of one kind of system, and of the systems that derivatives of it ask for.

    A solution is kept as what the algorithms see: numbers, a row for each system of a batch. So no
    level of ``torch.func`` and no graph lives longer than it should.
    """

    def __init__(self) -> None:
        self.last: Tensor | None = None
        self.iterations = 0  #: Of all solves, the most of a batch each.
        self.parts: dict[str, Memory] = {}

    def part(self, name: str) -> Memory:
        """Return the memory of the systems that another kind of derivative asks for."""
        return self.parts.setdefault(name, Memory())

    def fitted(self, b: Tensor, product: Map) -> tuple[Tensor, Tensor] | None:
        r"""Return the multiple of the last solution with the least residual, and that residual.

        .. math:: x_0 = \alpha x, \qquad \alpha = \frac{\langle A x, b \rangle}{\lVert A x \rVert^2}

        Cotangents change their size from step to step; and so the residual is never larger than
        that of zero, whatever is kept. ``None`` where nothing of the same kind is kept.
        """
        x = self.last
        if x is None or (x.shape, x.dtype, x.device) != (b.shape, b.dtype, b.device):
            return None
        ax = product(x)
        ratio = over(dot(ax, b), dot(ax, ax))
        ratio = torch.where(torch.isfinite(ratio), ratio, 0.0)
        ax = torch.where(ratio == 0, 0.0, ax)  # of what is not finite, too
        return ratio * x, b - ratio * ax

    def keep(self, x: Tensor, iterations: int) -> None:
        """Keep a solution, if all of it is finite."""
        self.iterations += iterations
        if bool(torch.isfinite(x).all()):
            self.last = x.detach().clone()

    def total(self) -> int:
        """Return the iterations of all solves."""
        return self.iterations + sum(part.total() for part in self.parts.values())


class WarmStart:
    r"""A linear solver that begins each solve where the last one ended.

    For loops whose systems change little from step to step, such as the outer loop of a bilevel
    problem: hand one object to all of its steps, ``Implicit(solve=WarmStart(solve_cg()))``. Each
    solve begins at the multiple of the last solution that leaves the least residual, which takes
    one product. What :func:`torchopt.diff.implicit.custom_root` and :class:`torchopt.diff.Implicit`
    ask for in a backward pass, in forward mode and for second derivatives is kept apart, and under
    ``vmap`` each system of a batch begins at its own.

    Where it begins changes the iterations, and the solution by no more than the tolerance. Of a
    solver that is cut off (``maxiter=5``) it changes the result, mostly for the better: it then
    depends on the steps before.

    Args:
        solver: A solver that iterates, such as :func:`solve_cg` makes.

    Attributes:
        solver: As given.

    Raises:
        TypeError: If ``solver`` is no linear solver, or one that solves without iterations.

    Example:
        >>> import torch
        >>> from torchopt.linear_solve import WarmStart, solve_cg
        >>> A = torch.diag(torch.linspace(1, 10, 8))
        >>> b = torch.linspace(1, 2, 8)
        >>> solve = WarmStart(solve_cg())
        >>> first = solve.solve(lambda v: A @ v, b)
        >>> second = solve.solve(lambda v: A @ v, 3 * b)
        >>> first.iterations > second.iterations, solve.iterations == first.iterations
        (True, True)
    """

    def __init__(self, solver: LinearSolver) -> None:
        if not isinstance(solver, LinearSolver):
            raise TypeError(
                f"solver must be a linear solver that iterates, got {given(solver)}. Write "
                "WarmStart(torchopt.linear_solve.solve_cg())."
            )
        if not solver.iterates:
            raise TypeError(
                f"{solver.title}() solves without iterations, so that a start is of no use to it. "
                "Give it as it is, or write WarmStart(torchopt.linear_solve.solve_cg())."
            )
        self.solver = solver
        self._memory = Memory()

    def __call__(self, matvec: Any, b: TensorTree, *, init: TensorTree | None = None) -> TensorTree:
        """Return ``x``, as the solver does."""
        return self.solve(matvec, b, init=init).x

    def solve(self, matvec: Any, b: TensorTree, init: TensorTree | None = None) -> LinearSolution:
        """Return ``x`` with iterations, residual and outcome; ``init`` is taken if it is given."""
        return self.solver.solve(matvec, b, init, memory=self._memory)

    def part(self, name: str) -> WarmStart:
        """Return the same solver for systems of another kind, which are forgotten with this."""
        other = WarmStart(self.solver)
        other._memory = self._memory.part(name)
        return other

    @property
    def iterations(self) -> int:
        """The iterations of all solves since the last :meth:`reset`, derivatives included."""
        return self._memory.total()

    def reset(self) -> None:
        """Forget everything."""
        self._memory = Memory()

    def __repr__(self) -> str:
        return f"WarmStart({self.solver!r})"
