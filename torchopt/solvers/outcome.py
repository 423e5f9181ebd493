"""How a solver ended: named constants, each with likely causes and the argument to change."""

from __future__ import annotations

import enum


class Outcome(enum.Enum):
    """Why a solver ended.

    Example:
        >>> import torch, torchopt
        >>> solver = torchopt.solvers.LBFGS(max_iter=2)
        >>> start = torch.tensor([3.0, -1.0])
        >>> solution = torchopt.solvers.minimize(lambda p: p.cosh().sum(), solver, start)
        >>> solution.outcome
        <Outcome.MAX_ITER>
        >>> solution.outcome.success
        False
        >>> solution.outcome.text.partition(".")[0]
        'max_iter iterations were made'
    """

    CONVERGED = (
        "No entry of what is zero at a solution (the gradient; of find_root and fixed_point, the "
        "residual) is larger than tolerance_grad."
    )
    SMALL_CHANGE = (
        "The last iteration changed value or parameters by no more than tolerance_change, or the "
        "next one would. At a minimum this is the limit of the dtype; if the gradient is still "
        "large, the function is badly scaled or the learning rate too small: lower "
        "tolerance_change, raise lr, or give the parameters in float64."
    )
    MAX_ITER = (
        "max_iter iterations were made. Raise max_iter, start nearer to a minimum, or scale the "
        "parameters so that the function is about equally steep in all of them."
    )
    MAX_EVAL = (
        "The function was called max_eval times. Raise max_eval; if most calls went into line "
        "searches, the function is not smooth or its gradient is wrong (torch.autograd.gradcheck)."
    )
    LINE_SEARCH_FAILED = (
        "No step along the search direction lowers the value enough. Near a minimum that is the "
        "limit of the dtype: give the parameters in float64 or raise tolerance_grad. Elsewhere the "
        "gradient does not belong to the value (detached parts, random numbers that differ "
        "from call to call), the function jumps, or the search was too short: raise its max_eval."
    )
    NOT_FINITE = (
        "Value or gradient is infinite or nan; the parameters are the last at which both were "
        "finite. If they were not at the start, start elsewhere. If a step led there, it was too "
        "long: lower lr, or give line_search_fn='strong_wolfe', which shortens such steps."
    )

    SINGULAR = (
        "The Jacobian is singular there, so that there is no direction to go. Start elsewhere; "
        "where equations depend on each other, take least_squares with LevenbergMarquardt()."
    )
    STAGNATED = (
        "The iterations no longer change the parameters, and the residual is not small. Start "
        "nearer to a solution, take smaller steps (damping), or take Newton(), which knows the "
        "Jacobian."
    )

    @property
    def text(self) -> str:
        """What it means, with likely causes and the argument to change."""
        return self.value

    @property
    def success(self) -> bool:
        """Whether a tolerance was reached."""
        return self in (Outcome.CONVERGED, Outcome.SMALL_CHANGE)

    def __repr__(self) -> str:
        return f"<{self}>"
