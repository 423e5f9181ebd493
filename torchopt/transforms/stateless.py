"""Functions as transformations without a state."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor

from torchopt.core.pair import Pair
from torchopt.core.rules import TensorTransformation
from torchopt.core.transform import GradientTransformation, transformation
from torchopt.typing import PyTree, Step, TensorTree


def _nothing(params: TensorTree) -> PyTree:
    """Return the state of what keeps none."""
    return ()


@dataclasses.dataclass(frozen=True)
class _Update:
    """A function of updates and parameters as the second one of a pair."""

    function: Callable[[TensorTree, TensorTree | None], TensorTree]

    def __call__(self, updates: TensorTree, state: PyTree, params: TensorTree | None = None) -> Any:
        """Return the updates, and the state that there is none."""
        return self.function(updates, params), state


def _check(owner: str, function: Any) -> None:
    if not callable(function):
        raise TypeError(f"{owner} expects a function of updates and parameters, got {function!r}.")


def stateless(f: Callable[[TensorTree, TensorTree | None], TensorTree]) -> GradientTransformation:
    """Turn a function of updates and parameters into a transformation.

    Args:
        f: ``(updates, params) -> updates``, of trees; ``params`` is ``None`` where there are none.

    Raises:
        TypeError: If ``f`` is not callable.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.stateless(
        ...     lambda updates, params: [u - 0.5 * sum(updates) for u in updates]
        ... )
        >>> g = [torch.tensor([1.0]), torch.tensor([3.0])]
        >>> tx.update(g, tx.init(g))[0]
        [tensor([-1.]), tensor([1.])]
    """
    _check("stateless", f)
    return Pair(_nothing, _Update(f))


@transformation
class StatelessWithTreeMap(TensorTransformation):
    """Apply a function to each parameter; see :func:`stateless_with_tree_map`."""

    function: Callable[[Tensor, Tensor | None], Tensor]

    def rule(self, g: Tensor, p: Any, t: Step, slots: tuple) -> tuple[Tensor, tuple]:
        """Return what the function returns."""
        return self.function(g, p), slots


def stateless_with_tree_map(
    f: Callable[[Tensor, Tensor | None], Tensor],
) -> GradientTransformation:
    """Turn a function of one update and its parameter into a transformation.

    Args:
        f: ``(update, param) -> update``, of tensors; ``param`` is ``None`` where there is none.
            Complex ones are pairs of reals in a last dimension.

    Raises:
        TypeError: If ``f`` is not callable.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.stateless_with_tree_map(lambda u, p: u / u.abs().max())
        >>> g = [torch.tensor([1.0, -4.0])]
        >>> tx.update(g, tx.init(g))[0]
        [tensor([ 0.2500, -1.0000])]
    """
    _check("stateless_with_tree_map", f)
    return StatelessWithTreeMap(f)
