"""Nystrom approximation: the inverse from a few products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchopt.base.misuse.given import given
from torchopt.linear_solve.dense import columns
from torchopt.linear_solve.operator import LinearOperator, as_operator
from torchopt.linear_solve.outcome import Outcome, code_of
from torchopt.linear_solve.product import Map, Product
from torchopt.linear_solve.solver import LinearSolver, OnFailure, check_count
from torchopt.linear_solve.system import CONVERGED, Solved, System
from torchopt.linear_solve.vectors import Layout, norm
from torchopt.typing import TensorTree


@dataclass(frozen=True, kw_only=True)
class Nystrom(LinearSolver):
    """An approximate inverse; made by :func:`solve_nystrom`."""

    rank: int
    rho: float
    seed: int = 0

    iterates: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank(self.rank, self.rho, self.seed)

    def prepared(self, product: Product, b: Tensor) -> tuple[Product, Tensor]:
        """Return the system with the damping."""
        return product.shifted(self.rho), b

    def judge(self, report: dict[str, Any], tol: Tensor, of: str) -> None:
        """Warn of what failed, or raise; that it is approximate is what was asked for.

        Raises:
            LinearSolveError: Under ``on_failure="raise"``, also where it is approximate.
        """
        if self.on_failure == "warn":
            known = code_of(Outcome.APPROXIMATE)
            codes = [CONVERGED if code == known else code for code in report["codes"]]
            report = {**report, "codes": codes}
        super().judge(report, tol, of)

    def run(self, system: System) -> Solved:
        """Apply the approximate inverse, and look how far it is from solving."""
        b = system.b

        def undamped(v: Tensor) -> Tensor:
            return system.product(v) - self.rho * v

        vectors, values, failed = approximation(undamped, b, self.rank, self.seed)
        inner = (vectors.mT @ b.unsqueeze(-1)).squeeze(-1)
        inside = (vectors @ (inner / (values + self.rho)).unsqueeze(-1)).squeeze(-1)
        outside = b - (vectors @ inner.unsqueeze(-1)).squeeze(-1)
        # once more: what rounding leaves of the span would be divided by a small rho
        again = vectors.mT @ outside.unsqueeze(-1)
        outside = outside - (vectors @ again).squeeze(-1)
        x = inside + outside / self.rho
        residual = norm(b - system.product(x))
        code = torch.where(residual <= system.tol, CONVERGED, code_of(Outcome.APPROXIMATE))
        failed = failed.unsqueeze(-1) & (norm(b) > 0)
        code = torch.where(failed, code_of(Outcome.NOT_POSITIVE_DEFINITE), code)
        code = torch.where(torch.isfinite(norm(b)), code, code_of(Outcome.NON_FINITE))
        iterations = torch.where(norm(b) > 0, min(self.rank, system.n), 0)
        return Solved(x, iterations, code, residual)


def check_rank(rank: int, rho: float, seed: int) -> None:
    """Refuse numbers out of bounds.

    Raises:
        TypeError: If a number is of another type.
        ValueError: If it is out of bounds.
    """
    check_count("rank", rank, 1)
    check_count("seed", seed, 0)
    if not isinstance(rho, (int, float)) or isinstance(rho, bool) or not rho > 0:
        raise ValueError(f"rho must be a number > 0, got {given(rho)}.")


def approximation(
    product: Map, like: Tensor, rank: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return eigenvectors ``(*batch, n, k)`` and eigenvalues of a Nystrom approximation.

    .. math:: A \approx (A \Omega) (\Omega^T A \Omega)^{+} (A \Omega)^T = U \Lambda U^T

    for random orthonormal :math:`\Omega`; and where it failed, because :math:`A` is not positive
    semidefinite.

    Reference:
        Frangella, Tropp and Udell, Randomized Nystrom preconditioning, SIAM Journal on Matrix
        Analysis and Applications 44, 2023, algorithm 2.1.
    """
    n = like.shape[-1]
    rank = min(rank, n)
    generator = torch.Generator().manual_seed(seed)
    omega = torch.randn(n, rank, generator=generator, dtype=torch.float64)
    omega = torch.linalg.qr(omega).Q.to(like)
    units = omega.mT.reshape(rank, *[1] * (like.dim() - 1), n).expand(rank, *like.shape)
    y = columns(product, units)
    nu = torch.finfo(like.dtype).eps * torch.linalg.matrix_norm(y)[..., None, None]
    nu = nu + torch.finfo(like.dtype).tiny
    y = y + nu * omega
    middle = omega.mT @ y
    root, info = torch.linalg.cholesky_ex((middle + middle.mT) / 2)
    failed = (info != 0) | ~torch.isfinite(y).all(-1).all(-1)
    eye = torch.eye(rank, dtype=like.dtype, device=like.device)
    mask = failed[..., None, None]
    root, y = torch.where(mask, eye, root), torch.where(mask, 0.0, y)
    factor = torch.linalg.solve_triangular(root.mT, y, upper=True, left=False)
    vectors, singular, _ = torch.linalg.svd(factor, full_matrices=False)
    return vectors, (singular.square() - nu.squeeze(-1)).clamp_min(0), failed


def solve_nystrom(
    *,
    rank: int,
    rho: float,
    seed: int = 0,
    rtol: float | None = None,
    atol: float = 0.0,
    on_failure: OnFailure = "warn",
) -> Nystrom:
    r"""Approximate the solution of damped positive semidefinite systems from a few products.

    .. math:: x = (U \Lambda U^T + \rho I)^{-1} b \approx (A + \rho I)^{-1} b

    with a random approximation of :math:`A` of rank ``rank``, which takes as many products at
    once. It is good where all but ``rank`` eigenvalues are small beside :math:`\rho`, and not
    exact: its outcome is ``APPROXIMATE`` unless the tolerance is met, and ``solve(...).residual``
    tells how far it is off. As a preconditioner (:func:`nystrom_preconditioner`) it makes exact
    solves faster.

    Args:
        rank: How many products, >= 1.
        rho: :math:`\rho > 0`.
        seed: Of the random directions; the same for each call.
        rtol: The tolerance that would be called solved, as for :func:`solve_cg`.
        atol: Absolute tolerance, in the units of ``b``.
        on_failure: ``"warn"``, ``"raise"`` or ``"ignore"`` where :math:`A` is not positive
            semidefinite or a number is not finite. Where it is approximate, only ``"raise"`` acts.

    Returns:
        ``solver(matvec, b, *, init=None) -> x``; see :class:`LinearSolver`. The derivative is taken
        with the same approximation.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If a number is out of bounds.

    Example:
        >>> import torch, torchopt
        >>> d = torch.tensor([3.0, 1e-4, 0.0])
        >>> solver = torchopt.linear_solve.solve_nystrom(rank=1, rho=1.0)
        >>> solution = solver.solve(lambda v: d * v, torch.tensor([4.0, 1.0, 1.0]))
        >>> solution.outcome, torch.allclose(solution.x, torch.ones(3), atol=1e-3)
        (<Outcome.APPROXIMATE>, True)

    Reference:
        Hataya and Yamada, Nystrom method for accurate and scalable implicit differentiation,
        AISTATS 2023.
    """
    return Nystrom(rank=rank, rho=rho, seed=seed, rtol=rtol, atol=atol, on_failure=on_failure)


def nystrom_preconditioner(
    matvec: object, like: TensorTree, *, rank: int, rho: float, seed: int = 0
) -> LinearOperator:
    r"""Return a preconditioner for a positive definite operator, from a few products with it.

    .. math::
        M = (\lambda_k + \rho)\, U (\Lambda + \rho I)^{-1} U^T + (I - U U^T)
        \approx (\lambda_k + \rho)\, (A + \rho I)^{-1}

    with :math:`\lambda_k` the smallest of the eigenvalues found. For :func:`solve_cg` and
    :func:`solve_minres` of :math:`A + \rho I`, such as ``solve_cg(ridge=rho, preconditioner=M)``.

    Args:
        matvec: The operator :math:`A`, without the ridge.
        like: A tree of the shapes of a vector.
        rank: How many products, >= 1.
        rho: :math:`\rho > 0`, the ridge, or about the smallest eigenvalue that matters.
        seed: Of the random directions.

    Returns:
        A :class:`LinearOperator`, symmetric positive definite.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If a number is out of bounds, or the operator is not positive semidefinite.

    Example:
        >>> import torch, torchopt
        >>> from torchopt.linear_solve import nystrom_preconditioner, solve_cg
        >>> d = torch.linspace(0, 1, 100) ** 20
        >>> b = torch.ones(100)
        >>> M = nystrom_preconditioner(lambda v: d * v, b, rank=20, rho=0.01)
        >>> plain, better = (
        ...     solve_cg(ridge=0.01, preconditioner=m).solve(lambda v: d * v, b) for m in (None, M)
        ... )
        >>> better.iterations < plain.iterations
        True

    Reference:
        Frangella, Tropp and Udell, Randomized Nystrom preconditioning, SIAM Journal on Matrix
        Analysis and Applications 44, 2023, section 5.
    """
    check_rank(rank, rho, seed)
    layout = Layout(like, "like")
    product = Product.of(as_operator(matvec), layout)
    with torch.no_grad():
        forward = product.bind([x.detach() for x in product.values])[0]
        zeros = torch.zeros(layout.numel, dtype=layout.dtype, device=layout.device)
        vectors, values, failed = approximation(forward, zeros, rank, seed)
    if bool(failed):
        raise ValueError("The operator is not positive semidefinite, or a product is not finite.")

    def apply(v: TensorTree, vectors: Tensor, values: Tensor) -> TensorTree:
        x = layout.flatten(v, "v")
        inner = vectors.mT @ x
        scaled = inner * (values[-1] + rho) / (values + rho)
        return layout.unflatten(x + vectors @ (scaled - inner))

    return LinearOperator(apply, vectors, values, tags=("positive_definite",))
