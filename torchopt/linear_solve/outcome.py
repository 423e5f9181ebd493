"""How a linear solve ended: named constants, each with likely causes and the argument to change."""

from __future__ import annotations

import enum


class Outcome(enum.Enum):
    """Why a linear solver ended.

    Example:
        >>> import torch, torchopt
        >>> solver = torchopt.linear_solve.solve_cg(maxiter=1, on_failure="ignore")
        >>> A = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
        >>> solution = solver.solve(lambda v: A @ v, torch.ones(2))
        >>> solution.outcome, solution.outcome.success
        (<Outcome.MAX_STEPS>, False)
        >>> solution.outcome.text.partition(".")[0]
        'maxiter iterations were made'
    """

    CONVERGED = "The norm of b - A x, recomputed from x, is at most max(rtol * norm of b, atol)."
    MAX_STEPS = (
        "maxiter iterations were made. Raise maxiter, give a preconditioner or a ridge; an "
        "ill-conditioned system of moderate size is solved by solve_lu() or solve_cholesky(). "
        "solve_cg() and solve_minres() do not end where the operator is not symmetric."
    )
    STAGNATED = (
        "The norm of b - A x no longer falls. Either this is the limit of the dtype for so "
        "ill-conditioned a system (give the tensors in float64, raise rtol, add a ridge), or the "
        "operator has another structure than the solver needs: solve_cg and solve_minres need a "
        "symmetric one, solve_gmres may need a larger restart."
    )
    BREAKDOWN = (
        "The iteration divided by a number that is zero within rounding before it converged. Start "
        "elsewhere (init), or take solve_gmres() or solve_lu()."
    )
    NON_FINITE = (
        "b, the start or a product with A holds inf or nan, and x is nan. Look at what A is made "
        "of; if the entries overflow, scale them or give them in float64."
    )
    SINGULAR = (
        "The matrix is singular within rounding, so that the solution is not unique or does not "
        "exist. Add a ridge, remove the directions that nothing depends on, or take solve_minres() "
        "for the solution of least norm of a symmetric system."
    )
    NOT_POSITIVE_DEFINITE = (
        "The iteration met a direction p with <p, A p> <= 0 (or Cholesky a pivot): the operator is "
        "not positive definite; at a saddle point or away from a minimum a Hessian is not. Add a "
        "ridge, or take solve_minres() for symmetric, solve_gmres() or solve_lu() for any "
        "operators."
    )
    DIVERGED = (
        "The terms of the series grow. Lower the step below 2 over the largest eigenvalue, or take "
        "a solver that needs no step: solve_cg(), solve_gmres()."
    )

    APPROXIMATE = (
        "An approximate inverse was applied, which solves within no tolerance. Raise rank or rho, "
        "or use it as a preconditioner of solve_cg()."
    )

    @property
    def text(self) -> str:
        """What it means, with likely causes and the argument to change."""
        return self.value

    @property
    def success(self) -> bool:
        """Whether the tolerance was reached."""
        return self is Outcome.CONVERGED

    def __repr__(self) -> str:
        return f"<{self}>"


#: The outcomes by the numbers that stand for them in tensors; 0 is "going on".
CODES: tuple[Outcome, ...] = tuple(Outcome)


def code_of(outcome: Outcome) -> int:
    """Return the number of an outcome in tensors."""
    return CODES.index(outcome) + 1


class LinearSolveError(RuntimeError):
    """A linear system was not solved, under ``on_failure="raise"``.

    Example:
        >>> import torch, torchopt
        >>> solver = torchopt.linear_solve.solve_lu(on_failure="raise")
        >>> try:
        ...     solver(lambda v: 0 * v, torch.ones(2))
        ... except torchopt.linear_solve.LinearSolveError as error:
        ...     print(error.outcome)
        Outcome.SINGULAR
    """

    def __init__(self, message: str, outcome: Outcome) -> None:
        super().__init__(message)
        self.outcome = outcome


class LinearSolveWarning(UserWarning):
    """A linear system was not solved, under ``on_failure="warn"``.

    Example:
        >>> import warnings, torch, torchopt
        >>> solver = torchopt.linear_solve.solve_lu()
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     _ = solver(lambda v: 0 * v, torch.ones(2))
        >>> caught[0].category.__name__
        'LinearSolveWarning'
    """
