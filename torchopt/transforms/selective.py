"""Train some parameters only."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Union

from torch.nn import Module

from torchopt.base import tree
from torchopt.core.chaining import chain
from torchopt.core.transform import GradientTransformation
from torchopt.transforms.basic import freeze
from torchopt.transforms.wrap import masked
from torchopt.typing import PyTree


def selective_transform(
    optimizer: GradientTransformation, *, freeze_mask: Union[PyTree, Callable[[PyTree], PyTree]]
) -> GradientTransformation:
    """Train some parameters, and keep the others as they are.

    Frozen parameters have no slots, and their gradients are ignored; with :func:`torchopt.freeze`
    at the end of a chain they still reach moments and norms.

    Args:
        optimizer: The transformation of those that are trained.
        freeze_mask: Which parameters are frozen; see :func:`torchopt.masked`.

    Raises:
        ValueError: If the mask does not match the parameters (at the first ``init``).
        TypeError: If ``optimizer`` is no transformation or an entry of the mask is not a bool.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.selective_transform(
        ...     torchopt.adam(0.1), freeze_mask={"w": True, "b": False}
        ... )
        >>> g = {"w": torch.ones(1), "b": torch.ones(1)}
        >>> updates, state = tx.update(g, tx.init(g))
        >>> updates, state.exp_avg
        ({'w': tensor([0.]), 'b': tensor([-0.1000])}, {'w': None, 'b': tensor([0.1000])})
    """
    return chain(masked(optimizer, _Not(freeze_mask)), freeze(freeze_mask))


@dataclasses.dataclass(frozen=True)
class _Not:
    """The opposite of a mask, as a mask that compares and pickles."""

    mask: Any

    def __call__(self, params: PyTree) -> PyTree:
        """Return the tree of the opposite bools."""
        mask = self.mask
        if callable(mask) and not isinstance(mask, Module):
            mask = mask(params)
        return tree.tree_map(lambda x: not x if isinstance(x, bool) else x, mask)
