"""Nonlinear least squares: what is minimised, and the Gauss-Newton family."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from torchopt.base.misuse.given import given
from torchopt.core import hyper
from torchopt.diff.stationarity import stationarity
from torchopt.linear_solve import LinearOperator, LinearSolver, solve_cg
from torchopt.solvers.base import (
    Adjoint,
    Solution,
    Solver,
    State,
    check_count,
    first_state,
    is_finite,
    largest,
    minimize,
    plain,
)
from torchopt.solvers.fixed_points import least_squares_of
from torchopt.solvers.flat import Layout, Number, Objective
from torchopt.solvers.linearized import DENSE, Linearized
from torchopt.solvers.newton import check_linear_solve
from torchopt.solvers.outcome import Outcome
from torchopt.solvers.roots import IMPLICIT
from torchopt.typing import PyTree, TensorTree


def half_of_squares(residual: TensorTree) -> Tensor:
    """Return half the sum of the squares of a tree, of absolute values if complex.

    Raises:
        TypeError: If a leaf is no tensor of floating-point or complex numbers.
    """
    layout = Layout(residual, "The residuals that fn returns")
    return layout.flatten(residual).square().sum() / 2


class Squares(Objective):
    r"""Half the sum of squared residuals, as a solver sees it: value :math:`\tfrac12 r^T r`.

    Args:
        fn: ``fn(params, *args)`` returns a tree of residuals.
        layout: Of ``params``.
        args: Passed on.
        create_graph: Record what is computed.
    """

    def __init__(
        self,
        fn: Callable[..., TensorTree],
        layout: Layout,
        args: Sequence[PyTree] = (),
        create_graph: bool = False,
    ) -> None:
        if not callable(fn):
            raise TypeError(
                f"fn must be a function of the parameters, got {given(fn)}. Write "
                "least_squares(fn, solver, params)."
            )
        self.fn, self.layout, self.args, self.create_graph = fn, layout, args, create_graph

    def residual(self, x: Tensor) -> Tensor:
        """Return all residuals as a vector."""
        result = self.fn(self.layout.unflatten(x), *self.args)
        return Layout(result, "The residuals that fn returns").flatten(result)

    def linearized(self, x: Tensor) -> Linearized:
        """Return the residuals and their Jacobian near a point."""
        return Linearized(self.residual, x, self.create_graph)

    def __call__(self, x: Tensor) -> tuple[Number, Tensor]:
        """Return value and gradient."""
        near = self.linearized(x)
        value = near.value.square().sum() / 2
        return (value if self.create_graph else value.item()), near.pull(near.value)

    def value(self, x: Tensor) -> float:
        """Return the value alone."""
        with torch.no_grad():
            return plain(self.residual(x.detach()).square().sum() / 2)


S = TypeVar("S", bound=State)


@dataclass(frozen=True, kw_only=True)
class LeastSquaresSolver(Solver[S], abc.ABC):
    """An algorithm that minimises a sum of squares, step by step; see :class:`Solver`.

    Example:
        >>> import torch, torchopt
        >>> solver = torchopt.solvers.GaussNewton()
        >>> fn = lambda p: torch.stack([p - 1, p**2 - 1])
        >>> state = solver.init(fn, torch.tensor(3.0))
        >>> while (outcome := solver.terminate(state)) is None:
        ...     state = solver.step(fn, state)
        >>> outcome.success, abs(state.params - 1) < 1e-5
        (True, tensor(True))
    """

    problem: ClassVar[str] = "least_squares"

    tolerance_change: float = 1e-12
    max_iter: int = 200

    def objective(
        self,
        fn: Callable[..., Any],
        layout: Layout,
        args: tuple[PyTree, ...],
        create_graph: bool = False,
    ) -> Squares:
        """Return a function of a tree as the solver sees it."""
        return Squares(fn, layout, args, create_graph)

    def condition(self, fn: Callable[..., Any]) -> tuple[Callable[..., TensorTree], Any]:
        """Return the gradient of the sum of squares."""

        def half(params: TensorTree, *args: PyTree) -> Tensor:
            return half_of_squares(fn(params, *args))

        return stationarity(half), ("symmetric",)


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


def least_squares(
    fn: Callable[..., TensorTree],
    solver: Solver[Any],
    params: TensorTree,
    *args: PyTree,
    adjoint: Adjoint | None = IMPLICIT,
) -> Solution:
    r"""Find a local minimum of a sum of squares.

    .. math:: \min_p\; \tfrac12 \lVert r(p, a) \rVert^2

    Args:
        fn: :math:`r`, called as ``fn(params, *args)``; returns any tree of residuals.
        solver: Such as :class:`torchopt.solvers.LevenbergMarquardt`; one for :func:`minimize` is
            given half the sum of squares.
        params: The start, any tree of floating-point or complex tensors. Left as it is.
        *args: Passed on to ``fn``.
        adjoint: How to differentiate the solution: :class:`torchopt.diff.Implicit`, the default, by
            the gradient that is zero there (with the second derivatives of the residuals, which
            Gauss-Newton leaves out of its steps); :class:`torchopt.solvers.Unrolled`: by recording
            the iterations; ``None``: not at all.

    Returns:
        The last parameters, half the sum of squares, the largest entry of its gradient, numbers of
        iterations and calls, and why it ended.

    Raises:
        TypeError: If ``fn`` is no function, ``solver`` is no solver, or a leaf is no tensor of
            floating-point or complex numbers.

    Example:
        >>> import torch
        >>> from torchopt.solvers import GaussNewton, least_squares
        >>> y = torch.tensor([1.0, 3.0], requires_grad=True)
        >>> solution = least_squares(lambda p, y: p - y, GaussNewton(), torch.tensor(0.0), y)
        >>> solution.params.item(), torch.autograd.grad(solution.params, y)  # the mean
        (2.0, (tensor([0.5000, 0.5000]),))

    Reference:
        Nocedal and Wright, Numerical Optimization, 2nd edition, Springer 2006, chapter 10.
    """
    if not callable(fn):
        raise TypeError(
            f"fn must be a function of the parameters, got {given(fn)}. Write "
            "least_squares(fn, solver, params)."
        )
    if not isinstance(solver, LeastSquaresSolver):

        def half(params: TensorTree, *args: PyTree) -> Tensor:
            return half_of_squares(fn(params, *args))

        return minimize(half, solver, params, *args, adjoint=adjoint)
    if adjoint is None:
        return solver.run(fn, params, *args)
    solution = adjoint(solver, fn, params, args)
    if solution.value is not solution.state.value:  # what fn returns at a connected solution
        solution = dataclasses.replace(solution, value=half_of_squares(solution.value))
    return solution
