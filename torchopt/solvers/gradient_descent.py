"""A transformation of gradients as a solver."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from torchopt.core.opt_state import OptState
from torchopt.core.pair import as_transformation
from torchopt.core.transform import GradientTransformation, check_transformation
from torchopt.solvers.base import Solver, State, first_state, is_finite, largest, plain
from torchopt.solvers.flat import Objective
from torchopt.solvers.outcome import Outcome
from torchopt.typing import PyTree


@dataclass(frozen=True, eq=False, repr=False)
class DescentState(State):
    """Where the descent is, with the state of its transformation."""

    opt_state: OptState | Any = None


@dataclass(frozen=True)
class GradientDescent(Solver[DescentState]):
    r"""Follow any :class:`~torchopt.GradientTransformation` until a tolerance is reached.

    .. math:: p_{k+1} = p_k + u_k(\nabla f(p_k), p_k)

    Args:
        tx: The transformation; its recipe says how long steps are.
        tolerance_grad: Converged where no entry of the gradient is larger; >= 0.
        tolerance_change: Converged where an iteration changes no entry of the parameters by more,
            or the value by less; >= 0. A value that goes up and down may meet it by chance: 0
            leaves it to the gradient.
        max_iter: Most iterations.
        max_eval: Most calls of the function, one for each iteration and one at the start.

    Differentiable, with :class:`torchopt.diff.Unrolled`, in the start, the arguments of the
    function and the hyperparameters of the transformation.

    Raises:
        TypeError: If ``tx`` is no transformation.
        ValueError: If a number is out of bounds.

    Example:
        >>> import torch, torchopt
        >>> from torchopt.solvers import GradientDescent, minimize
        >>> solver = GradientDescent(torchopt.adam(0.1), tolerance_grad=1e-4)
        >>> solution = minimize(lambda p: (p - 1).square().sum(), solver, torch.zeros(2))
        >>> solution.outcome.success, solution.params
        (True, tensor([1.0000, 1.0000]))
    """

    tx: GradientTransformation

    first_order: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "tx", as_transformation(self.tx))
        check_transformation(self.tx, type(self).__name__)

    def carries(self, adjoint: object) -> None:
        """Be a loop: a step needs the last point and the state of the transformation."""

    def packed(self, state: DescentState) -> PyTree:
        """Return what the next step needs of a state, as a tree."""
        return super().packed(state), state.opt_state

    def unpacked(self, objective: Objective, carry: PyTree) -> DescentState:
        """Return the state that was packed."""
        point, opt_state = carry
        last = super().unpacked(objective, point)
        kept = {f.name: getattr(last, f.name) for f in dataclasses.fields(last)}
        return DescentState(**kept, opt_state=opt_state)

    def start(self, objective: Objective, x: Tensor) -> DescentState:
        """Evaluate the function at the start, with a fresh state of the transformation."""
        opt_state = self.tx.init(objective.layout.unflatten(x))
        return first_state(DescentState, objective, x, opt_state=opt_state)

    def advance(self, objective: Objective, state: DescentState) -> DescentState:
        """Take one step of the transformation."""
        layout = objective.layout
        params, opt_state = self.tx.apply_gradients(
            layout.unflatten(state.grad),
            state.opt_state,
            layout.unflatten(state.x),
            inplace=False,
        )
        x = layout.flatten(params)
        value, grad = objective(x)
        state = dataclasses.replace(
            state, iterations=state.iterations + 1, evaluations=state.evaluations + 1
        )
        if not is_finite(value, grad_norm := largest(grad)):
            return dataclasses.replace(state, outcome=Outcome.NOT_FINITE)
        return dataclasses.replace(
            state,
            x=x,
            value=value,
            grad=grad,
            grad_norm=grad_norm,
            change=largest(x - state.x),
            fall=abs(plain(value) - plain(state.value)),
            opt_state=opt_state,
        )
