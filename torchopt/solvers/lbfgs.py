"""L-BFGS: quasi-Newton steps from the last few changes of parameters and gradient."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Union

import torch
from torch import Tensor

from torchopt.base import misuse
from torchopt.core import hyper
from torchopt.solvers.base import Solver, State, check_count, first_state, is_finite, plain
from torchopt.solvers.flat import Number, Objective
from torchopt.solvers.line_search import (
    Backtracking,
    FixedLength,
    LineSearch,
    StrongWolfe,
    searched,
)
from torchopt.solvers.outcome import Outcome


class Pair(NamedTuple):
    r"""A step :math:`s`, the change :math:`y` of the gradient over it, and :math:`1 / s^T y`."""

    s: Tensor
    y: Tensor
    rho: Tensor


def inverse_hessian_product(g: Tensor, pairs: tuple[Pair, ...], scale: Number) -> Tensor:
    r"""Return :math:`H g`, where :math:`H` approximates the inverse Hessian: two loops over pairs.

    .. math::
        q &\leftarrow g \\
        \alpha_i &= \rho_i\, s_i^T q, \quad q \leftarrow q - \alpha_i y_i
            \qquad i = k-1, \dots, k-m \\
        r &\leftarrow \gamma\, q \\
        \beta &= \rho_i\, y_i^T r, \quad r \leftarrow r + (\alpha_i - \beta)\, s_i
            \qquad i = k-m, \dots, k-1

    Args:
        g: The gradient, or any vector.
        pairs: Oldest first.
        scale: :math:`\gamma`, of the first approximation :math:`\gamma I`.

    Reference:
        Nocedal and Wright, Numerical Optimization, 2nd edition, algorithm 7.4.
    """
    q, alphas = g, []
    for s, y, rho in reversed(pairs):
        alpha = rho * s.dot(q)
        q = torch.addcmul(q, alpha, y, value=-1)  # one pass; alpha stays on its device
        alphas.append(alpha)
    r = scale * q
    for (s, y, rho), alpha in zip(pairs, reversed(alphas)):
        beta = rho * y.dot(r)
        r = torch.addcmul(r, alpha - beta, s)
    return r


@dataclass(frozen=True, eq=False, repr=False)
class LBFGSState(State):
    """Where L-BFGS is, with what it remembers of the way."""

    pairs: tuple[Pair, ...] = ()  #: Oldest first.
    scale: Number = 1.0  #: Of the first approximation of the inverse Hessian.
    direction: Tensor | None = None  #: Of the last iteration.
    slope: Number = 0.0  #: Of the function along it, where the iteration began.
    length: Number = 0.0  #: The last iteration moved by ``length * direction``.
    previous_grad: Tensor | None = None  #: Before the last iteration.
    previous_value: Number = math.nan  #: Before the last iteration.


LINE_SEARCHES: dict[str | None, LineSearch] = {
    None: FixedLength(),
    "strong_wolfe": StrongWolfe(),
    "backtracking": Backtracking(),
}


@dataclass(frozen=True)
class LBFGS(Solver[LBFGSState]):
    r"""Limited-memory BFGS.

    .. math:: p_{k+1} = p_k - t_k H_k \nabla f(p_k)

    with :math:`H_k` from the last pairs :math:`s = p_{k+1} - p_k`,
    :math:`y = \nabla f(p_{k+1}) - \nabla f(p_k)`, and :math:`t_k` from a line search that first
    tries ``lr`` (at the first iteration, at most ``lr`` over the sum of the absolute entries of the
    gradient). Pairs with :math:`s^T y \le 10^{-10}` are skipped, so that :math:`H_k` stays positive
    definite.

    Args:
        lr: The first length of a step, >= 0; a 0-d tensor may be learned.
        history_size: How many pairs are remembered, >= 1, each of twice the size of the parameters.
        line_search_fn: ``"strong_wolfe"``, ``"backtracking"``, ``None`` for steps of length ``lr``,
            or an object such as :class:`torchopt.solvers.StrongWolfe`.
        tolerance_grad: Converged where no entry of the gradient is larger; >= 0.
        tolerance_change: Converged where an iteration changes no entry of the parameters by more,
            or the value by less; >= 0. Both are absolute, in the units of gradient, parameters and
            value.
        max_iter: Most iterations.
        max_eval: Most calls of the function (a line search ends at this number or one later);
            ``None`` for no limit.

    Differentiable, with :class:`torchopt.diff.Unrolled`, in the start, the arguments of the
    function and ``lr``. Parameters in half precision are computed with in float32. Decisions depend
    on values, so there is no ``vmap``.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If a number is out of bounds.

    Example:
        >>> import torch, torchopt
        >>> from torchopt.solvers import LBFGS, minimize
        >>> fn = lambda p: (p["a"] - 1).square().sum() + (p["b"] * p["a"] - 2).square().sum()
        >>> start = {"a": torch.tensor([0.5, 3.0]), "b": torch.tensor(1.0)}
        >>> solution = minimize(fn, LBFGS(), start)
        >>> solution.outcome.success, solution.params
        (True, {'a': tensor([1.0000, 1.0000]), 'b': tensor(2.0000)})

    Reference:
        Liu and Nocedal, On the limited memory BFGS method for large scale optimization,
        Mathematical Programming 45, 1989; Nocedal and Wright, Numerical Optimization, 2nd edition,
        section 7.2; steps and tolerances as in ``torch.optim.LBFGS``.
    """

    lr: Union[float, Tensor] = 1.0
    history_size: int = 10
    line_search_fn: Union[str, LineSearch, None] = "strong_wolfe"

    #: A pair is remembered if :math:`s^T y` is larger.
    least_curvature: ClassVar[float] = 1e-10

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.lr, Tensor):
            hyper.check_number("lr", self.lr, hyper.HyperSpec(ge=0))
        elif self.lr.numel() != 1:
            raise ValueError(f"lr must be one number, got {misuse.short(self.lr)}.")
        check_count("history_size", self.history_size, 1)
        self.search  # noqa: B018 - is there one?

    @property
    def search(self) -> LineSearch:
        """The line search."""
        given = self.line_search_fn
        if isinstance(given, LineSearch):
            return given
        if given is not None and not isinstance(given, str):
            raise TypeError(
                f"line_search_fn must be a name, a line search or None, got {misuse.short(given)}."
            )
        if given not in LINE_SEARCHES:
            raise ValueError(
                f"line_search_fn must be 'strong_wolfe', 'backtracking' or None, got {given!r}."
            )
        return LINE_SEARCHES[given]

    def start(self, objective: Objective, x: Tensor) -> LBFGSState:
        """Evaluate the function at the start; nothing is remembered yet."""
        return first_state(LBFGSState, objective, x)

    def advance(self, objective: Objective, state: LBFGSState) -> LBFGSState:
        """Take one step."""
        aimed = self.aim(objective, state)
        return aimed if aimed.outcome is not None else self.move(objective, aimed)

    def aim(self, objective: Objective, state: LBFGSState) -> LBFGSState:
        """Return the state with the next direction, and the length to try first."""
        pairs, scale = self.remembered(state)
        d = -inverse_hessian_product(state.grad, pairs, scale)
        lr = self.lr if objective.create_graph else plain(self.lr)
        if state.previous_grad is None:
            # not abs(): its second derivative makes torch import its compiler
            size = (state.grad * state.grad.detach().sign()).sum()
            lr = min(1.0, objective.number(1.0 / size)) * lr
        slope = objective.number(state.grad.dot(d))
        outcome = None
        if not (slope < 0 and slope <= -self.tolerance_change):
            outcome = Outcome.SMALL_CHANGE if is_finite(slope) else Outcome.NOT_FINITE
        return dataclasses.replace(
            state,
            pairs=pairs,
            scale=scale,
            direction=d,
            slope=slope,
            length=lr if outcome is None else 0.0,
            previous_grad=state.grad,
            previous_value=state.value,
            iterations=state.iterations + 1,
            outcome=outcome,
        )

    def remembered(self, state: LBFGSState) -> tuple[tuple[Pair, ...], Number]:
        """Return pairs and scale with those of the last step, if it had enough curvature."""
        if state.direction is None or state.previous_grad is None:
            return (), 1.0
        y = state.grad - state.previous_grad
        s = state.direction * state.length
        curvature = s.dot(y)
        if not curvature > self.least_curvature:
            return state.pairs[-self.history_size :], state.scale
        pairs = (*state.pairs, Pair(s, y, 1.0 / curvature))
        return pairs[-self.history_size :], curvature / y.dot(y)

    def move(self, objective: Objective, state: LBFGSState) -> LBFGSState:
        """Search along the direction, and return the state at the point that was found."""
        d = state.direction
        assert d is not None
        most = math.inf if self.max_eval is None else self.max_eval - state.evaluations
        search = self.search if state.length != 0 else FixedLength()
        length, slope = state.length, state.slope
        new, t = searched(search, objective, state, d, slope, length, most, self.tolerance_change)
        return dataclasses.replace(new, length=t)
