"""A solver chosen from what is known of the operator."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Union

import torch
from torch import Tensor

from torchopt.linear_solve.cg import CG
from torchopt.linear_solve.dense import LU, Cholesky, Dense, Factors, norms, solved_by
from torchopt.linear_solve.gmres import GMRES
from torchopt.linear_solve.minres import MINRES
from torchopt.linear_solve.operator import tags_of
from torchopt.linear_solve.outcome import Outcome
from torchopt.linear_solve.solver import LinearSolver, OnFailure, check_count
from torchopt.linear_solve.system import Solved, System
from torchopt.linear_solve.vectors import norm
from torchopt.typing import TensorTree


@dataclass(frozen=True, kw_only=True)
class Triangular(Dense):
    """Substitution, with the matrix written down; chosen by :func:`solve_auto`."""

    upper: bool

    def factors(self, matrix: Tensor) -> Factors:
        """Return the triangle as it is."""
        upper, diagonal = self.upper, torch.diagonal(matrix, dim1=-2, dim2=-1)
        return Factors(
            lambda c: torch.linalg.solve_triangular(matrix, c, upper=upper),
            lambda c: torch.linalg.solve_triangular(matrix.mT, c, upper=not upper),
            (diagonal == 0).any(-1),
            Outcome.SINGULAR,
            *norms(matrix),
        )


@dataclass(frozen=True, kw_only=True)
class Diagonal(LinearSolver):
    """Division by the product with ones; chosen by :func:`solve_auto`."""

    iterates: ClassVar[bool] = False

    def run(self, system: System) -> Solved:
        """Divide, and look whether it is true."""
        d = system.product(torch.ones_like(system.b))

        def solve(c: Tensor) -> Tensor:
            return c / d.unsqueeze(-1)

        zero = (d == 0).any(-1)
        largest = d.abs().amax(-1, keepdim=True)
        return solved_by(system, Factors(solve, solve, zero, Outcome.SINGULAR, norm(d), largest))


@dataclass(frozen=True, kw_only=True)
class Auto(LinearSolver):
    """A solver chosen from tags; made by :func:`solve_auto`."""

    max_dense: int = 500

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("max_dense", self.max_dense, 0)

    def choose(self, tags: Iterable[str], n: int, is_real: bool = True) -> LinearSolver:
        """Return the solver for an operator with these tags and ``n`` unknowns."""
        tags = tags_of(tags)
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(LinearSolver)}
        if "diagonal" in tags and is_real:
            return Diagonal(**given)
        if tags & {"lower_triangular", "upper_triangular"} and is_real:
            return Triangular(**given, upper="upper_triangular" in tags)
        if n <= self.max_dense:
            return Cholesky(**given) if "positive_definite" in tags else LU(**given)
        if "positive_definite" in tags:
            return CG(**given)
        return MINRES(**given) if "symmetric" in tags else GMRES(**given)

    def run(self, system: System) -> Solved:
        """Let the solver that fits do it."""
        solver = self.choose(system.tags, system.n, system.is_real)
        return dataclasses.replace(solver.run(system), method=solver.title)


def solve_auto(
    *,
    rtol: float | None = None,
    atol: float = 0.0,
    maxiter: int | None = None,
    max_dense: int = 500,
    ridge: Union[float, Tensor, None] = None,
    preconditioner: Any = None,
    init: TensorTree | None = None,
    on_failure: OnFailure = "warn",
) -> Auto:
    r"""Solve systems by what fits the tags of the operator.

    .. math:: (A + \lambda I)\, x = b

    | tags | up to ``max_dense`` unknowns | beyond |
    | --- | --- | --- |
    | ``diagonal`` | division | division |
    | ``lower_triangular``, ``upper_triangular`` | substitution | substitution |
    | ``positive_definite`` | :func:`solve_cholesky` | :func:`solve_cg` |
    | ``symmetric`` | :func:`solve_lu` | :func:`solve_minres` |
    | none | :func:`solve_lu` | :func:`solve_gmres` |

    ``solve(...).method`` says what was taken. Tags are promises (:meth:`LinearOperator.check` looks
    whether they are kept); a solution by a wrong tag does not satisfy the system, and that is
    noticed. Complex operators are taken for neither diagonal nor triangular.

    Args:
        rtol: Solved where :math:`\lVert b - A x \rVert_2 \le \max(\text{rtol}\, \lVert b \rVert_2,
            \text{atol})`, as for :func:`solve_cg`.
        atol: Absolute tolerance, in the units of ``b``.
        maxiter: Most iterations; ``None`` as for :func:`solve_cg`.
        max_dense: The most unknowns for which a matrix is written down.
        ridge: :math:`\lambda`, a number >= 0 or a 0-d tensor, which may be learned.
        preconditioner: For the solvers that iterate.
        init: Where to begin if a call says nothing, for the solvers that iterate.
        on_failure: ``"warn"``, ``"raise"`` or ``"ignore"`` where it was not solved.

    Returns:
        ``solver(matvec, b, *, init=None) -> x``; see :class:`LinearSolver`.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If a number is out of bounds.

    Example:
        >>> import torch
        >>> from torchopt.linear_solve import LinearOperator, solve_auto
        >>> d = torch.tensor([1.0, 2.0])
        >>> operator = LinearOperator(lambda v: d * v, tags=("diagonal",))
        >>> solution = solve_auto().solve(operator, torch.tensor([3.0, 4.0]))
        >>> solution.x, solution.method
        (tensor([3., 2.]), 'solve_diagonal')

    Reference:
        Golub and Van Loan, Matrix Computations, 4th edition, chapters 3, 4 and 11.
    """
    return Auto(
        rtol=rtol,
        atol=atol,
        maxiter=maxiter,
        max_dense=max_dense,
        ridge=ridge,
        preconditioner=preconditioner,
        init=init,
        on_failure=on_failure,
    )
