"""A sum of squares as solvers see it."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from torchopt.diff.stationarity import stationarity
from torchopt.solvers.base import (
    Solver,
    State,
    plain,
)
from torchopt.solvers.flat import Layout, Number
from torchopt.solvers.linearized import Residuals
from torchopt.typing import PyTree, TensorTree


def half_of_squares(residual: TensorTree) -> Tensor:
    """Return half the sum of the squares of a tree, of absolute values if complex.

    Raises:
        TypeError: If a leaf is no tensor of floating-point or complex numbers.
    """
    layout = Layout(residual, "The residuals that fn returns")
    return layout.flatten(residual).square().sum() / 2


class Squares(Residuals):
    r"""Half the sum of squared residuals, as a solver sees it: value :math:`\tfrac12 r^T r`."""

    called = "least_squares"

    def residual(self, x: Tensor) -> Tensor:
        """Return all residuals as a vector."""
        result = self.fn(self.layout.unflatten(x), *self.args)
        return Layout(result, "The residuals that fn returns").flatten(result)

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

    sees: ClassVar = Squares
    problem: ClassVar[str] = "least_squares"

    tolerance_change: float = 1e-12
    max_iter: int = 200

    def condition(self, fn: Callable[..., Any]) -> tuple[Callable[..., TensorTree], Any]:
        """Return the gradient of the sum of squares."""

        def half(params: TensorTree, *args: PyTree) -> Tensor:
            return half_of_squares(fn(params, *args))

        return stationarity(half), ("symmetric",)
