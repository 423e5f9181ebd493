"""Bisection: roots of functions of one number, by signs alone."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Union

import torch
from torch import Tensor

from torchopt.base import tree
from torchopt.base.misuse.given import given
from torchopt.solvers.base import State, first_state, is_finite, largest
from torchopt.solvers.flat import Objective
from torchopt.solvers.newton import arrived
from torchopt.solvers.outcome import Outcome
from torchopt.solvers.roots import RootSolver
from torchopt.typing import TensorTree


@dataclass(frozen=True, eq=False, repr=False)
class BisectionState(State):
    """Where bisection is: an interval for each entry."""

    lower: Tensor | None = None
    upper: Tensor | None = None
    rising: Tensor | None = None  #: Whether the residual rises from the lower to the upper end.


@dataclass(frozen=True, kw_only=True)
class Bisection(RootSolver[BisectionState]):
    r"""Halve intervals that hold a root.

    .. math::
        p = \tfrac12 (l + u), \qquad (l, u) \leftarrow
        \begin{cases} (l, p) & F(p)\, F(u) \ge 0 \\ (p, u) & \text{otherwise} \end{cases}

    For a number, or for many at once: each entry of the residual is a function of its own entry of
    the parameters. It needs a change of sign and no derivative, and gains one binary digit with
    each call. The start is not used, only its shape. Nothing of it can be differentiated by
    recording it (signs have no derivative); the implicit derivative is right in every order.

    Args:
        lower: Where to begin: a number, or a tree like the parameters.
        upper: Where to end; larger.
        tolerance_grad: Converged where no entry of the residual is larger; >= 0.
        tolerance_change: Converged where no interval is wider; >= 0.
        max_iter: Most halvings.
        max_eval: Most calls of the function; ``None`` for no limit.

    Raises:
        ValueError: If ``lower`` is not below ``upper``; when it begins, if the residual has the
            same sign at both ends.

    Example:
        >>> import torch
        >>> from torchopt.solvers import Bisection, find_root
        >>> a = torch.tensor([2.0, 3.0], dtype=torch.float64, requires_grad=True)
        >>> solver = Bisection(lower=0.0, upper=4.0)
        >>> solution = find_root(lambda p, a: p**2 - a, solver, torch.zeros_like(a), a)
        >>> torch.allclose(solution.params, a.sqrt(), atol=1e-6)
        True

    Reference:
        Burden and Faires, Numerical Analysis, 9th edition, section 2.1.
    """

    lower: Union[float, TensorTree]
    upper: Union[float, TensorTree]
    tolerance_grad: float = 1e-9
    max_iter: int = 200

    no_change: ClassVar[Outcome] = Outcome.SMALL_CHANGE  # the interval holds a root all the same

    def start(self, objective: Objective, x: Tensor) -> BisectionState:
        """Look at both ends of all intervals.

        Raises:
            ValueError: If the residual has the same sign there, or an interval is empty.
        """
        lower, upper = (self._end(objective, x, name) for name in ("lower", "upper"))
        if not bool((lower < upper).all()):
            raise ValueError(
                f"lower must be below upper in every entry, got {given(self.lower)} and "
                f"{given(self.upper)}."
            )
        low, high = objective(lower)[1].detach(), objective(upper)[1].detach()
        if not bool(((low <= 0) & (high >= 0) | (low >= 0) & (high <= 0)).all()):
            k = int(((low > 0) & (high > 0) | (low < 0) & (high < 0)).to(torch.int64).argmax())
            raise ValueError(
                "The residual must have different signs at lower and upper; in entry "
                f"{k} it is {float(low[k]):.4g} at {float(lower[k]):.4g} and {float(high[k]):.4g} "
                f"at {float(upper[k]):.4g}. Give a wider interval, or one around the root."
            )
        rising = (low < 0) | (high > 0)
        # a root at an end is one of the interval
        middle = torch.where(low == 0, lower, torch.where(high == 0, upper, (lower + upper) / 2))
        state = first_state(
            BisectionState, objective, middle, lower=lower, upper=upper, rising=rising
        )
        return dataclasses.replace(state, evaluations=3)

    def _end(self, objective: Objective, x: Tensor, name: str) -> Tensor:
        end = getattr(self, name)
        if isinstance(end, (int, float)):
            return torch.full_like(x.detach(), end)
        layout = objective.layout
        like = layout.unflatten(x.detach())
        leaves = tree.flatten_like(end, like, layout.spec, name, "params")
        leaves = [
            None if shape is None else torch.as_tensor(leaf, dtype=dtype).expand(shape)
            for leaf, shape, dtype in zip(leaves, layout.shapes, layout.dtypes)
        ]
        return layout.join([None if leaf is None else leaf.to(x.device) for leaf in leaves])

    def advance(self, objective: Objective, state: BisectionState) -> BisectionState:
        """Halve all intervals."""
        lower, upper, rising = state.lower, state.upper, state.rising
        assert lower is not None
        assert upper is not None
        below = (state.grad.detach() < 0) == rising  # the root lies above the middle
        exact = state.grad == 0
        x = state.x.detach()
        lower = torch.where(below | exact, x, lower)
        upper = torch.where(~below | exact, x, upper)
        middle = (lower + upper) / 2
        value, r = objective(middle)
        new = arrived(state, middle, value, r, state.evaluations + 1)
        return dataclasses.replace(
            new,
            lower=lower,
            upper=upper,
            change=largest(upper - lower),
            outcome=None if is_finite(new.grad_norm) else Outcome.NOT_FINITE,
        )
