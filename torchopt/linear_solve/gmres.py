"""Generalised minimal residuals, restarted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Union

import torch
from torch import Tensor

from torchopt.linear_solve.outcome import Outcome, code_of
from torchopt.linear_solve.solver import LinearSolver, OnFailure, check_count
from torchopt.linear_solve.system import Cycle, Solved, System, restarted
from torchopt.linear_solve.vectors import anything, norm, over
from torchopt.typing import TensorTree


@dataclass(frozen=True, kw_only=True)
class GMRES(LinearSolver):
    """Generalised minimal residuals; made by :func:`solve_gmres`."""

    restart: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("restart", self.restart, 1)

    def run(self, system: System) -> Solved:
        """Iterate, each time for ``restart`` vectors."""

        def cycle(r: Tensor, tol: Tensor, going: Tensor, most: int) -> Cycle:
            return _Arnoldi(system, r, min(self.restart, system.n, most)).run(tol, going)

        return restarted(system, cycle, least_fall=0.999)


class _Arnoldi:
    r"""One cycle: orthonormal vectors :math:`A M V_k = V_{k+1} H`, and the least residual in them.

    .. math:: d = M V_k\, y, \qquad y = \text{arg}\min_y \lVert \beta e_1 - H y \rVert

    :math:`H` is kept as :math:`Q H = R`, by one rotation for each new column. Where a system is
    done, its further columns are unit vectors and change nothing.

    Reference:
        Saad and Schultz, GMRES: a generalized minimal residual algorithm, SIAM Journal on
        Scientific and Statistical Computing 7, 1986; orthogonalised twice, as in Saad, Iterative
        Methods for Sparse Linear Systems, 2nd edition, section 6.3.2.
    """

    def __init__(self, system: System, r: Tensor, size: int) -> None:
        self.system, self.size, self.beta = system, size, norm(r)
        batch = r.shape[:-1]
        self.vectors = r.new_zeros(*batch, size + 1, r.shape[-1])
        self.vectors[..., 0, :] = over(r, self.beta)
        self.upper = r.new_zeros(*batch, size + 1, size)
        self.turn = torch.eye(size + 1, dtype=r.dtype, device=r.device).repeat(*batch, 1, 1)
        self.count = system.zeros()
        self.reason = system.zeros()  # why a system ended too early

    def run(self, tol: Tensor, going: Tensor) -> Cycle:
        """Add vectors until all systems are done, and return the corrections."""
        for j in range(self.size):
            estimate = (self.beta * self.turn[..., j, :1]).abs()
            going = going & (estimate > tol) & (self.reason == 0)
            if not anything(going):
                self.upper[..., j:, j:] += torch.eye(
                    self.size + 1, dtype=tol.dtype, device=tol.device
                )[j:, j : self.size]
                break
            going = self._extend(j, going)
        right = self.beta * self.turn[..., : self.size, 0]
        places = torch.arange(self.size, device=tol.device)
        right = torch.where(places < self.count, right, 0.0).unsqueeze(-1)
        square = self.upper[..., : self.size, :]
        y = torch.linalg.solve_triangular(square, right, upper=True)
        step = (self.vectors[..., : self.size, :].mT @ y).squeeze(-1)
        return Cycle(self.system.precondition(step), self.count, self.system.zeros(), self.reason)

    def _extend(self, j: int, going: Tensor) -> Tensor:
        """Add one vector; return which systems go on."""
        known = self.vectors[..., : j + 1, :]
        w = self.system.product(self.system.precondition(self.vectors[..., j, :]))
        before, h = norm(w), 0.0
        for _ in range(2):
            part = known @ w.unsqueeze(-1)
            w = w - (known.mT @ part).squeeze(-1)
            h = h + part.squeeze(-1)
        eps = torch.finfo(w.dtype).eps
        after = norm(w)
        after = torch.where(after <= 10 * eps * before, 0.0, after)
        column = torch.zeros_like(self.upper[..., 0])
        column[..., : j + 1], column[..., j + 1 : j + 2] = h, after
        column = (self.turn @ column.unsqueeze(-1)).squeeze(-1)
        a, b = column[..., j : j + 1], column[..., j + 1 : j + 2]
        radius = torch.hypot(a, b)
        # the new product depends on the old ones: A is singular on what was reached
        lost = going & ~(radius > 1e3 * eps * before)
        fine = torch.isfinite(before)
        reason = torch.where(fine, code_of(Outcome.SINGULAR), code_of(Outcome.NON_FINITE))
        self.reason = torch.where(lost, reason, self.reason)
        taken = going & ~lost
        self._rotate(j, taken, over(a, radius), over(b, radius))
        column[..., j : j + 1], column[..., j + 1 : j + 2] = radius, 0.0
        unit = torch.zeros_like(column)
        unit[..., j] = 1.0
        self.upper[..., j] = torch.where(taken, column, unit)
        self.vectors[..., j + 1, :] = torch.where(taken, over(w, after), 0.0)
        self.count = self.count + taken
        return taken

    def _rotate(self, j: int, taken: Tensor, cos: Tensor, sin: Tensor) -> None:
        first, second = self.turn[..., j, :].clone(), self.turn[..., j + 1, :].clone()
        self.turn[..., j, :] = torch.where(taken, cos * first + sin * second, first)
        self.turn[..., j + 1, :] = torch.where(taken, cos * second - sin * first, second)


def solve_gmres(
    *,
    rtol: float | None = None,
    atol: float = 0.0,
    maxiter: int | None = None,
    restart: int = 50,
    ridge: Union[float, Tensor, None] = None,
    preconditioner: Any = None,
    init: TensorTree | None = None,
    on_failure: OnFailure = "warn",
) -> GMRES:
    r"""Solve any systems by generalised minimal residuals.

    .. math::
        x_k = \text{arg}\min_{x \in x_0 + \mathcal K_k} \lVert b - (A + \lambda I)\, x \rVert_2

    in the Krylov space :math:`\mathcal K_k` of the first residual. One product for each iteration,
    ``restart`` + 1 vectors of memory. With as many vectors as there are unknowns it solves every
    regular system; with fewer it may stagnate, and says so.

    Args:
        rtol: Solved where :math:`\lVert b - A x \rVert_2 \le \max(\text{rtol}\, \lVert b \rVert_2,
            \text{atol})`, as for :func:`solve_cg`.
        atol: Absolute tolerance, in the units of ``b``.
        maxiter: Most iterations, one product each, all cycles together; ``None`` as for
            :func:`solve_cg`.
        restart: After how many vectors to start over, >= 1.
        ridge: :math:`\lambda`, a number >= 0 or a 0-d tensor, which may be learned.
        preconditioner: An operator that approximates :math:`A^{-1}`; applied from the right, so
            that residuals are those of the system.
        init: Where to begin if a call says nothing.
        on_failure: ``"warn"``, ``"raise"`` or ``"ignore"`` where it was not solved.

    Returns:
        ``solver(matvec, b, *, init=None) -> x``; see :class:`LinearSolver`.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If a number is out of bounds.

    Example:
        >>> import torch, torchopt
        >>> A = torch.tensor([[0.0, 2.0], [-1.0, 1.0]])
        >>> x = torchopt.linear_solve.solve_gmres()(lambda v: A @ v, torch.tensor([2.0, 0.0]))
        >>> torch.allclose(x, torch.ones(2))
        True

    Reference:
        Saad and Schultz, GMRES: a generalized minimal residual algorithm for solving nonsymmetric
        linear systems, SIAM Journal on Scientific and Statistical Computing 7, 1986.
    """
    return GMRES(
        rtol=rtol,
        atol=atol,
        maxiter=maxiter,
        restart=restart,
        ridge=ridge,
        preconditioner=preconditioner,
        init=init,
        on_failure=on_failure,
    )
