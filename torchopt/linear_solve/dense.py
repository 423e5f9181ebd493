"""Dense solvers: the matrix is written down, and factored."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Union

import torch
from torch import Tensor

from torchopt.linear_solve.outcome import Outcome, code_of
from torchopt.linear_solve.product import Map
from torchopt.linear_solve.solver import LinearSolver, OnFailure
from torchopt.linear_solve.system import CONVERGED, Solved, System
from torchopt.linear_solve.vectors import norm


def matrix_of(system: System) -> Tensor:
    """Return the matrices ``(*batch, n, n)``: products with all unit vectors at once.

    One after the other where the product cannot be batched, because it calls
    ``torch.autograd.grad``; errors of its own come up there again.
    """
    n = system.n
    units = torch.eye(n, dtype=system.b.dtype, device=system.b.device)
    units = units.reshape(n, *[1] * (system.b.dim() - 1), n).expand(n, *system.b.shape)
    return columns(system.product, units)


def columns(product: Map, vectors: Tensor) -> Tensor:
    """Return products with the vectors ``(k, *batch, n)`` as the columns of ``(*batch, n, k)``."""
    try:
        products = torch.func.vmap(product, randomness="same")(vectors)
    except RuntimeError:
        products = torch.stack([product(vector) for vector in vectors])
    return products.movedim(0, -1)


@dataclass(frozen=True)
class Factors:
    """A factored matrix: solutions for columns ``(*batch, n, k)``, and where factoring failed."""

    solve: Callable[[Tensor], Tensor]
    solve_adjoint: Callable[[Tensor], Tensor]
    failed: Tensor  #: ``(*batch,)``
    code: Outcome  #: What a failure means.
    frobenius: Tensor  #: The norm of the matrix, ``(*batch, 1)``.
    one: Tensor  #: The largest sum of a column's absolute entries, ``(*batch, 1)``.


@dataclass(frozen=True, kw_only=True)
class Dense(LinearSolver):
    """Solves with a factored matrix, one step of refinement included."""

    iterates: ClassVar[bool] = False

    @abc.abstractmethod
    def factors(self, matrix: Tensor) -> Factors:
        """Factor matrices."""

    def run(self, system: System) -> Solved:
        """Write the matrices down, factor them, solve, and look whether it is true."""
        return solved_by(system, self.factors(matrix_of(system)))


def norms(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Frobenius norms and the largest sums of columns."""
    one = matrix.abs().sum(-2).amax(-1, keepdim=True)
    return torch.linalg.matrix_norm(matrix).unsqueeze(-1), one


def solved_by(system: System, factors: Factors) -> Solved:
    """Solve by factors, with a step of refinement, and judge the solution."""
    b = system.b
    x = factors.solve(b.unsqueeze(-1)).squeeze(-1)
    r = b - system.product(x)
    finer = x + factors.solve(r.unsqueeze(-1)).squeeze(-1)
    finer_r = b - system.product(finer)
    better = norm(finer_r) < norm(r)
    x, r = torch.where(better, finer, x), torch.where(better, finer_r, r)
    size, eps = norm(r), torch.finfo(b.dtype).eps
    # a residual of this size is what rounding the matrix alone would leave
    fine = (size <= system.tol) | (size <= 10 * eps * factors.frobenius * norm(x))
    code = torch.where(fine, CONVERGED, code_of(Outcome.STAGNATED))
    singular = ~(inverse_norm(factors, b) * factors.one < 0.1 / eps)
    code = torch.where(singular, code_of(Outcome.SINGULAR), code)
    code = torch.where(factors.failed.unsqueeze(-1), code_of(factors.code), code)
    finite = torch.isfinite(b).all(-1, keepdim=True) & torch.isfinite(factors.frobenius)
    code = torch.where(finite, code, code_of(Outcome.NON_FINITE))
    x = torch.where(factors.failed.unsqueeze(-1), torch.nan, x)
    zero = norm(b) == 0  # also of a singular matrix
    x, size = torch.where(zero, 0.0, x), torch.where(zero, 0.0, size)
    code = torch.where(zero & finite, CONVERGED, code)
    return Solved(x, torch.where(zero, 0, 1), code, size)


def inverse_norm(factors: Factors, like: Tensor) -> Tensor:
    r"""Return a lower estimate of :math:`\lVert A^{-1} \rVert_1`, mostly within a factor of three.

    Reference:
        Hager, Condition estimates, SIAM Journal on Scientific and Statistical Computing 5, 1984.
    """
    n = like.shape[-1]
    v = torch.full_like(like, 1.0 / n)
    best = torch.zeros_like(like[..., :1])
    for _ in range(3):
        y = factors.solve(v.unsqueeze(-1)).squeeze(-1)
        best = torch.fmax(best, torch.nan_to_num(y.abs().sum(-1, keepdim=True), torch.inf))
        signs = torch.where(y >= 0, 1.0, -1.0).to(y.dtype)
        z = factors.solve_adjoint(signs.unsqueeze(-1)).squeeze(-1)
        largest = torch.nan_to_num(z.abs(), torch.inf).argmax(-1, keepdim=True)
        v = torch.zeros_like(v).scatter(-1, largest, 1.0)
    return best


@dataclass(frozen=True, kw_only=True)
class LU(Dense):
    """Gaussian elimination; made by :func:`solve_lu`."""

    def factors(self, matrix: Tensor) -> Factors:
        """Factor by LU with row exchanges."""
        lu, pivots, info = torch.linalg.lu_factor_ex(matrix)
        return Factors(
            lambda c: torch.linalg.lu_solve(lu, pivots, c),
            lambda c: torch.linalg.lu_solve(lu, pivots, c, adjoint=True),
            info != 0,
            Outcome.SINGULAR,
            *norms(matrix),
        )


@dataclass(frozen=True, kw_only=True)
class Inv(LU):
    """Gaussian elimination; made by :func:`solve_inv`."""


@dataclass(frozen=True, kw_only=True)
class Cholesky(Dense):
    """Cholesky's factorisation; made by :func:`solve_cholesky`."""

    def factors(self, matrix: Tensor) -> Factors:
        """Factor by Cholesky; reads the lower triangle."""
        lower, info = torch.linalg.cholesky_ex(matrix)

        def solve(c: Tensor) -> Tensor:
            return torch.cholesky_solve(c, lower)

        failure = Outcome.NOT_POSITIVE_DEFINITE
        return Factors(solve, solve, info != 0, failure, *norms(matrix))


@dataclass(frozen=True, kw_only=True)
class QR(Dense):
    """Householder's factorisation; made by :func:`solve_qr`."""

    def factors(self, matrix: Tensor) -> Factors:
        """Factor by QR."""
        q, r = torch.linalg.qr(matrix)
        failed = (torch.diagonal(r, dim1=-2, dim2=-1) == 0).any(-1)
        return Factors(
            lambda c: torch.linalg.solve_triangular(r, q.mT @ c, upper=True),
            lambda c: q @ torch.linalg.solve_triangular(r.mT, c, upper=False),
            failed,
            Outcome.SINGULAR,
            *norms(matrix),
        )


def solve_lu(
    *,
    rtol: float | None = None,
    atol: float = 0.0,
    ridge: Union[float, Tensor, None] = None,
    on_failure: OnFailure = "warn",
) -> LU:
    r"""Solve any systems of moderate size by LU.

    .. math:: (A + \lambda I)\, x = b, \qquad P (A + \lambda I) = L U

    The matrix is written down by products with all :math:`n` unit vectors at once
    (``torch.func.vmap``): :math:`n^2` numbers of memory and :math:`\tfrac23 n^3` operations. A
    complex number counts as two reals.

    Args:
        rtol: Solved where :math:`\lVert b - A x \rVert_2 \le \max(\text{rtol}\, \lVert b \rVert_2,
            \text{atol})`, or where the residual is no larger than rounding the matrix would make
            it. ``None`` as for :func:`solve_cg`.
        atol: Absolute tolerance, in the units of ``b``.
        ridge: :math:`\lambda`, a number >= 0 or a 0-d tensor, which may be learned.
        on_failure: ``"warn"``, ``"raise"`` or ``"ignore"`` where it was not solved. A matrix whose
            condition number (estimated) is beyond the dtype is ``SINGULAR``.

    Returns:
        ``solver(matvec, b, *, init=None) -> x``; see :class:`LinearSolver`.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If a number is out of bounds.

    Example:
        >>> import torch, torchopt
        >>> A = torch.tensor([[0.0, 2.0], [1.0, 1.0]])
        >>> torchopt.linear_solve.solve_lu()(lambda v: A @ v, torch.tensor([2.0, 2.0]))
        tensor([1., 1.])

    Reference:
        Golub and Van Loan, Matrix Computations, 4th edition, section 3.4.
    """
    return LU(rtol=rtol, atol=atol, ridge=ridge, on_failure=on_failure)


def solve_cholesky(
    *,
    rtol: float | None = None,
    atol: float = 0.0,
    ridge: Union[float, Tensor, None] = None,
    on_failure: OnFailure = "warn",
) -> Cholesky:
    r"""Solve symmetric (Hermitian) positive definite systems of moderate size by Cholesky.

    .. math:: (A + \lambda I)\, x = b, \qquad A + \lambda I = L L^T

    Half the operations of :func:`solve_lu`. A matrix that is not positive definite has the outcome
    ``NOT_POSITIVE_DEFINITE`` and no solution; one that is not symmetric ends as ``STAGNATED``,
    since the solution does not satisfy the system.

    Args:
        rtol: As for :func:`solve_lu`.
        atol: As for :func:`solve_lu`.
        ridge: :math:`\lambda`, a number >= 0 or a 0-d tensor, which may be learned.
        on_failure: ``"warn"``, ``"raise"`` or ``"ignore"`` where it was not solved.

    Returns:
        ``solver(matvec, b, *, init=None) -> x``; see :class:`LinearSolver`.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If a number is out of bounds.

    Example:
        >>> import torch, torchopt
        >>> A = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
        >>> x = torchopt.linear_solve.solve_cholesky()(lambda v: A @ v, torch.tensor([3.0, 3.0]))
        >>> torch.allclose(x, torch.ones(2))
        True

    Reference:
        Golub and Van Loan, Matrix Computations, 4th edition, section 4.2.
    """
    return Cholesky(rtol=rtol, atol=atol, ridge=ridge, on_failure=on_failure)


def solve_qr(
    *,
    rtol: float | None = None,
    atol: float = 0.0,
    ridge: Union[float, Tensor, None] = None,
    on_failure: OnFailure = "warn",
) -> QR:
    r"""Solve any systems of moderate size by QR.

    .. math:: (A + \lambda I)\, x = b, \qquad A + \lambda I = Q R

    Twice the operations of :func:`solve_lu`; no growth of rounding errors whatever the matrix.

    Args:
        rtol: As for :func:`solve_lu`.
        atol: As for :func:`solve_lu`.
        ridge: :math:`\lambda`, a number >= 0 or a 0-d tensor, which may be learned.
        on_failure: ``"warn"``, ``"raise"`` or ``"ignore"`` where it was not solved.

    Returns:
        ``solver(matvec, b, *, init=None) -> x``; see :class:`LinearSolver`.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If a number is out of bounds.

    Example:
        >>> import torch, torchopt
        >>> A = torch.tensor([[0.0, 2.0], [1.0, 1.0]])
        >>> x = torchopt.linear_solve.solve_qr()(lambda v: A @ v, torch.tensor([2.0, 2.0]))
        >>> torch.allclose(x, torch.ones(2))
        True

    Reference:
        Golub and Van Loan, Matrix Computations, 4th edition, section 5.2.
    """
    return QR(rtol=rtol, atol=atol, ridge=ridge, on_failure=on_failure)


def solve_inv(
    *,
    rtol: float | None = None,
    atol: float = 0.0,
    ridge: Union[float, Tensor, None] = None,
    on_failure: OnFailure = "warn",
) -> Inv:
    r"""Solve any systems of moderate size with the whole matrix, as TorchOpt 0.7.3 calls it.

    .. math:: x = (A + \lambda I)^{-1} b

    It is :func:`solve_lu` (0.7.3 kept the diagonal blocks of a matrix only, one for each leaf). For
    its ``ns=True``, a Neumann series, see :func:`solve_neumann`.

    Args:
        rtol: As for :func:`solve_lu`.
        atol: As for :func:`solve_lu`.
        ridge: :math:`\lambda`, a number >= 0 or a 0-d tensor, which may be learned.
        on_failure: ``"warn"``, ``"raise"`` or ``"ignore"`` where it was not solved.

    Returns:
        ``solver(matvec, b, *, init=None) -> x``; see :class:`LinearSolver`.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If a number is out of bounds.

    Example:
        >>> import torch, torchopt
        >>> A = torch.tensor([[2.0, 0.0], [1.0, 1.0]])
        >>> torchopt.linear_solve.solve_inv()(lambda v: A @ v, torch.tensor([2.0, 2.0]))
        tensor([1., 1.])

    Reference:
        Golub and Van Loan, Matrix Computations, 4th edition, section 3.4.
    """
    return Inv(rtol=rtol, atol=atol, ridge=ridge, on_failure=on_failure)
