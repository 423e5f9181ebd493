"""Fixed points: plain iteration, and Anderson's acceleration of it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from torchopt.core import hyper
from torchopt.solvers.base import State, check_count, first_state, is_finite, plain
from torchopt.solvers.flat import Objective
from torchopt.solvers.newton import arrived
from torchopt.solvers.outcome import Outcome
from torchopt.solvers.roots import RootSolver


S = TypeVar("S", bound=State)


@dataclass(frozen=True, kw_only=True)
class FixedPointIteration(RootSolver[State]):
    r"""Apply a function again and again.

    .. math:: p_{k+1} = p_k + \beta\, (T(p_k) - p_k)

    It converges where :math:`T` contracts, by a constant factor for each step.

    Args:
        damping: :math:`\beta` in (0, 1]; 1 is the plain iteration.
        tolerance_grad: Converged where no entry of :math:`T(p) - p` is larger; >= 0.
        tolerance_change: Ended where an iteration changes no entry by more; >= 0.
        max_iter: Most iterations.
        max_eval: Most calls of the function; ``None`` for no limit.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If a number is out of bounds.

    Example:
        >>> import torch
        >>> from torchopt.solvers import FixedPointIteration, fixed_point
        >>> a = torch.tensor(0.5, requires_grad=True)
        >>> fn = lambda p, a: a * p.cos()
        >>> solution = fixed_point(fn, FixedPointIteration(), torch.tensor(1.0), a)
        >>> solution.outcome, torch.autograd.grad(solution.params, a)
        (<Outcome.CONVERGED>, (tensor(0.7395),))

    Reference:
        Ortega and Rheinboldt, Iterative Solution of Nonlinear Equations in Several Variables,
        Academic Press 1970, chapter 5.
    """

    damping: float = 1.0
    max_iter: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        hyper.check_number("damping", self.damping, hyper.HyperSpec(gt=0, le=1))

    def carries(self, adjoint: object) -> None:
        """Be a loop: a step needs nothing but the last point."""

    def start(self, objective: Objective, x: Tensor) -> State:
        """Evaluate the function at the start."""
        return first_state(State, objective, x)

    def advance(self, objective: Objective, state: State) -> State:
        """Take one step."""
        return went(objective, state, state.x + self.damping * state.grad)


def went(objective: Objective, state: S, x: Tensor) -> S:
    """Return the state at a new point, or the old one where the function is not finite there."""
    value, r = objective(x)
    evaluations = state.evaluations + 1
    if is_finite(plain(value)):
        return arrived(state, x, value, r, evaluations)
    return dataclasses.replace(
        state,
        iterations=state.iterations + 1,
        evaluations=evaluations,
        outcome=Outcome.NOT_FINITE,
    )


@dataclass(frozen=True, eq=False, repr=False)
class AndersonState(State):
    """Where the acceleration is, with the points and residuals it remembers."""

    points: tuple[Tensor, ...] = ()  #: Before this one, oldest first.
    residuals: tuple[Tensor, ...] = ()
    best: float = math.inf  #: The smallest norm of a residual so far.


@dataclass(frozen=True, kw_only=True)
class Anderson(RootSolver[AndersonState]):
    r"""Anderson's acceleration of a fixed-point iteration.

    .. math::
        \gamma = \text{arg}\min_\gamma \lVert f_k - \Delta F\, \gamma \rVert, \qquad
        p_{k+1} = p_k + \beta f_k - (\Delta P + \beta\, \Delta F)\, \gamma

    with :math:`f = T(p) - p` and the last differences of points and residuals as columns of
    :math:`\Delta P` and :math:`\Delta F`. Near the fixed point it is like GMRES on the linearised
    equation, with one call of the function a step.

    Args:
        history_size: How many differences are remembered, >= 1.
        mixing: :math:`\beta` in (0, 1].
        ridge: Makes the least squares regular: columns of :math:`\Delta F` count as dependent below
            this part of their size; >= 0.
        tolerance_grad: Converged where no entry of :math:`T(p) - p` is larger; >= 0.
        tolerance_change: Ended where an iteration changes no entry by more; >= 0.
        max_iter: Most iterations.
        max_eval: Most calls of the function; ``None`` for no limit.

    Where the residual has grown to ten times the smallest so far, what is remembered is dropped.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If a number is out of bounds.

    Example:
        >>> import torch
        >>> from torchopt.solvers import Anderson, FixedPointIteration, fixed_point
        >>> w = 0.95 * torch.eye(4) + 0.01
        >>> fn = lambda p: (w @ p).tanh() + 0.1
        >>> slow, fast = (
        ...     fixed_point(fn, solver, torch.zeros(4))
        ...     for solver in (FixedPointIteration(), Anderson())
        ... )
        >>> fast.outcome.success, fast.evaluations < slow.evaluations
        (True, True)

    Reference:
        Anderson, Iterative procedures for nonlinear integral equations, Journal of the ACM 12,
        1965; Walker and Ni, Anderson acceleration for fixed-point iterations, SIAM Journal on
        Numerical Analysis 49, 2011.
    """

    history_size: int = 5
    mixing: float = 1.0
    ridge: float = 1e-7
    max_iter: int = 500

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("history_size", self.history_size, 1)
        hyper.check_number("mixing", self.mixing, hyper.HyperSpec(gt=0, le=1))
        hyper.check_number("ridge", self.ridge, hyper.HyperSpec(ge=0))

    def start(self, objective: Objective, x: Tensor) -> AndersonState:
        """Evaluate the function at the start; nothing is remembered yet."""
        return first_state(AndersonState, objective, x)

    def advance(self, objective: Objective, state: AndersonState) -> AndersonState:
        """Take one step."""
        x, f, size = state.x, state.grad, plain(state.value)
        points, residuals = state.points, state.residuals
        if size > 10 * state.best:
            points, residuals = (), ()
        step = self.mixing * f
        if points:
            dx, df = differences((*points, x)), differences((*residuals, f))
            gamma = least_squares_of(df, f, self.ridge)
            step = step - (dx + self.mixing * df) @ gamma
        new = went(objective, state, x + step)
        if new.outcome is not None and points:  # a step of the plain iteration instead
            again = dataclasses.replace(state, evaluations=new.evaluations)
            new = went(objective, again, x + self.mixing * f)
            points, residuals = (), ()
        return dataclasses.replace(
            new,
            points=(*points, x)[-self.history_size :],
            residuals=(*residuals, f)[-self.history_size :],
            best=min(state.best, size),
        )


def differences(vectors: tuple[Tensor, ...]) -> Tensor:
    """Return the differences of one vector to the next as columns."""
    stacked = torch.stack(vectors, 1)
    return stacked[:, 1:] - stacked[:, :-1]


def least_squares_of(a: Tensor, b: Tensor, ridge: float) -> Tensor:
    """Return the least squares solution of a tall system, regular whatever the columns."""
    k = a.shape[1]
    size = torch.linalg.vector_norm(a.detach(), dim=0).clamp_min(torch.finfo(a.dtype).tiny)
    scaled = a / size  # columns of very different lengths count the same
    least = max(ridge, torch.finfo(a.dtype).eps)
    eye = least * torch.eye(k, dtype=a.dtype, device=a.device)
    q, r = torch.linalg.qr(torch.cat([scaled, eye]))
    right = torch.cat([b, b.new_zeros(k)])
    y = torch.linalg.solve_triangular(r, (q.mT @ right).unsqueeze(1), upper=True)
    return y.squeeze(1) / size
