"""Keep parameters in a set, and nan out of updates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchopt.base import misuse
from torchopt.base.distributed import spread_as, whole
from torchopt.core.engine import Leaves
from torchopt.core.rules import ElementwiseTransformation
from torchopt.core.transform import GradientTransformation, transformation
from torchopt.typing import Step, TensorTree


@transformation
class ZeroNans(ElementwiseTransformation):
    """Replace ``nan`` by zero; see :func:`zero_nans`."""

    def rule(self, g: Tensor, p: Any, t: Step, slots: tuple) -> tuple[Tensor, tuple]:
        """Return ``g`` with zeros where it is ``nan``."""
        return torch.where(g.isnan(), 0.0, g), slots


def zero_nans() -> GradientTransformation:
    """Replace ``nan`` by zero, and leave infinities as they are.

    The derivative through an entry that was ``nan`` is zero. :func:`nan_to_num` also replaces
    infinities.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.zero_nans()
        >>> tx.update([torch.tensor([float("nan"), 1.0])], tx.init([torch.ones(2)]))[0]
        [tensor([0., 1.])]
    """
    return ZeroNans()


@transformation
class KeepParamsNonnegative(ElementwiseTransformation):
    """Let no parameter become negative; see :func:`keep_params_nonnegative`."""

    accepts_complex = False

    def rule(self, g: Tensor, p: Any, t: Step, slots: tuple) -> tuple[Tensor, tuple]:
        """Return ``g``, or what makes the parameter zero."""
        p = misuse.given_params("keep_params_nonnegative", p)
        return torch.where(p + g < 0.0, -p, g), slots


def keep_params_nonnegative() -> GradientTransformation:
    r"""Stop updates at zero: :math:`u = \max(p + g, 0) - p`, exactly.

    It belongs at the end of a chain, where ``g`` is what will be added.

    Raises:
        ValueError: If ``update`` is called without ``params``.
        TypeError: If a parameter is complex.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.chain(torchopt.sgd(1.0), torchopt.keep_params_nonnegative())
        >>> params, g = [torch.tensor([1.0, 1.0])], [torch.tensor([0.5, 3.0])]
        >>> tx.apply_gradients(g, tx.init(params), params)[0]
        [tensor([0.5000, 0.0000])]
    """
    return KeepParamsNonnegative()


@transformation
class Project(GradientTransformation):
    """Project the new parameters; see :func:`project`."""

    projection: Callable[[TensorTree], TensorTree]
    each: bool = False

    accepts_complex = False

    def step(self, leaves: Leaves) -> tuple[list[Tensor], list[tuple[Any, ...]]]:
        """Return the way from each parameter to the projection of where it was led."""
        params = [misuse.given_params("project", p) for p in leaves.p]
        # a projection sees whole tensors, if they are spread over processes
        new: Any = [whole(p + g) for p, g in zip(params, leaves.g)]
        new = [self.projection(x) for x in new] if self.each else self.projection(new)
        if not isinstance(new, (list, tuple)) or len(new) != len(params):
            raise TypeError(
                f"The projection must return as many tensors as it is given, {len(params)}, got "
                f"{misuse.short(new)}."
            )
        return [spread_as(x, p) - p for x, p in zip(new, params)], leaves.slots


def project(
    projection: Callable[[TensorTree], TensorTree], *, each: bool = False
) -> GradientTransformation:
    r"""Project the updated parameters onto a set: :math:`u = P(p + g) - p`.

    Projected gradient descent, at the end of any chain. The parameters of a call (that have a
    gradient; those of a :func:`torchopt.masked` alone) are one vector to a ball or a simplex.

    Args:
        projection: A function of ``torchopt.projections``, or any from a list of tensors to one
            like it.
        each: Give it each parameter by itself.

    Raises:
        TypeError: If ``projection`` is not callable, or a parameter complex.
        ValueError: If ``update`` is called without ``params``.

    Example:
        >>> import torch, torchopt
        >>> from torchopt.projections import projection_l2_ball
        >>> tx = torchopt.chain(torchopt.sgd(1.0), torchopt.project(projection_l2_ball))
        >>> params, g = [torch.tensor([3.0, 0.0])], [torch.tensor([0.0, -4.0])]
        >>> tx.apply_gradients(g, tx.init(params), params)[0]
        [tensor([0.6000, 0.8000])]
    """
    if not callable(projection):
        raise TypeError(f"project expects a function of tensors, got {projection!r}.")
    return Project(projection, each)
