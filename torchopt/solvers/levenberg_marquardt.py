"""Levenberg and Marquardt's method."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from torchopt.core import hyper
from torchopt.linear_solve import LinearSolver
from torchopt.solvers.base import (
    State,
    check_count,
    first_state,
    is_finite,
    largest,
    plain,
)
from torchopt.solvers.flat import Objective
from torchopt.solvers.gauss_newton import arrived, damped_step, failed, low_enough
from torchopt.solvers.linearized import DENSE, Linearized
from torchopt.solvers.newton import check_linear_solve
from torchopt.solvers.squares import LeastSquaresSolver, Squares


@dataclass(frozen=True, eq=False, repr=False)
class DampedState(State):
    """Where Levenberg and Marquardt's method is, with its damping."""

    damping: float | None = None
    scale: Tensor | None = None  #: :math:`D`, where the Jacobian is written down.
    growth: float = 2.0  #: By how much the damping grows after a step that failed.


@dataclass(frozen=True, kw_only=True)
class LevenbergMarquardt(LeastSquaresSolver[DampedState]):
    r"""Levenberg and Marquardt's method: between Gauss-Newton and short steps downhill.

    .. math:: p_{k+1} = p_k - (J^T J + \lambda_k D_k^2)^{-1} J^T r

    :math:`\lambda` falls after a step that lowered the value as much as the linear model promised,
    and grows until one lowers it (after Nielsen). :math:`D` holds the largest norms of the columns
    of :math:`J` so far (after Moré), so that the units of parameters do not matter; where :math:`J`
    is not written down it is the identity. It needs no independent columns.

    Args:
        damping: The first :math:`\lambda`, > 0; where :math:`D = I`, over the curvature along the
            gradient.
        linear_solve: As for :class:`GaussNewton`.
        attempts: How often the damping may grow in one iteration.
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
        >>> from torchopt.solvers import LevenbergMarquardt, least_squares
        >>> fn = lambda p: torch.stack([10 * (p[1] - p[0] ** 2), 1 - p[0]])
        >>> start = torch.tensor([-1.2, 1.0], dtype=torch.float64)
        >>> least_squares(fn, LevenbergMarquardt(), start).params
        tensor([1.0000, 1.0000], dtype=torch.float64)

    Reference:
        Nielsen, Damping parameter in Marquardt's method, Technical University of Denmark 1999;
        Moré, The Levenberg-Marquardt algorithm: implementation and theory, Lecture Notes in
        Mathematics 630, 1978;
        Nocedal and Wright, Numerical Optimization, 2nd edition, section 10.3.
    """

    damping: float = 1e-3
    linear_solve: LinearSolver | None = None
    attempts: int = 30

    def __post_init__(self) -> None:
        super().__post_init__()
        hyper.check_number("damping", self.damping, hyper.HyperSpec(gt=0))
        check_count("attempts", self.attempts, 1)
        check_linear_solve(self.linear_solve)

    def start(self, objective: Objective, x: Tensor) -> DampedState:
        """Evaluate the residuals at the start."""
        return first_state(DampedState, objective, x)

    def advance(self, objective: Objective, state: DampedState) -> DampedState:
        """Take one step, the damping raised until the value falls."""
        assert isinstance(objective, Squares)
        near = objective.linearized(state.x)
        damping, growth, evaluations = state.damping, state.growth, state.evaluations + 1
        matrix, scale = None, state.scale
        if self.linear_solve is None and near.x.numel() <= DENSE:
            matrix = near.matrix()
            norms = torch.linalg.vector_norm(matrix.detach(), dim=0)
            scale = norms if scale is None else torch.maximum(scale, norms)
            scale = torch.where(scale > 0, scale, 1.0)
        if damping is None:
            damping = self.damping * (1.0 if matrix is not None else curvature(near))
        square = 1.0 if scale is None else scale.square()
        before, least = plain(state.value), torch.finfo(state.x.dtype).tiny
        for _ in range(self.attempts):
            damping = max(damping, least)
            d = damped_step(near, damping, self.linear_solve, matrix, scale)
            x = state.x + d
            evaluations += 1
            steep = damping * square * d.detach() - state.grad.detach()
            promised = plain(d.detach().dot(steep)) / 2
            if is_finite(largest(d)) and low_enough(objective, state, x, 0.0):
                new = arrived(objective, state, x, evaluations + 1)
                gain = (before - plain(new.value)) / max(promised, least)
                damping *= max(1 / 3, 1 - (2 * min(gain, 2.0) - 1) ** 3)
                return dataclasses.replace(new, damping=damping, growth=2.0, scale=scale)
            damping, growth = damping * growth, growth * 2
        state = failed(state, evaluations)
        return dataclasses.replace(state, damping=damping, growth=growth, scale=scale)


def curvature(near: Linearized) -> float:
    """Return the curvature of the linear model along its gradient; 1 where that is zero."""
    u = near.pull(near.value).detach()
    size = plain(u.norm()) ** 2
    return plain(near.push(u).detach().norm()) ** 2 / size if size > 0 else 1.0
