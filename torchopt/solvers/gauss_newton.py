"""The Gauss-Newton method, and steps of its family."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from torchopt.linear_solve import LinearOperator, LinearSolver, solve_cg
from torchopt.solvers.base import (
    State,
    check_count,
    first_state,
    is_finite,
    largest,
    plain,
)
from torchopt.solvers.fixed_points import least_squares_of
from torchopt.solvers.flat import Objective
from torchopt.solvers.linearized import DENSE, Linearized
from torchopt.solvers.newton import check_linear_solve
from torchopt.solvers.outcome import Outcome
from torchopt.solvers.squares import LeastSquaresSolver, Squares


S = TypeVar("S", bound=State)


@dataclass(frozen=True, kw_only=True)
class GaussNewton(LeastSquaresSolver[State]):
    r"""The Gauss-Newton method, with steps that are made shorter until the value falls.

    .. math::
        p_{k+1} = p_k - t_k\, (J^T J)^{-1} J^T r, \qquad
        t_k \in \{1, \tfrac12, \tfrac14, \dots\}

    Fast where the residuals at the solution are small or nearly linear. With a Jacobian of
    dependent columns, and far from a solution, :class:`LevenbergMarquardt` is safer.

    Args:
        linear_solve: Solves with :math:`J^T J` by products alone, such as
            :func:`torchopt.linear_solve.solve_cg`. ``None`` writes :math:`J` down and takes QR up
            to 500 parameters, conjugate gradients beyond.
        halvings: How often a step is made shorter.
        tolerance_grad: Converged where no entry of the gradient :math:`J^T r` is larger; >= 0.
        tolerance_change: Converged where an iteration changes no entry of the parameters by more,
            or the value by less; >= 0.
        max_iter: Most iterations.
        max_eval: Most calls of the function; ``None`` for no limit.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If a number is out of bounds.

    Example:
        >>> import torch
        >>> from torchopt.solvers import GaussNewton, least_squares
        >>> t = torch.linspace(0, 1, 10, dtype=torch.float64)
        >>> y = 2 * torch.exp(-3 * t)
        >>> fn = lambda p: p[0] * torch.exp(p[1] * t) - y
        >>> start = torch.tensor([1.0, -1.0], dtype=torch.float64)
        >>> least_squares(fn, GaussNewton(), start).params
        tensor([ 2.0000, -3.0000], dtype=torch.float64)

    Reference:
        Nocedal and Wright, Numerical Optimization, 2nd edition, section 10.3.
    """

    linear_solve: LinearSolver | None = None
    halvings: int = 30

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("halvings", self.halvings, 0)
        check_linear_solve(self.linear_solve)

    def carries(self, adjoint: object) -> None:
        """Be a loop: a step needs nothing but the last point."""

    def start(self, objective: Objective, x: Tensor) -> State:
        """Evaluate the residuals at the start."""
        return first_state(State, objective, x)

    def advance(self, objective: Objective, state: State) -> State:
        """Take one step."""
        assert isinstance(objective, Squares)
        near = objective.linearized(state.x)
        d = damped_step(near, 0.0, self.linear_solve)
        if not is_finite(largest(d)):
            return dataclasses.replace(state, outcome=Outcome.SINGULAR)
        slope = plain(d.detach().dot(state.grad.detach()))
        t, evaluations = 1.0, state.evaluations + 1
        for _ in range(self.halvings + 1):
            evaluations += 1
            if low_enough(objective, state, state.x + t * d, 1e-4 * t * slope):
                return arrived(objective, state, state.x + t * d, evaluations + 1)
            t /= 2
        return failed(state, evaluations)


def low_enough(objective: Squares, state: State, x: Tensor, change: float) -> bool:
    """Whether the value has fallen by what was asked, as far as its dtype can tell."""
    value, before = objective.value(x), plain(state.value)
    return value <= before + change + torch.finfo(x.dtype).eps * abs(before)


def arrived(objective: Squares, state: S, x: Tensor, evaluations: int) -> S:
    """Return the state at a new point."""
    value, grad = objective(x)
    return dataclasses.replace(
        state,
        x=x,
        value=value,
        grad=grad,
        grad_norm=largest(grad),
        iterations=state.iterations + 1,
        evaluations=evaluations,
        change=largest(x - state.x),
        fall=abs(plain(value) - plain(state.value)),
    )


def failed(state: S, evaluations: int) -> S:
    """Return the state where no step lowers the value."""
    return dataclasses.replace(
        state,
        iterations=state.iterations + 1,
        evaluations=evaluations,
        outcome=Outcome.LINE_SEARCH_FAILED,
    )


def damped_step(
    near: Linearized,
    damping: float,
    solver: LinearSolver | None,
    matrix: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    r"""Return :math:`-(J^T J + \lambda D^2)^{-1} J^T r`.

    With the matrix it is the least squares solution of :math:`J d = -r` with rows
    :math:`\sqrt\lambda D` added, so that the condition number is not squared; without it,
    :math:`D = I`.
    """
    r = near.value
    if solver is None and near.x.numel() <= DENSE:
        matrix = near.matrix() if matrix is None else matrix
        if damping > 0 and scale is not None:
            rows = torch.diag(math.sqrt(damping) * scale)
            matrix, r = torch.cat([matrix, rows]), torch.cat([r, torch.zeros_like(scale)])
        return least_squares_of(matrix, -r, 0.0)
    gradient = near.pull(r)

    def both(v: Tensor) -> Tensor:
        return near.pull(near.push(v)) + damping * v

    operator = LinearOperator(both, tags="positive_definite", adjoint=both)
    if near.create_graph:
        function = near.function

        def again(v: Tensor, x: Tensor) -> Tensor:
            other = Linearized(function, x, True)
            return other.pull(other.push(v)) + damping * v

        operator = LinearOperator(again, near.x, tags="positive_definite")
    solver = solver or solve_cg(rtol=1e-6, on_failure="ignore")
    return -solver(operator, gradient)
