"""Minimal residuals for symmetric systems."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Union

import torch
from torch import Tensor

from torchopt.linear_solve.outcome import Outcome, code_of
from torchopt.linear_solve.solver import LinearSolver, OnFailure
from torchopt.linear_solve.system import Cycle, Solved, System, restarted
from torchopt.linear_solve.vectors import anything, dot, norm, over
from torchopt.typing import TensorTree


@dataclass(frozen=True, kw_only=True)
class MINRES(LinearSolver):
    """Minimal residuals; made by :func:`solve_minres`."""

    def run(self, system: System) -> Solved:
        """Iterate, from the true residual again and again."""

        def cycle(r: Tensor, tol: Tensor, going: Tensor, most: int) -> Cycle:
            return minimal_residuals(system, r, tol, going, most)

        def nearer(step: Tensor, r: Tensor, new_r: Tensor) -> Tensor:
            """Whether the residual fell in the norm of the preconditioner, the one it lowers."""
            return dot(new_r, system.precondition(new_r)) < dot(r, system.precondition(r))

        return restarted(system, cycle, nearer=nearer)


def minimal_residuals(system: System, r: Tensor, tol: Tensor, going: Tensor, most: int) -> Cycle:
    r"""Iterate for :math:`A d = r` with a symmetric :math:`A`, of any signs.

    Lanczos vectors :math:`v_k` make :math:`A` tridiagonal (diagonal :math:`\alpha_k`, beside it
    :math:`\beta_k`); rotations make that upper triangular, and each step adds one direction:

    .. math::
        w_k = \frac{v_k - \epsilon_k w_{k-2} - \delta_k w_{k-1}}{\gamma_k}, \qquad
        d \leftarrow d + \varphi_k w_k

    Reference:
        Paige and Saunders, Solution of sparse indefinite systems of linear equations, SIAM Journal
        on Numerical Analysis 12, 1975; names as in their program.
    """
    eps = torch.finfo(r.dtype).eps
    zero, code, iterations = torch.zeros_like(tol), system.zeros(), system.zeros()
    d, w, w_old, r_old = (torch.zeros_like(r) for _ in range(4))
    y = system.precondition(r)
    square = dot(r, y)
    code = torch.where(going & ~(square > 0), code_of(Outcome.BREAKDOWN), code)
    beta = square.clamp_min(0).sqrt()
    old_beta, dbar, epsilon, size, phibar = zero, zero, zero, zero, beta
    cos, sin = zero - 1, zero
    limit = tol * over(beta, norm(r))  # of the residual in the norm of the preconditioner
    for _ in range(most):
        going = going & (phibar > limit) & (code == 0)
        if not anything(going):
            break
        v = over(y, beta)
        y = system.product(v) - over(beta, old_beta) * r_old
        alpha = dot(v, y)
        y = y - over(alpha, beta) * r
        r_old, r = torch.where(going, r, r_old), torch.where(going, y, r)
        y = torch.where(going, system.precondition(r), y)
        old_beta, square = beta, dot(r, y)
        finite = torch.isfinite(square) & torch.isfinite(alpha)
        code = torch.where(going & ~finite, code_of(Outcome.NON_FINITE), code)
        beta = torch.where(going, square.clamp_min(0).sqrt(), beta)
        size = size + torch.where(going, alpha**2 + old_beta**2 + beta**2, 0.0)
        old_epsilon = epsilon
        delta, gbar = cos * dbar + sin * alpha, sin * dbar - cos * alpha
        epsilon, dbar = sin * beta, -cos * beta
        # the product of A with the residual has vanished, and the residual has not
        flat = going & (torch.hypot(gbar, dbar) <= eps**0.75 * size.sqrt())
        gamma = torch.hypot(gbar, beta)
        code = torch.where(flat & finite, code_of(Outcome.SINGULAR), code)
        going = going & ~flat & finite
        cos, sin = over(gbar, gamma), over(beta, gamma)
        new_w = over(v - old_epsilon * w_old - delta * w, gamma)
        w_old, w = torch.where(going, w, w_old), torch.where(going, new_w, w)
        d = d + torch.where(going, cos * phibar * w, 0.0)
        phibar = torch.where(going, sin.abs() * phibar, phibar)
        iterations = iterations + going
    return Cycle(d, iterations, code)


def solve_minres(
    *,
    rtol: float | None = None,
    atol: float = 0.0,
    maxiter: int | None = None,
    ridge: Union[float, Tensor, None] = None,
    preconditioner: Any = None,
    init: TensorTree | None = None,
    on_failure: OnFailure = "warn",
) -> MINRES:
    r"""Solve symmetric (Hermitian) systems, also indefinite ones, by minimal residuals.

    .. math::
        x_k = \text{arg}\min_{x \in x_0 + \mathcal K_k} \lVert b - (A + \lambda I)\, x \rVert_2

    One product for each iteration, seven vectors of memory. For Hessians at saddle points and
    conditions of optimality with multipliers. Of a singular system that has solutions it finds the
    one of least norm (from ``init=None``); that is a choice, and its derivative is the derivative
    of that choice only as long as the null space does not move. A system without a solution has the
    outcome ``SINGULAR``.

    Args:
        rtol: Solved where :math:`\lVert b - A x \rVert_2 \le \max(\text{rtol}\, \lVert b \rVert_2,
            \text{atol})`, as for :func:`solve_cg`.
        atol: Absolute tolerance, in the units of ``b``.
        maxiter: Most iterations; ``None`` as for :func:`solve_cg`.
        ridge: :math:`\lambda`, a number >= 0 or a 0-d tensor, which may be learned.
        preconditioner: An operator that approximates :math:`|A|^{-1}`, symmetric positive definite.
        init: Where to begin if a call says nothing.
        on_failure: ``"warn"``, ``"raise"`` or ``"ignore"`` where it was not solved.

    Returns:
        ``solver(matvec, b, *, init=None) -> x``; see :class:`LinearSolver`.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If a number is out of bounds.

    Example:
        >>> import torch, torchopt
        >>> A = torch.tensor([[1.0, 2.0], [2.0, -1.0]])
        >>> x = torchopt.linear_solve.solve_minres()(lambda v: A @ v, torch.tensor([3.0, 1.0]))
        >>> torch.allclose(x, torch.ones(2))
        True

    Reference:
        Paige and Saunders, Solution of sparse indefinite systems of linear equations, SIAM Journal
        on Numerical Analysis 12, 1975.
    """
    return MINRES(
        rtol=rtol,
        atol=atol,
        maxiter=maxiter,
        ridge=ridge,
        preconditioner=preconditioner,
        init=init,
        on_failure=on_failure,
    )
