"""Nonlinear least squares: the function that runs a solver."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor

from torchopt.base.misuse.given import given
from torchopt.solvers.base import (
    IMPLICIT,
    AnyAdjoint,
    Solution,
    Solver,
    differentiated,
    minimize,
)
from torchopt.solvers.squares import LeastSquaresSolver, half_of_squares
from torchopt.typing import PyTree, TensorTree


def least_squares(
    fn: Callable[..., TensorTree],
    solver: Solver[Any],
    params: TensorTree,
    *args: PyTree,
    adjoint: AnyAdjoint | None = IMPLICIT,
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
            Gauss-Newton leaves out of its steps); :class:`torchopt.diff.Unrolled`: by recording
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
    solution = differentiated(adjoint, solver, fn, params, args)
    if solution.value is not solution.state.value:  # what fn returns at a connected solution
        solution = dataclasses.replace(solution, value=half_of_squares(solution.value))
    return solution
