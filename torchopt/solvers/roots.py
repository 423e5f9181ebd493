"""Finding roots and fixed points: what a root finder is, and the two loops."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from torchopt.base import tree
from torchopt.base.misuse.given import given
from torchopt.diff.implicit.decorators import moved
from torchopt.solvers.base import IMPLICIT, AnyAdjoint, Solution, Solver, State, differentiated
from torchopt.solvers.flat import Number
from torchopt.solvers.linearized import Residuals
from torchopt.solvers.outcome import Outcome
from torchopt.typing import PyTree, TensorTree


class Residual(Residuals):
    r"""A function of a tree that returns a tree like it, as a root finder sees it.

    Its "gradient" is the residual :math:`F`, and its value the Euclidean norm of it.
    """

    called = "find_root"

    def residual(self, x: Tensor) -> Tensor:
        """Return the residual as a vector."""
        params = self.layout.unflatten(x)
        result = self.fn(params, *self.args)
        leaves = tree.flatten_like(
            result, params, self.layout.spec, "What fn returned", "params, of which it is a root"
        )
        for k, (leaf, shape) in enumerate(zip(leaves, self.layout.shapes)):
            if shape is not None and (not isinstance(leaf, Tensor) or leaf.shape != shape):
                name = tree.quoted(tree.leaf_names(params)[k])
                raise ValueError(
                    f"fn must return one residual for each entry of params: a tensor of shape "
                    f"{tuple(shape)} at {name}, got {given(leaf)}. With more residuals than "
                    "parameters, take least_squares."
                )
        pairs = zip(leaves, self.layout.dtypes)
        return self.layout.join([None if kind is None else x.to(kind) for x, kind in pairs])

    def __call__(self, x: Tensor) -> tuple[Number, Tensor]:
        """Return the norm of the residual, and the residual."""
        with torch.set_grad_enabled(self.create_graph):
            r = self.residual(x if self.create_graph else x.detach())
        r = r if self.create_graph else r.detach()
        return torch.linalg.vector_norm(r.detach()).item(), r


S = TypeVar("S", bound=State)


@dataclass(frozen=True, kw_only=True)
class RootSolver(Solver[S], abc.ABC):
    """An algorithm that finds a root of a function, step by step; see :class:`Solver`.

    ``state.grad`` is the residual, ``state.grad_norm`` its largest entry, ``state.value`` its
    Euclidean norm.

    Example:
        >>> import torch, torchopt
        >>> solver = torchopt.solvers.Newton()
        >>> fn = lambda p: p.square() - 2
        >>> state = solver.init(fn, torch.tensor(1.0))
        >>> while (outcome := solver.terminate(state)) is None:
        ...     state = solver.step(fn, state)
        >>> outcome, state.params
        (<Outcome.CONVERGED>, tensor(1.4142))
    """

    tolerance_grad: float = 1e-6
    tolerance_change: float = 1e-12
    max_iter: int = 100

    sees: ClassVar = Residual
    problem: ClassVar[str] = "find_root"
    measure: ClassVar[str] = "a residual"
    #: What it means if an iteration changes nothing.
    no_change: ClassVar[Outcome] = Outcome.STAGNATED

    def condition(self, fn: Callable[..., Any]) -> tuple[Callable[..., TensorTree], Any]:
        """Return the function that is zero at a solution, and what is known of its Jacobian."""
        return fn, ()

    def terminate(self, state: State) -> Outcome | None:
        """Return why to end at a state, or ``None``."""
        if state.grad_norm <= self.tolerance_grad:
            return Outcome.CONVERGED
        if state.outcome is not None:
            return state.outcome
        if state.change <= self.tolerance_change:
            return self.no_change
        if state.iterations >= self.max_iter:
            return Outcome.MAX_ITER
        if self.max_eval is not None and state.evaluations >= self.max_eval:
            return Outcome.MAX_EVAL
        return None


def find_root(
    fn: Callable[..., TensorTree],
    solver: RootSolver[Any],
    params: TensorTree,
    *args: PyTree,
    adjoint: AnyAdjoint | None = IMPLICIT,
) -> Solution:
    r"""Find a root of a function of a tree.

    .. math:: F(p^\star, a) = 0

    Args:
        fn: :math:`F`, called as ``fn(params, *args)``; returns a tree like ``params``.
        solver: Such as :class:`torchopt.solvers.Newton`; holds tolerances and limits.
        params: The start, any tree of floating-point or complex tensors. Left as it is.
        *args: Passed on to ``fn``.
        adjoint: How to differentiate the solution: :class:`torchopt.diff.Implicit`, the default, by
            :math:`F = 0` and one linear system, in ``args`` and in tensors that ``fn`` closes over;
            :class:`torchopt.diff.Unrolled`: by recording the iterations; ``None``: not at all.

    Returns:
        The last parameters, the Euclidean norm of the residual (``value``), its largest entry
        (``grad_norm``), numbers of iterations and calls, and why it ended. A solver that did not
        converge raises nothing: look at ``outcome``, or call ``checked()``.

    Raises:
        TypeError: If ``fn`` is no function, ``solver`` finds no roots, or a leaf of ``params`` is
            no tensor of floating-point or complex numbers.
        ValueError: If ``fn`` returns no tree like ``params``.

    Example:
        >>> import torch, torchopt
        >>> from torchopt.solvers import Newton, find_root
        >>> a = torch.tensor(4.0, requires_grad=True)
        >>> solution = find_root(lambda p, a: p**2 - a, Newton(), torch.tensor(1.0), a)
        >>> solution.outcome, torch.autograd.grad(solution.params, a)  # of sqrt(a)
        (<Outcome.CONVERGED>, (tensor(0.2500),))

    Reference:
        Nocedal and Wright, Numerical Optimization, 2nd edition, Springer 2006, chapter 11.
    """
    if not isinstance(solver, RootSolver):
        raise TypeError(
            "solver must find roots, such as torchopt.solvers.Newton() or Broyden(), got "
            f"{given(solver)}."
        )
    if adjoint is None:
        return solver.run(fn, params, *args)
    solution = differentiated(adjoint, solver, fn, params, args)
    return dataclasses.replace(solution, value=solution.state.value)


def fixed_point(
    fn: Callable[..., TensorTree],
    solver: RootSolver[Any],
    params: TensorTree,
    *args: PyTree,
    adjoint: AnyAdjoint | None = IMPLICIT,
) -> Solution:
    r"""Find a fixed point of a function of a tree.

    .. math:: p^\star = T(p^\star, a)

    Args:
        fn: :math:`T`, called as ``fn(params, *args)``; returns a tree like ``params``.
        solver: Such as :class:`torchopt.solvers.Anderson` or
            :class:`torchopt.solvers.FixedPointIteration`; or any other that finds roots, which is
            given :math:`T(p) - p`.
        params: The start. Left as it is.
        *args: Passed on to ``fn``.
        adjoint: As for :func:`find_root`; implicit by default.

    Returns:
        As :func:`find_root`; the residual is :math:`T(p) - p`.

    Raises:
        TypeError: As :func:`find_root`.
        ValueError: If ``fn`` returns no tree like ``params``.

    Example:
        >>> import torch, torchopt
        >>> from torchopt.solvers import Anderson, fixed_point
        >>> solution = fixed_point(torch.cos, Anderson(), torch.tensor(1.0))
        >>> solution.outcome, solution.params
        (<Outcome.CONVERGED>, tensor(0.7391))

    Reference:
        Walker and Ni, Anderson acceleration for fixed-point iterations, SIAM Journal on Numerical
        Analysis 49, 2011.
    """
    if not callable(fn):
        raise TypeError(
            f"fn must be a function of the parameters, got {given(fn)}. Write "
            "fixed_point(fn, solver, params)."
        )

    def residual(params: TensorTree, *args: PyTree) -> TensorTree:
        return moved(
            params, fn(params, *args), "What fn returned", "params", lambda x, image: image - x
        )

    residual.measure = "a distance from the fixed point"  # pyright: ignore[reportFunctionMemberAccess]
    return find_root(residual, solver, params, *args, adjoint=adjoint)
