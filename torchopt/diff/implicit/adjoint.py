"""Implicit differentiation as a choice that is handed to a loop."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchopt.base.eager import eager
from torchopt.base.misuse.given import given
from torchopt.diff.implicit.condition import Argument, Condition, Sealed
from torchopt.diff.implicit.decorators import check_residual, check_solve
from torchopt.diff.implicit.solution import transposed_derivative
from torchopt.diff.implicit.solving import solved
from torchopt.typing import PyTree, TensorTree


@dataclass(frozen=True, kw_only=True)
class Implicit:
    r"""Differentiate what a solver found by the condition that it satisfies.

    .. math::
        \nabla_p f(p^\star, a) = 0 \quad\Longrightarrow\quad
        \frac{\partial p^\star}{\partial a} = -(\nabla^2_{pp} f)^{-1}\, \nabla^2_{pa} f

    Memory does not grow with the iterations, and steps, line searches and decisions of the solver
    do not matter; only how near to the solution it came, which it is asked. For the arguments of
    the function and all tensors that it closes over, in every order and mode, as
    :func:`torchopt.diff.implicit.custom_root`. The start has no derivative.

    Args:
        solve: The linear solver, such as :func:`torchopt.linear_solve.solve_cg`; its matrix is
            symmetric, at a strict minimum positive definite. By default one is chosen by size. In a
            loop, :class:`torchopt.linear_solve.WarmStart` lets it begin where it ended last.
        residual_check: The largest absolute entry that is accepted at the solution, of what is zero
            there: the gradient, the residual, the distance from the fixed point. ``None`` does not
            look. A solver that ended without having converged warns in any case.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If ``residual_check`` is negative; when called, if the solution does not satisfy
            it.

    Example:
        >>> import torch
        >>> from torchopt.diff import Implicit
        >>> from torchopt.solvers import LBFGS, minimize
        >>> strength = torch.tensor(1.0, requires_grad=True)
        >>> fn = lambda p, strength: (p - 2).square() + strength * p.square()
        >>> solution = minimize(fn, LBFGS(), torch.tensor(0.0), strength, adjoint=Implicit())
        >>> torch.autograd.grad(solution.params, strength)  # of 2 / (1 + strength)
        (tensor(-0.5000),)

    Reference:
        Blondel et al., Efficient and modular implicit differentiation, NeurIPS 2022,
        https://arxiv.org/abs/2105.15183.
    """

    solve: Callable[..., PyTree] | None = None
    residual_check: float | None = None

    def __post_init__(self) -> None:
        check_solve(self.solve)
        check_residual(self.residual_check)

    @eager
    def __call__(
        self, solver: Any, fn: Callable[..., Tensor], params: TensorTree, args: tuple[PyTree, ...]
    ) -> Any:
        """Let a solver run, and connect what it found.

        Args:
            solver: Has ``run(fn, params, *args)``, which returns a solution, and
                ``condition(fn)``, which returns the function that is zero there.
            fn: Of the problem.
            params: The start.
            args: Further arguments of ``fn``.
        """
        ends: list[Any] = []

        def call(params: TensorTree, *args: PyTree) -> Any:
            ends.append(solver.run(fn, params, *args))
            return ends[-1].params, None

        found, _ = solved(call, [params, *args], {}, has_aux=True)
        failed = [end for end in ends if not end.outcome.success]
        end = (failed or ends)[-1]  # of a batch, one that has not converged
        arguments = [Argument(k, value, True, f"args[{k}]") for k, value in enumerate(args)]
        function, tags = solver.condition(fn)
        title = f"the gradient of {given(fn)}" if tags else ""
        condition = Condition(function, found, arguments, self.solve, tags, title)
        condition.warn_of_constants("all", params)
        if not condition.is_differentiated(self.residual_check):
            return dataclasses.replace(end, params=found)
        if failed:
            warnings.warn(
                f"The derivative is that of a solution, and the solver has not come to one: "
                f"{end.outcome} after {end.iterations} iterations, with {end.measure} of "
                f"{end.grad_norm:.3g}. {end.outcome.text}",
                UserWarning,
                stacklevel=3,
            )
        params = condition.solution()
        return dataclasses.replace(end, params=params, value=fn(params, *args))

    def indirect(self, problem: Any) -> Any:
        """Return the second term of a hypergradient; see :func:`torchopt.diff.hypergradient`."""

        def gradient(w: list[Tensor], h: list[Tensor]) -> list[Tensor]:
            return list(problem.inner_gradient(w, h))

        arguments = [Argument(0, problem.h, True, "outer_params")]
        title = f"the gradient of {given(problem.inner_loss)}"
        condition = Condition(
            Sealed(gradient), problem.w, arguments, self.solve, ("symmetric",), title
        )
        if self.residual_check is not None:
            condition.check(self.residual_check)
        with torch.no_grad():
            found = transposed_derivative(
                condition, condition.point, condition.parameters, problem.pull
            )
        return found[: len(problem.h)]
