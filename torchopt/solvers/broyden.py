"""Broyden's method: a Jacobian learned from the steps."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from typing_extensions import TypeAlias

from torchopt.solvers.base import State as BaseState
from torchopt.solvers.base import check_count, first_state, is_finite, largest, plain
from torchopt.solvers.flat import Objective
from torchopt.solvers.newton import arrived
from torchopt.solvers.outcome import Outcome
from torchopt.solvers.roots import Residual, RootSolver


Start: TypeAlias = Literal["identity", "jacobian"]


class Update(NamedTuple):
    r"""A change :math:`a b^T` of the approximate inverse Jacobian."""

    a: Tensor
    b: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class BroydenState(BaseState):
    """Where Broyden's method is, with what it learned of the Jacobian."""

    first: Tensor | None = None  #: The first inverse Jacobian: a number, or a matrix.
    updates: tuple[Update, ...] = ()  #: Oldest first.


@dataclass(frozen=True, kw_only=True)
class Broyden(RootSolver[BroydenState]):
    r"""Broyden's method with limited memory ("good" updates).

    .. math::
        p_{k+1} &= p_k - t_k H_k F(p_k), \qquad s = p_{k+1} - p_k, \quad y = F(p_{k+1}) - F(p_k) \\
        H_{k+1} &= H_k + \frac{(s - H_k y)\, s^T H_k}{s^T H_k y}

    One call of the function for each step and no derivative of it. Steps are halved as long as the
    norm of the residual grows by more than is allowed, less and less from step to step (after Li
    and Fukushima).

    Args:
        jacobian: The first :math:`H`: ``"identity"`` is a multiple of it, of the sign that lowers
            the residual; ``"jacobian"`` the inverse of the true one, written down once.
        history_size: How many updates are remembered, >= 1; then it starts over.
        halvings: How often a step is made shorter.
        tolerance_grad: Converged where no entry of the residual is larger; >= 0.
        tolerance_change: Ended where an iteration changes no entry by more; >= 0.
        max_iter: Most iterations.
        max_eval: Most calls of the function; ``None`` for no limit.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If a number is out of bounds.

    Example:
        >>> import torch, torchopt
        >>> from torchopt.solvers import Broyden, find_root
        >>> fn = lambda p: torch.stack([p[0] + 0.5 * p[1] - 2, p[1] + 0.1 * p[0] ** 2 - 2.4])
        >>> solution = find_root(fn, Broyden(), torch.zeros(2))
        >>> solution.outcome, (fn(solution.params).abs() < 1e-5).all()
        (<Outcome.CONVERGED>, tensor(True))

    Reference:
        Broyden, A class of methods for solving nonlinear simultaneous equations, Mathematics of
        Computation 19, 1965; Li and Fukushima, A derivative-free line search and global convergence
        of Broyden-like method for nonlinear equations, Optimization Methods and Software 13, 2000.
    """

    jacobian: Start = "identity"
    history_size: int = 50
    halvings: int = 20
    max_iter: int = 500

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("history_size", self.history_size, 1)
        check_count("halvings", self.halvings, 0)
        if self.jacobian not in ("identity", "jacobian"):
            raise ValueError(f"jacobian must be 'identity' or 'jacobian', got {self.jacobian!r}.")

    def start(self, objective: Objective, x: Tensor) -> BroydenState:
        """Evaluate the residual at the start."""
        return first_state(BroydenState, objective, x)

    def advance(self, objective: Objective, state: BroydenState) -> BroydenState:
        """Take one step, and learn from it."""
        assert isinstance(objective, Residual)
        if state.first is None or len(state.updates) >= self.history_size:
            state = self._begun(objective, state)
            if state.outcome is not None or state.first is None:
                return state
        d = -_times(state, state.grad)
        new = self._moved(objective, state, d)
        if new.outcome is not None and state.updates:  # what was learned may be wrong: start over
            again = dataclasses.replace(new, outcome=None, updates=(), first=None)
            again = self._begun(objective, again)
            if again.first is None:
                return again
            new = self._moved(objective, again, -_times(again, again.grad))
            state = again
        if new.outcome is not None:
            return new
        s, y = new.x - state.x, new.grad - state.grad
        hy = _times(state, y)
        divisor = s.dot(hy)
        if not abs(plain(divisor)) > 1e-14 * plain(s.norm() * hy.norm()):
            return new
        update = Update((s - hy) / divisor, _times(state, s, transposed=True))
        return dataclasses.replace(new, updates=(*state.updates, update))

    def _begun(self, objective: Residual, state: BroydenState) -> BroydenState:
        """Return the state with a first approximation, and nothing learned."""
        if self.jacobian == "jacobian":
            matrix = objective.linearized(state.x).matrix()
            inverse, info = torch.linalg.inv_ex(matrix)
            if bool(info) or not is_finite(largest(inverse.reshape(-1))):
                return dataclasses.replace(state, outcome=Outcome.SINGULAR, first=None)
            calls = state.evaluations + 1
            return dataclasses.replace(state, first=inverse, updates=(), evaluations=calls)
        r, evaluations = state.grad, state.evaluations
        size = 0.5 * max(plain(state.x.norm()), 1.0) / max(plain(r.norm()), 1e-300)
        size = min(size, 1.0)
        best = plain(state.value)
        scale = -size  # where neither sign helps, the search along the line says so
        for sign in (-1.0, 1.0):
            # a short step: which sign lowers the residual?
            value, _ = objective(state.x + sign * 1e-3 * size * r)
            evaluations += 1
            if is_finite(plain(value)) and plain(value) < best:
                best, scale = plain(value), -sign * size
        first = torch.as_tensor(scale, dtype=r.dtype, device=r.device)
        return dataclasses.replace(state, first=first, updates=(), evaluations=evaluations)

    def _moved(self, objective: Residual, state: BroydenState, d: Tensor) -> BroydenState:
        """Return the state after a step that does not make the residual much larger."""
        size, evaluations, t = plain(state.value), state.evaluations, 1.0
        allowed = 1 + 1 / (1 + state.iterations) ** 2
        length = plain(d.detach().norm()) ** 2
        for _ in range(self.halvings + 1):
            x = state.x + t * d
            value, r = objective(x)
            evaluations += 1
            bound = allowed * size - 1e-4 * t * t * length
            if is_finite(plain(value)) and plain(value) <= max(bound, 0.9 * size):
                return arrived(state, x, value, r, evaluations)
            t /= 2
        return dataclasses.replace(
            state,
            evaluations=evaluations,
            iterations=state.iterations + 1,
            outcome=Outcome.LINE_SEARCH_FAILED,
        )


def _times(state: BroydenState, v: Tensor, transposed: bool = False) -> Tensor:
    """Return the product of the approximate inverse Jacobian, or its transpose, with a vector.

    It is :math:`H_0` with updates one after the other, :math:`H_{k+1} = H_k + a_k b_k^T` with
    :math:`b_k` the product of the transpose with the step.
    """
    first = state.first
    assert first is not None
    if first.dim() == 0:
        result = first * v
    else:
        result = (first.mT if transposed else first) @ v
    for a, b in state.updates:
        result = result + (b * a.dot(v) if transposed else a * b.dot(v))
    return result
