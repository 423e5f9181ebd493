"""What a solver is, and the loop around it: written once.

A solver has ``start``, ``advance`` and ``terminate`` over flat vectors. Stepping by hand, the loop
and ``minimize`` are the same for all of them. How the result is differentiated is an object of its
own, given to ``minimize``.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar, Union

import torch
from torch import Tensor
from typing_extensions import TypeAlias

from torchopt.base import misuse, tree
from torchopt.base.misuse.given import given
from torchopt.core import hyper
from torchopt.diff.adjoints.base import Adjoint as LoopAdjoint
from torchopt.diff.implicit import Implicit
from torchopt.diff.stationarity import stationarity
from torchopt.solvers.flat import Layout, Number, Objective, TreeObjective
from torchopt.solvers.outcome import Outcome
from torchopt.solvers.replaying import check_adjoint, numbered, replayed
from torchopt.typing import PyTree, TensorTree


@dataclass(frozen=True, eq=False, repr=False)
class State:
    """Where a solver is; immutable. Subclasses add what an algorithm remembers."""

    x: Tensor  #: The parameters as one vector.
    value: Number
    grad: Tensor  #: Its gradient, as one vector.
    grad_norm: float  #: The largest entry of the gradient.
    layout: Layout
    iterations: int = 0
    evaluations: int = 1  #: Calls of the function.
    change: float = float("inf")  #: The largest change of an entry in the last iteration.
    fall: float = float("inf")  #: The change of the value in the last iteration.
    outcome: Outcome | None = None  #: What the last iteration itself found out.

    @property
    def params(self) -> TensorTree:
        """The parameters as the tree that was given."""
        return self.layout.unflatten(self.x)


S = TypeVar("S", bound=State)


@dataclass(frozen=True, eq=False)
class Solution:
    """What :func:`torchopt.solvers.minimize` returns.

    Example:
        >>> import torch, torchopt
        >>> fn = lambda p: (p - 2).square().sum()
        >>> solution = torchopt.solvers.minimize(fn, torchopt.solvers.LBFGS(), torch.zeros(1))
        >>> solution.checked().params, solution.iterations, solution.evaluations
        (tensor([2.]), 2, 3)
    """

    params: TensorTree
    value: Number  #: At ``params``: a float, or a 0-d tensor with its graph.
    #: The largest absolute entry of the gradient there, or of the residual of :func:`find_root` and
    #: :func:`fixed_point`.
    grad_norm: float
    iterations: int
    evaluations: int  #: Calls of the function, each with its gradient.
    outcome: Outcome
    state: State = dataclasses.field(repr=False)
    #: What ``grad_norm`` is the largest entry of, in words.
    measure: str = dataclasses.field(default="a gradient", repr=False)

    def checked(self) -> Solution:
        """Return itself.

        Raises:
            RuntimeError: If no tolerance was reached; with the text of the outcome.
        """
        if not self.outcome.success:
            raise RuntimeError(
                f"{self.outcome} after {self.iterations} iterations and {self.evaluations} calls, "
                f"with {self.measure} of {self.grad_norm:.3g}. {self.outcome.text}"
            )
        return self


@dataclass(frozen=True, kw_only=True)
class Solver(abc.ABC, Generic[S]):
    """An algorithm that minimises a function of its own, step by step.

    A subclass is a frozen dataclass that defines :meth:`start` and :meth:`advance` over flat
    vectors. ``init``, ``step`` and ``terminate`` are for stepping by hand;
    :func:`torchopt.solvers.minimize` is the loop.

    Example:
        >>> import torch, torchopt
        >>> solver = torchopt.solvers.LBFGS()
        >>> fn = lambda p: (p["w"] - 2).square().sum()
        >>> state = solver.init(fn, {"w": torch.zeros(2)})
        >>> while (outcome := solver.terminate(state)) is None:
        ...     state = solver.step(fn, state)
        >>> outcome, state.params
        (<Outcome.CONVERGED>, {'w': tensor([2., 2.])})
    """

    #: The function that runs it.
    problem: ClassVar[str] = "minimize"
    #: What is zero at a solution, in words, where the function itself says nothing.
    measure: ClassVar[str] = "a gradient"
    #: Whether its steps are what they are with gradients that are constants.
    first_order: ClassVar[bool] = False
    #: ``(fn, layout, args, create_graph)``: what it makes of a function of a tree.
    sees: ClassVar[Callable[..., Objective]] = TreeObjective

    tolerance_grad: float = 1e-7
    tolerance_change: float = 1e-9
    max_iter: int = 500
    max_eval: int | None = None

    def __post_init__(self) -> None:
        for name in ("tolerance_grad", "tolerance_change"):
            hyper.check_number(name, getattr(self, name), hyper.HyperSpec(ge=0))
        check_count("max_iter", self.max_iter, 0)
        if self.max_eval is not None:
            check_count("max_eval", self.max_eval, 0)

    @abc.abstractmethod
    def start(self, objective: Objective, x: Tensor) -> S:
        """Evaluate the function at the start and return the first state."""

    @abc.abstractmethod
    def advance(self, objective: Objective, state: S) -> S:
        """Return the state after one iteration; pure."""

    def terminate(self, state: State) -> Outcome | None:
        """Return why to end at a state, or ``None``."""
        if state.outcome is not None:
            return state.outcome
        if state.grad_norm <= self.tolerance_grad:
            return Outcome.CONVERGED
        if state.change <= self.tolerance_change or state.fall < self.tolerance_change:
            return Outcome.SMALL_CHANGE
        if state.iterations >= self.max_iter:
            return Outcome.MAX_ITER
        if self.max_eval is not None and state.evaluations >= self.max_eval:
            return Outcome.MAX_EVAL
        return None

    def objective(
        self,
        fn: Callable[..., Any],
        layout: Layout,
        args: tuple[PyTree, ...],
        create_graph: bool = False,
    ) -> Objective:
        """Return a function of a tree as the solver sees it."""
        return type(self).sees(fn, layout, args, create_graph)

    def run(
        self,
        fn: Callable[..., Any],
        params: TensorTree,
        *args: PyTree,
        create_graph: bool = False,
    ) -> Solution:
        """Run the loop and return the last point; by default no derivative is recorded."""
        found = iterate(self, self.objective(fn, Layout(params), args, create_graph), params)
        return dataclasses.replace(found, measure=getattr(fn, "measure", self.measure))

    def condition(self, fn: Callable[..., Any]) -> tuple[Callable[..., TensorTree], Any]:
        """Return the function that is zero at a solution, and what is known of its Jacobian."""
        return stationarity(fn), ("symmetric",)

    def as_minimizer(self) -> Solver[Any]:
        """Return the solver that :func:`torchopt.solvers.minimize` runs: mostly itself.

        Raises:
            TypeError: If it minimises no functions.
        """
        if self.problem != "minimize":
            raise TypeError(
                f"{type(self).__name__} does not minimise a function; it is a solver for "
                f"torchopt.solvers.{self.problem}."
            )
        return self

    def carries(self, adjoint: object) -> None:
        """Refuse to be a loop of steps that are taken again.

        Raises:
            TypeError: Naming what to write.
        """
        raise TypeError(
            f"adjoint={adjoint!r} takes steps again, which {type(self).__name__} cannot: what "
            "it remembers of the way grows with the steps, or has no derivative. Write "
            "adjoint=torchopt.diff.Unrolled(), which records them, or torchopt.diff.Implicit()."
        )

    def packed(self, state: S) -> PyTree:
        """Return what the next step needs of a state, as a tree."""
        return state.x, numbered(state.value, state.x), state.grad

    def unpacked(self, objective: Objective, carry: PyTree) -> Any:
        """Return the state that was packed."""
        x, value, grad = carry
        number = value if objective.create_graph else plain(value)
        return State(x, number, grad, largest(grad), objective.layout)

    def init(self, fn: Callable[..., Any], params: TensorTree, *args: PyTree) -> S:
        """Return the state at ``params``, for a loop of your own; calls ``fn(params, *args)``."""
        layout = Layout(params)
        with torch.no_grad():
            return self.start(self.objective(fn, layout, args), layout.flatten(params))

    def step(self, fn: Callable[..., Any], state: S, *args: PyTree) -> S:
        """Return the state after one more iteration; records no derivative."""
        with torch.no_grad():
            return self.advance(self.objective(fn, state.layout, args), state)


def check_count(name: str, value: Any, least: int) -> None:
    """Refuse what is no integer of at least ``least``.

    Raises:
        TypeError: If it is no integer.
        ValueError: If it is too small.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {misuse.short(value)}.")
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {value}.")


def first_state(kind: type[S], objective: Objective, x: Tensor, **memory: Any) -> S:
    """Evaluate the function at the start, and return a state of this kind."""
    value, grad = objective(x)
    outcome = None if is_finite(value, grad_norm := largest(grad)) else Outcome.NOT_FINITE
    return kind(x, value, grad, grad_norm, objective.layout, outcome=outcome, **memory)


def largest(x: Tensor) -> float:
    """Return the largest absolute entry of a vector; ``nan`` if there is one."""
    return torch.linalg.vector_norm(x.detach(), float("inf")).item()


def plain(number: Number) -> float:
    """Return a number without its history."""
    return number.item() if isinstance(number, Tensor) else number


def is_finite(*numbers: Number) -> bool:
    """Whether numbers are neither infinite nor ``nan``."""
    return all(bool(number - number == 0) for number in numbers)


# The loop ----------------------------------------------------------------------------------------


def iterate(solver: Solver[S], objective: Objective, params: TensorTree) -> Solution:
    """Let a solver go on until it ends."""
    with torch.set_grad_enabled(objective.create_graph):
        state = solver.start(objective, objective.layout.flatten(params))
        while (outcome := solver.terminate(state)) is None:
            state = solver.advance(objective, state)
        counts = state.iterations, state.evaluations
        return Solution(state.params, state.value, state.grad_norm, *counts, outcome, state)


class Adjoint(Protocol):
    """A way to differentiate a solution; it decides how the loop is run."""

    def __call__(
        self,
        solver: Solver[Any],
        fn: Callable[..., Tensor],
        params: TensorTree,
        args: tuple[PyTree, ...],
    ) -> Solution:
        """Return a solution that has the derivative."""
        ...


#: What ``minimize`` and the others take: a way to differentiate a solution, or a loop.
AnyAdjoint: TypeAlias = Union[Adjoint, LoopAdjoint]

#: How solutions are differentiated where nothing else is said.
IMPLICIT = Implicit()


def minimize(
    fn: Callable[..., Tensor],
    solver: Solver[Any],
    params: TensorTree,
    *args: PyTree,
    adjoint: AnyAdjoint | None = IMPLICIT,
) -> Solution:
    r"""Find a local minimum of a scalar function of a tree.

    .. math:: f(p^\star, a) = \min_p f(p, a)

    Args:
        fn: :math:`f`, called as ``fn(params, *args)``; returns a real scalar tensor.
        solver: Such as :class:`torchopt.solvers.LBFGS` or :class:`torchopt.solvers.Newton`; holds
            tolerances and limits.
        params: The start, any tree of floating-point or complex tensors. Left as it is.
        *args: Passed on to ``fn``.
        adjoint: How to differentiate the solution: :class:`torchopt.diff.Implicit`, the default, by
            the gradient that is zero there, in ``args`` and in tensors that ``fn`` closes over; if
            one of them requires grad, the solution does. :class:`torchopt.diff.Unrolled`: by
            recording the iterations; :class:`torchopt.diff.Checkpointed` and the others of
            :func:`torchopt.diff.unroll`: by taking them again, where the solver remembers nothing
            that grows (:class:`GradientDescent`, :class:`Newton`). ``None``: not at all, and
            without a last call of ``fn`` that looks for such tensors.

    Returns:
        The last parameters with value, largest entry of the gradient, numbers of iterations and of
        calls, and why it ended. A solver that did not converge raises nothing: look at
        ``outcome``, or call ``checked()``.

    Raises:
        TypeError: If ``fn`` is no function or returns no tensor, or a leaf of ``params`` is no
            tensor of floating-point or complex numbers.
        ValueError: If ``fn`` returns no real scalar, or one without a graph or that does not depend
            on ``params``.

    Example:
        >>> import torch, torchopt
        >>> def rosenbrock(p):
        ...     return (1 - p[0]) ** 2 + 100 * (p[1] - p[0] ** 2) ** 2
        >>> start = torch.tensor([-1.2, 1.0], dtype=torch.float64)
        >>> solution = torchopt.solvers.minimize(rosenbrock, torchopt.solvers.LBFGS(), start)
        >>> solution.outcome, solution.params
        (<Outcome.SMALL_CHANGE>, tensor([1.0000, 1.0000], dtype=torch.float64))

    Reference:
        Nocedal and Wright, Numerical Optimization, 2nd edition, Springer 2006.
    """
    if not isinstance(solver, Solver):
        raise TypeError(
            f"solver must be a solver such as torchopt.solvers.LBFGS(), got {given(solver)}."
            " A transformation becomes one by torchopt.solvers.GradientDescent(tx)."
        )
    solver = solver.as_minimizer()
    if adjoint is None:
        return solver.run(fn, params, *args)
    if adjoint is IMPLICIT:  # parameters mostly require grad: nobody is told that this is no use
        leaves, spec = tree.flatten(params)
        bare = [x.detach() if isinstance(x, Tensor) else x for x in leaves]
        params = tree.unflatten(spec, bare)
    return differentiated(adjoint, solver, fn, params, args)


def differentiated(
    adjoint: AnyAdjoint,
    solver: Solver[Any],
    fn: Callable[..., Any],
    params: TensorTree,
    args: tuple[PyTree, ...],
) -> Solution:
    """Run a solver as an adjoint wants it.

    Raises:
        TypeError: If it is none, or one of a loop that the solver cannot be.
    """
    check_adjoint(adjoint)
    if callable(adjoint):
        return adjoint(solver, fn, params, args)  # pyright: ignore[reportReturnType]
    return replayed(adjoint, solver, fn, params, args)
