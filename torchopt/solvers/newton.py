"""Newton's method for roots, and the choice of it for minima."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from torch import Tensor

from torchopt.base.misuse.given import given
from torchopt.linear_solve import LinearSolver
from torchopt.linear_solve import Outcome as LinearOutcome
from torchopt.solvers.base import State, check_count, first_state, is_finite, largest, plain
from torchopt.solvers.flat import Number, Objective
from torchopt.solvers.newton_minimum import NewtonMinimizer
from torchopt.solvers.outcome import Outcome
from torchopt.solvers.roots import Residual, RootSolver


S = TypeVar("S", bound=State)


def moved(
    objective: Objective, state: State, d: Tensor, low: float, halvings: int
) -> tuple[State, float]:
    """Return the state after the longest step 1, 1/2, 1/4... along ``d`` that lowers the residual.

    A point where the residual is not finite counts as too high.

    Args:
        objective: Evaluates the residual.
        state: Where the step begins.
        d: The whole step.
        low: A step of length ``t`` has to leave at most ``1 - low * t`` of the norm.
        halvings: How often it is made shorter.
    """
    t, size, evaluations = 1.0, plain(state.value), state.evaluations
    for _ in range(halvings + 1):
        x = state.x + t * d
        value, r = objective(x)
        evaluations += 1
        if is_finite(plain(value)) and plain(value) <= (1 - low * t) * size:
            return arrived(state, x, value, r, evaluations), t
        t /= 2
    failed = dataclasses.replace(
        state,
        iterations=state.iterations + 1,
        evaluations=evaluations,
        outcome=Outcome.LINE_SEARCH_FAILED,
    )
    return failed, 0.0


def arrived(state: S, x: Tensor, value: Number, r: Tensor, evaluations: int) -> S:
    """Return the state at a new point."""
    return dataclasses.replace(
        state,
        x=x,
        value=value,
        grad=r,
        grad_norm=largest(r),
        iterations=state.iterations + 1,
        evaluations=evaluations,
        change=largest(x - state.x),
        fall=abs(plain(value) - plain(state.value)),
    )


@dataclass(frozen=True, kw_only=True)
class Newton(RootSolver[State]):
    r"""Newton's method, with steps that are made shorter until the residual or the value falls.

    .. math::
        p_{k+1} = p_k - t_k\, J(p_k)^{-1} F(p_k), \qquad
        t_k \in \{1, \tfrac12, \tfrac14, \dots\}

    Near a regular root the number of correct digits doubles with each step.

    :func:`torchopt.solvers.minimize` takes it, too: :math:`F` is the gradient there, and :math:`J`
    the Hessian, made positive definite where it is not (at saddle points and maxima, where plain
    Newton steps lead), so that each step leads downhill. It ends at once where the gradient is zero
    at the start.

    Args:
        linear_solve: Solves with the Jacobian, by products alone, such as
            :func:`torchopt.linear_solve.solve_gmres`. ``None`` writes it down and takes LU up to
            500 unknowns, GMRES beyond. Of a Hessian ``None`` takes eigenvalues up to 500 unknowns
            and turns negative ones round; beyond it is conjugate gradients, to a tolerance that
            tightens on the way (Newton-CG), with a ridge that grows until the step leads downhill,
            as with any solver that is given.
        halvings: How often a step is made shorter; 0 takes whole steps whatever they do.
        tolerance_grad: Converged where no entry of the residual is larger; >= 0.
        tolerance_change: A step that changes no entry by more is the last one; >= 0.
        max_iter: Most steps.
        max_eval: Most calls of the function; ``None`` for no limit.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If a number is out of bounds.

    Example:
        >>> import torch, torchopt
        >>> from torchopt.solvers import Newton, find_root
        >>> fn = lambda p: torch.stack([p[0] + p[1] - 3, p[0] * p[1] - 2])
        >>> solution = find_root(fn, Newton(), torch.tensor([5.0, 0.0]))
        >>> torch.allclose(solution.params, torch.tensor([2.0, 1.0])), solution.iterations < 10
        (True, True)
        >>> wells = lambda p: (p**2 - 1).square().sum()  # a maximum at 0
        >>> torchopt.solvers.minimize(wells, Newton(), torch.tensor([0.1, -0.1])).params
        tensor([ 1., -1.])

    Reference:
        Dennis and Schnabel, Numerical Methods for Unconstrained Optimization and Nonlinear
        Equations, SIAM 1996, chapter 6.
    """

    linear_solve: LinearSolver | None = None
    halvings: int = 30

    no_change: ClassVar[Outcome] = Outcome.SMALL_CHANGE  # a whole step is as long as the error

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("halvings", self.halvings, 0)
        check_linear_solve(self.linear_solve)

    def as_minimizer(self) -> NewtonMinimizer:
        """Return what :func:`torchopt.solvers.minimize` runs; for loops of your own."""
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return NewtonMinimizer(**options)

    def carries(self, adjoint: object) -> None:
        """Be a loop: a step needs nothing but the last point."""

    def start(self, objective: Objective, x: Tensor) -> State:
        """Evaluate the residual at the start."""
        return first_state(State, objective, x)

    def advance(self, objective: Objective, state: State) -> State:
        """Take one step."""
        assert isinstance(objective, Residual)
        near = objective.linearized(state.x)
        found = near.solve(-near.value, self.linear_solve)
        d = found.x
        if found.outcome is LinearOutcome.SINGULAR or not is_finite(largest(d)):
            return dataclasses.replace(state, outcome=Outcome.SINGULAR)
        if self.halvings == 0:
            x = state.x + d
            value, r = objective(x)
            new = arrived(state, x, value, r, state.evaluations + 2)
            bad = None if is_finite(plain(value)) else Outcome.NOT_FINITE
            return dataclasses.replace(new, outcome=bad)
        state = dataclasses.replace(state, evaluations=state.evaluations + 1)
        return moved(objective, state, d, 1e-4, self.halvings)[0]


def check_linear_solve(solver: object) -> None:
    """Refuse what is no linear solver.

    Raises:
        TypeError: If it is none.
    """
    if solver is not None and not isinstance(solver, LinearSolver):
        raise TypeError(
            "linear_solve must be a solver such as torchopt.linear_solve.solve_gmres(), or None, "
            f"got {given(solver)}."
        )
