"""Newton's method for minima: the Hessian made positive definite, and a line search."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchopt.linear_solve import LinearOperator, LinearSolver, solve_cg, solve_cholesky
from torchopt.linear_solve import Outcome as LinearOutcome
from torchopt.solvers.base import Solver, State, first_state, is_finite, largest, plain
from torchopt.solvers.flat import Objective, TreeObjective
from torchopt.solvers.line_search import Backtracking, FixedLength, LineSearch, searched
from torchopt.solvers.linearized import DENSE, Linearized
from torchopt.solvers.outcome import Outcome


#: Of a linear solver: the matrix is not what a direction downhill needs.
WRONG = (LinearOutcome.NOT_POSITIVE_DEFINITE, LinearOutcome.SINGULAR, LinearOutcome.NON_FINITE)


class Curved(TreeObjective):
    """A function of a tree with its Hessian."""

    def gradient(self, x: Tensor) -> Tensor:
        """Return the gradient, with its graph."""
        return TreeObjective(self.fn, self.layout, self.args, create_graph=True)(x)[1]

    def linearized(self, x: Tensor) -> Linearized:
        """Return the gradient near a point; its Jacobian is the Hessian."""
        return Linearized(self.gradient, x, self.create_graph)


@dataclass(frozen=True, kw_only=True)
class NewtonMinimizer(Solver[State]):
    r"""Newton's method as :func:`torchopt.solvers.minimize` runs it; see there for arguments.

    .. math:: p_{k+1} = p_k - t_k\, B_k^{-1} \nabla f(p_k)

    Made by ``Newton(...).as_minimizer()``, for loops of one's own.
    """

    sees: ClassVar = Curved

    tolerance_grad: float = 1e-6
    tolerance_change: float = 1e-12
    max_iter: int = 100
    linear_solve: LinearSolver | None = None
    halvings: int = 30

    @property
    def search(self) -> LineSearch:
        """The line search."""
        return Backtracking(max_eval=self.halvings + 1) if self.halvings else FixedLength()

    def carries(self, adjoint: object) -> None:
        """Be a loop: a step needs nothing but the last point."""

    def start(self, objective: Objective, x: Tensor) -> State:
        """Evaluate the function at the start."""
        return first_state(State, objective, x)

    def advance(self, objective: Objective, state: State) -> State:
        """Take one step."""
        assert isinstance(objective, Curved)
        near = objective.linearized(state.x)
        state = dataclasses.replace(
            state, iterations=state.iterations + 1, evaluations=state.evaluations + 1
        )
        if self.linear_solve is None and near.x.numel() <= DENSE:
            d = dense_direction(near)
        else:
            d = self.direction(near)
        if not is_finite(largest(d)):
            return dataclasses.replace(state, outcome=Outcome.NOT_FINITE)
        slope = objective.number(near.value.dot(d))
        most = math.inf if self.max_eval is None else self.max_eval - state.evaluations
        return searched(self.search, objective, state, d, slope, 1.0, most, self.tolerance_change)[
            0
        ]

    def direction(self, near: Linearized) -> Tensor:
        """Return a direction by products alone, with the least ridge of some that leads downhill.

        As the iterations end where the curvature is not positive, the first of them that is solved
        tells that the matrix is positive definite as far as it matters here.
        """
        g = near.value.detach()
        solver = self.linear_solve or self.inexact(near)
        operator = LinearOperator(near.pull, tags=("symmetric",), adjoint=near.pull)
        if near.create_graph:  # a product as a function of the point can be differentiated
            function = near.function

            def product(v: Tensor, x: Tensor) -> Tensor:
                return Linearized(function, x, True).pull(v)

            operator = LinearOperator(product, near.x, tags=("symmetric",))
        first = 1e-3 * plain((near.pull(g).detach().norm() / g.norm()).double())
        for ridge in (0.0, *(first * 4.0**k for k in range(11))):
            found = with_ridge(solver, ridge).solve(operator, -near.value)
            d: Any = found.x
            size, fall = plain(d.detach().norm()), -plain(g.dot(d.detach()))
            # not at a right angle; and not a step as long as a ridge makes it that just cancels
            steep = fall > 1e-8 * plain(g.norm()) * size and fall >= 0.1 * ridge * size**2
            if steep and found.outcome not in WRONG:
                return d
        return -near.value

    def inexact(self, near: Linearized) -> LinearSolver:
        r"""Return conjugate gradients that solve as well as it pays at this distance.

        To :math:`\min(\tfrac12, \sqrt{\lVert g \rVert})` of the gradient, for convergence faster
        than linear; to the end where the steps are differentiated.
        """
        size = plain(near.value.detach().norm())
        rtol = None if near.create_graph else min(0.5, size**0.5)
        return solve_cg(rtol=rtol, on_failure="ignore")


def with_ridge(solver: LinearSolver, ridge: float) -> LinearSolver:
    """Return a solver with more of a ridge, that says nothing where it fails."""
    whole = ridge if solver.ridge is None else solver.ridge + ridge
    return dataclasses.replace(solver, ridge=whole if ridge else solver.ridge, on_failure="ignore")


def dense_direction(near: Linearized) -> Tensor:
    r"""Return :math:`-B^{-1} g`, with the Hessian written down.

    :math:`B = Q\, \max(|\Lambda|, \delta)\, Q^T` is the Hessian where that is positive definite;
    along other eigenvectors the step leads downhill, as far as the curvature is large. What is
    added is a constant where the steps are differentiated.

    Reference:
        Nocedal and Wright, Numerical Optimization, 2nd edition, section 3.4; Dauphin et al.,
        Identifying and attacking the saddle point problem in high-dimensional non-convex
        optimization, NeurIPS 2014.
    """
    matrix = near.matrix()
    matrix = (matrix + matrix.mT) / 2
    plain_matrix = matrix.detach()
    if not bool(torch.isfinite(plain_matrix).all()):
        return torch.full_like(near.value, torch.nan)
    values, vectors = torch.linalg.eigh(plain_matrix)
    sizes = values.abs()
    least = torch.finfo(values.dtype).eps ** 0.5 * sizes.max()
    lifted = sizes.clamp_min(plain(least) or 1.0)
    if not torch.equal(lifted, values):
        matrix = matrix + (vectors * (lifted - values)) @ vectors.mT
    operator = LinearOperator(
        lambda v, m: m @ v,
        matrix,
        tags=("positive_definite",),
        adjoint=lambda u, m: m.mT @ u,
    )
    found: Any = solve_cholesky(on_failure="ignore").solve(operator, -near.value).x
    return found
