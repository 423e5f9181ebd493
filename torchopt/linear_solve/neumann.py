"""The Neumann series: an inverse by powers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Union

import torch
from torch import Tensor

from torchopt.base.misuse.given import given
from torchopt.linear_solve.outcome import Outcome, code_of
from torchopt.linear_solve.solver import LinearSolver, OnFailure
from torchopt.linear_solve.system import CONVERGED, Solved, System
from torchopt.linear_solve.vectors import anything, norm, over


@dataclass(frozen=True, kw_only=True)
class Neumann(LinearSolver):
    """The Neumann series; made by :func:`solve_neumann`."""

    step: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step is not None and not (isinstance(self.step, (int, float)) and self.step > 0):
            raise ValueError(f"step must be a number > 0 or None, got {given(self.step)}.")

    def run(self, system: System) -> Solved:
        """Add terms until the residual, which is the last term over the step, is small."""
        b = system.b
        x, r = system.begun()
        step = largest_step(system) if self.step is None else torch.full_like(b[..., :1], self.step)
        term = step * r
        count, code = system.zeros(), system.zeros()
        first = norm(term)
        last = first
        while True:
            size = norm(term)
            code = torch.where((code == 0) & (size <= step * system.tol), CONVERGED, code)
            finite = torch.isfinite(size)
            code = torch.where((code == 0) & ~finite, code_of(Outcome.NON_FINITE), code)
            # a series that converges may grow at first, where A is not symmetric
            grown = (code == 0) & (size > 1e4 * first)
            code = torch.where(grown, code_of(Outcome.DIVERGED), code)
            late = (code == 0) & (count >= system.maxiter)
            code = torch.where(late, code_of(Outcome.MAX_STEPS), code)
            going = code == 0
            if not anything(going):
                break
            x = torch.where(going, x + term, x)
            last = torch.where(going, size, last)
            count = count + going
            term = torch.where(going, term - step * system.product(term), term)
        return Solved(x, count, code, extra=last)


def largest_step(system: System, steps: int = 20) -> Tensor:
    r"""Return :math:`1 / \lVert A \rVert_2`, estimated by power iteration, ``(*batch, 1)``.

    The estimate is from below, so that the step may be too long by some percent; the series of a
    positive definite operator converges for steps up to twice as long.
    """
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(system.n, generator=generator, dtype=torch.float64).to(system.b)
    v = v.expand_as(system.b)
    symmetric = "symmetric" in system.tags
    size = norm(v)
    for _ in range(steps):
        v = over(v, norm(v))
        w = system.product(v)
        size = norm(w)
        v = w if symmetric else system.adjoint(w)
    return torch.where(size > 0, over(torch.ones_like(size), size), 1.0)


def solve_neumann(
    *,
    rtol: float | None = None,
    atol: float = 0.0,
    maxiter: int | None = None,
    step: float | None = None,
    ridge: Union[float, Tensor, None] = None,
    on_failure: OnFailure = "warn",
) -> Neumann:
    r"""Solve systems by the Neumann series, or approximate their solution by some terms of it.

    .. math:: x = \alpha \sum_{k=0}^{K-1} (I - \alpha (A + \lambda I))^k\, b

    It converges where all eigenvalues of :math:`I - \alpha A` are smaller than one, by a factor of
    about :math:`1 - 1/\kappa` a term: for a condition number of 100, 100 terms leave a third of the
    slowest part. With ``maxiter=K`` and ``on_failure="ignore"`` it is the approximation by ``K``
    terms of hypergradients; the derivative of the result then is approximate, too.
    ``solve(...).extra`` is the norm of the last term that was added, and ``residual`` the norm of
    :math:`b - A x`.

    Args:
        rtol: Solved where :math:`\lVert b - A x \rVert_2 \le \max(\text{rtol}\, \lVert b \rVert_2,
            \text{atol})`, as for :func:`solve_cg`.
        atol: Absolute tolerance, in the units of ``b``.
        maxiter: :math:`K`, the most terms; ``None`` as for :func:`solve_cg`.
        step: :math:`\alpha > 0`; ``None`` is one over the norm of :math:`A`, estimated by 20 steps
            of power iteration.
        ridge: :math:`\lambda`, a number >= 0 or a 0-d tensor, which may be learned.
        on_failure: ``"warn"``, ``"raise"`` or ``"ignore"`` where it was not solved. Terms that grow
            end it as ``DIVERGED``.

    Returns:
        ``solver(matvec, b, *, init=None) -> x``; see :class:`LinearSolver`.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If a number is out of bounds.

    Example:
        >>> import torch, torchopt
        >>> A = torch.tensor([[1.0, 0.5], [0.0, 1.0]])
        >>> solver = torchopt.linear_solve.solve_neumann(step=1.0)
        >>> solution = solver.solve(lambda v: A @ v, torch.tensor([1.0, 2.0]))
        >>> solution.x, solution.iterations
        (tensor([0., 2.]), 2)

    Reference:
        Lorraine, Vicol and Duvenaud, Optimizing millions of hyperparameters by implicit
        differentiation, AISTATS 2020.
    """
    return Neumann(
        rtol=rtol, atol=atol, maxiter=maxiter, step=step, ridge=ridge, on_failure=on_failure
    )
