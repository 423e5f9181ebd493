"""Conjugate gradients, and conjugate gradients on the normal equations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Union

import torch
from torch import Tensor

from torchopt.linear_solve.outcome import Outcome, code_of
from torchopt.linear_solve.product import Product
from torchopt.linear_solve.solver import LinearSolver, OnFailure
from torchopt.linear_solve.system import Cycle, Solved, System, restarted
from torchopt.linear_solve.vectors import anything, dot, norm, over
from torchopt.typing import TensorTree


@dataclass(frozen=True, kw_only=True)
class CG(LinearSolver):
    """Conjugate gradients; made by :func:`solve_cg`."""

    def run(self, system: System) -> Solved:
        """Iterate, from the true residual again and again."""

        def cycle(r: Tensor, tol: Tensor, going: Tensor, most: int) -> Cycle:
            return conjugate_gradients(system, r, tol, going, most)

        return restarted(system, cycle, nearer=energy_fell)


def energy_fell(step: Tensor, r: Tensor, new_r: Tensor) -> Tensor:
    r"""Whether a step lowered :math:`\tfrac12 x^T A x - b^T x`, without a product.

    The difference is :math:`-\tfrac12 d^T (r + r')`. It is that of :math:`\tfrac12 e^T A e`, of the
    error :math:`e`, which every iteration of conjugate gradients lowers; the norm of the residual
    may rise all the while.
    """
    return dot(step, r + new_r) > 0


def conjugate_gradients(system: System, r: Tensor, tol: Tensor, going: Tensor, most: int) -> Cycle:
    r"""Iterate for :math:`A d = r` with a symmetric positive definite :math:`A`.

    .. math::
        \alpha &= \frac{r^T z}{p^T A p}, \quad d \leftarrow d + \alpha p, \quad
        r' = r - \alpha A p, \quad z' = M r' \\
        p &\leftarrow z' + \frac{r'^T z'}{r^T z} p

    Reference:
        Saad, Iterative Methods for Sparse Linear Systems, 2nd edition, algorithm 9.1.
    """
    d, z = torch.zeros_like(r), system.precondition(r)
    p, rho = z, dot(r, z)
    code, iterations = system.zeros(), system.zeros()
    steepest, eps = torch.zeros_like(rho), torch.finfo(r.dtype).eps
    for _ in range(most):
        going = going & (norm(r) > tol) & (code == 0)
        if not anything(going):
            break
        ap = system.product(p)
        curvature = dot(p, ap)
        # a direction that the operator takes to nothing, beside those before
        slope = over(norm(ap), norm(p))
        steepest = torch.maximum(steepest, slope)
        finite = torch.isfinite(curvature)
        flat = (slope <= 10 * eps * steepest) & finite
        bad = going & (flat | ~(curvature > 0) | ~finite)
        reason = torch.where(flat, code_of(Outcome.SINGULAR), _reason(curvature, rho))
        code = torch.where(bad, reason, code)
        going = going & ~bad
        alpha = torch.where(going, over(rho, curvature), 0.0)
        d, r = d + alpha * p, r - torch.where(going, alpha * ap, 0.0)
        iterations = iterations + going
        z = system.precondition(r)
        new = dot(r, z)
        p = torch.where(going, z + over(new, rho) * p, p)
        rho = torch.where(going, new, rho)
    return Cycle(d, iterations, code)


def _reason(curvature: Tensor, rho: Tensor) -> Tensor:
    """Return why a direction has no positive curvature."""
    wrong = ~(rho > 0) & torch.isfinite(rho)  # the preconditioner is not positive definite
    fine = torch.isfinite(curvature)
    code = torch.where(fine, code_of(Outcome.NOT_POSITIVE_DEFINITE), code_of(Outcome.NON_FINITE))
    return torch.where(wrong & fine, code_of(Outcome.BREAKDOWN), code)


def solve_cg(
    *,
    rtol: float | None = None,
    atol: float = 0.0,
    maxiter: int | None = None,
    ridge: Union[float, Tensor, None] = None,
    preconditioner: Any = None,
    init: TensorTree | None = None,
    on_failure: OnFailure = "warn",
) -> CG:
    r"""Solve symmetric (Hermitian) positive definite systems by conjugate gradients.

    .. math:: (A + \lambda I)\, x = b

    One product for each iteration, five vectors of memory. It needs at most about
    :math:`\tfrac12 \sqrt{\kappa} \log(2 / \text{rtol})` iterations for a condition number
    :math:`\kappa`. Each lowers the error in the norm :math:`\sqrt{e^T A e}`, but not always the
    norm of the residual: with ``maxiter=5``, as in iMAML, ``x`` is the fifth iterate in any case,
    with the outcome ``MAX_STEPS``.

    Args:
        rtol: Solved where :math:`\lVert b - A x \rVert_2 \le \max(\text{rtol}\, \lVert b \rVert_2,
            \text{atol})`, the Euclidean norm over all leaves together, of the residual computed
            again from ``x``. ``None`` is 1e-10 in float64, 1e-5 in float32, 3e-2 in
            bfloat16 and 5e-3 in float16, by the coarsest leaf.
        atol: Absolute tolerance, in the units of ``b``.
        maxiter: Most iterations; ``None`` is ten times the number of unknowns, at least 5,000 and
            at most 20,000.
        ridge: :math:`\lambda`, a number >= 0 or a 0-d tensor, which may be learned.
        preconditioner: An operator that approximates :math:`A^{-1}`, symmetric positive definite; a
            function or a :class:`LinearOperator`. It changes the way, not the solution.
        init: Where to begin if a call says nothing.
        on_failure: ``"warn"``, ``"raise"`` or ``"ignore"`` where it was not solved.

    Returns:
        ``solver(matvec, b, *, init=None) -> x`` for trees of any shapes; see :class:`LinearSolver`.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If a number is out of bounds.

    Example:
        >>> import torch, torchopt
        >>> solver = torchopt.linear_solve.solve_cg(ridge=1.0)
        >>> A = torch.tensor([[1.0, 1.0], [1.0, 2.0]])
        >>> torch.allclose(solver(lambda v: A @ v, torch.tensor([3.0, 4.0])), torch.ones(2))
        True

    Reference:
        Hestenes and Stiefel, Methods of conjugate gradients for solving linear systems, Journal of
        Research of the National Bureau of Standards 49, 1952.
    """
    return CG(
        rtol=rtol,
        atol=atol,
        maxiter=maxiter,
        ridge=ridge,
        preconditioner=preconditioner,
        init=init,
        on_failure=on_failure,
    )


@dataclass(frozen=True, kw_only=True)
class NormalCG(LinearSolver):
    """Conjugate gradients on the normal equations; made by :func:`solve_normal_cg`."""

    def prepared(self, product: Product, b: Tensor) -> tuple[Product, Tensor]:
        """Return the system; with a ridge, the normal equations as they are written."""
        if self.ridge is None:
            return product, b
        return product.normal().shifted(self.ridge), product.bind(product.values)[1](b)

    def run(self, system: System) -> Solved:
        """Iterate, from the true residual again and again."""

        def cycle(r: Tensor, tol: Tensor, going: Tensor, most: int) -> Cycle:
            if self.ridge is not None:
                return conjugate_gradients(system, r, tol, going, most)
            return least_squares_gradients(system, r, tol, going, most)

        # without a ridge each iteration lowers the norm of the residual itself
        return restarted(system, cycle, nearer=None if self.ridge is None else energy_fell)

    @property
    def title(self) -> str:
        """The name of the function that makes it."""
        return "solve_normal_cg"


def least_squares_gradients(
    system: System, r: Tensor, tol: Tensor, going: Tensor, most: int
) -> Cycle:
    r"""Iterate for :math:`A^H A d = A^H r` without forming the product.

    .. math::
        \alpha &= \frac{s^T z}{\lVert A p \rVert^2}, \quad d \leftarrow d + \alpha p, \quad
        r \leftarrow r - \alpha A p, \quad s = A^H r, \quad z = M s \\
        p &\leftarrow z + \frac{s^T z}{s_\text{old}^T z_\text{old}} p

    Reference:
        Björck, Numerical Methods for Least Squares Problems, SIAM 1996, algorithm 7.4.1 (CGLS).
    """
    d, s = torch.zeros_like(r), system.adjoint(r)
    z = system.precondition(s)
    p, rho, first = z, dot(s, z), norm(s)
    code, iterations = system.zeros(), system.zeros()
    eps = torch.finfo(r.dtype).eps
    for _ in range(most):
        going = going & (norm(r) > tol) & (code == 0)
        # the gradient has vanished and the residual has not: b is not in the range of A
        flat = going & (norm(s) <= 10 * eps * first) & torch.isfinite(norm(s))
        code = torch.where(flat, code_of(Outcome.SINGULAR), code)
        going = going & ~flat
        if not anything(going):
            break
        q = system.product(p)
        square = dot(q, q)
        fine = torch.isfinite(square)
        bad = going & ~((square > 0) & fine)
        reason = torch.where(fine, code_of(Outcome.SINGULAR), code_of(Outcome.NON_FINITE))
        code = torch.where(bad, reason, code)
        going = going & ~bad
        alpha = torch.where(going, over(rho, square), 0.0)
        d, r = d + alpha * p, r - torch.where(going, alpha * q, 0.0)
        iterations = iterations + going
        s = system.adjoint(r)
        z = system.precondition(s)
        new = dot(s, z)
        p = torch.where(going, z + over(new, rho) * p, p)
        rho = torch.where(going, new, rho)
    return Cycle(d, iterations, code)


def solve_normal_cg(
    *,
    rtol: float | None = None,
    atol: float = 0.0,
    maxiter: int | None = None,
    ridge: Union[float, Tensor, None] = None,
    preconditioner: Any = None,
    init: TensorTree | None = None,
    on_failure: OnFailure = "warn",
) -> NormalCG:
    r"""Solve any systems by conjugate gradients on the normal equations.

    .. math:: (A^H A + \lambda I)\, x = A^H b

    Two products for each iteration, one with the adjoint. The condition number is squared: a system
    of condition 1e4 takes thousands of iterations, of 1e6 it may never end. Prefer
    :func:`solve_cg` for positive definite and :func:`solve_minres` for symmetric systems,
    :func:`solve_gmres` or a dense solver for others.

    Args:
        rtol: Solved where :math:`\lVert b - A x \rVert_2 \le \max(\text{rtol}\, \lVert b \rVert_2,
            \text{atol})`, as for :func:`solve_cg`; with a ridge the residual is that of the normal
            equations, beside :math:`A^H b`.
        atol: Absolute tolerance.
        maxiter: Most iterations; ``None`` as for :func:`solve_cg`.
        ridge: :math:`\lambda`, a number >= 0 or a 0-d tensor. It stands beside :math:`A^H A`.
        preconditioner: An operator that approximates :math:`(A^H A)^{-1}`, symmetric positive
            definite.
        init: Where to begin if a call says nothing.
        on_failure: ``"warn"``, ``"raise"`` or ``"ignore"`` where it was not solved. Without a
            ridge, a ``b`` that is not in the range of :math:`A` has the outcome ``SINGULAR``, and
            ``x`` solves the problem of least squares.

    Returns:
        ``solver(matvec, b, *, init=None) -> x``; see :class:`LinearSolver`.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If a number is out of bounds.

    Example:
        >>> import torch, torchopt
        >>> solver = torchopt.linear_solve.solve_normal_cg()
        >>> A = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
        >>> torch.allclose(solver(lambda v: A @ v, torch.tensor([3.0, 1.0])), torch.ones(2))
        True

    Reference:
        Björck, Numerical Methods for Least Squares Problems, SIAM 1996, section 7.4.
    """
    return NormalCG(
        rtol=rtol,
        atol=atol,
        maxiter=maxiter,
        ridge=ridge,
        preconditioner=preconditioner,
        init=init,
        on_failure=on_failure,
    )
