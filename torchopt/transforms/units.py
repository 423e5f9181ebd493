"""Centering and clipping by the norm of a parameter, or of each of its output units."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchopt.base import misuse
from torchopt.base.numerics import root
from torchopt.core.hyper import hyper
from torchopt.core.rules import TensorTransformation
from torchopt.core.transform import GradientTransformation, transformation
from torchopt.typing import Hyperparameter, Step


@transformation
class Centralize(TensorTransformation):
    """Subtract the mean of each output unit; see :func:`centralize`."""

    accepts_complex = False
    batches = True

    def rule(self, g: Tensor, p: Any, t: Step, slots: tuple) -> tuple[Tensor, tuple]:
        """Return ``g`` minus its mean over all dimensions but the first."""
        if g.dim() < 2:
            return g, slots
        return g - g.mean(dim=tuple(range(1, g.dim())), keepdim=True), slots


def centralize() -> GradientTransformation:
    r"""Subtract from a gradient the mean of each output unit (Yong et al., 2020).

    .. math::
        u_i = g_i - \operatorname{mean}(g_i)

    where :math:`g_i` is what belongs to index :math:`i` of the first dimension: in PyTorch's layout
    the weights of one output. Vectors and scalars pass as they are.
    https://arxiv.org/abs/2004.01461

    Raises:
        TypeError: If a parameter is complex.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.centralize()
        >>> g = [torch.tensor([[1.0, 3.0], [5.0, 5.0]])]
        >>> tx.update(g, tx.init(g))[0]
        [tensor([[-1.,  1.],
                [ 0.,  0.]])]
    """
    return Centralize()


@transformation
class ClipByBlockRms(TensorTransformation):
    """Clip by the root mean square of a parameter; see :func:`clip_by_block_rms`."""

    threshold: Hyperparameter = hyper(gt=0, scalar=True)

    accepts_complex = False
    batches = True

    def rule(
        self, g: Tensor, p: Any, t: Step, slots: tuple, *, threshold: Any
    ) -> tuple[Tensor, tuple]:
        """Return ``g / max(1, rms(g) / threshold)``."""
        if g.numel() == 0:
            return g, slots
        return g / torch.clamp(root(g.square().mean()) / threshold, min=1.0), slots


def clip_by_block_rms(threshold: Hyperparameter) -> GradientTransformation:
    r"""Scale down each gradient whose root mean square is too large.

    .. math::
        u = g / \max\!\left(1, \operatorname{rms}(g) / c\right)

    Args:
        threshold: :math:`c > 0`, for each parameter by itself. With ``threshold=1`` it is the
            clipping of Adafactor (Shazeer and Stern, 2018, https://arxiv.org/abs/1804.04235).

    Raises:
        ValueError: If ``threshold`` is a number <= 0.
        TypeError: If a parameter is complex.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.clip_by_block_rms(1.0)
        >>> g = [torch.tensor([2.0, -2.0]), torch.tensor([0.5])]
        >>> tx.update(g, tx.init(g))[0]
        [tensor([ 1., -1.]), tensor([0.5000])]
    """
    return ClipByBlockRms(threshold)


@transformation
class AdaptiveGradClip(TensorTransformation):
    """Clip by the norms of parameters; see :func:`adaptive_grad_clip`."""

    clipping: Hyperparameter = hyper(gt=0, scalar=True)
    eps: Hyperparameter = hyper(1e-3, ge=0, scalar=True)
    dim: int | tuple[int, ...] | None = None

    accepts_complex = False
    batches = True

    def rule(
        self, g: Tensor, p: Tensor | None, t: Step, slots: tuple, *, clipping: Any, eps: Any
    ) -> tuple[Tensor, tuple]:
        """Return ``g``, its units scaled down to ``clipping * max(norm(p), eps)``."""
        weights = unitwise_norm(misuse.given_params("adaptive_grad_clip", p), self.dim)
        norm, largest = unitwise_norm(g, self.dim), clipping * torch.clamp(weights, min=eps)
        # 1e-6 as in Optax; the larger norms alone are divided by
        scaled = g * (largest / torch.clamp(norm, min=1e-6))
        return torch.where(norm < largest, g, scaled), slots


def unitwise_norm(x: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Return the norm of each unit of a parameter, in a shape that broadcasts to it."""
    if dim is None:
        one = sum(size > 1 for size in x.shape) <= 1
        dim = tuple(range(0 if one else 1, x.dim()))
    squares = x.square()
    return root(squares.sum(dim, keepdim=True) if x.dim() else squares)


def adaptive_grad_clip(
    clipping: Hyperparameter,
    eps: Hyperparameter = 1e-3,
    dim: int | tuple[int, ...] | None = None,
) -> GradientTransformation:
    r"""Scale down gradients that are large compared with the weights (Brock et al., 2021).

    .. math::
        u_i = g_i \min\!\left(1, \frac{c \max(\lVert w_i \rVert, \epsilon)}{\lVert g_i \rVert}
        \right)

    where :math:`i` goes over output units: the first dimension, as weights lie in PyTorch (in Optax
    the last). A vector is one unit. https://arxiv.org/abs/2102.06171

    Args:
        clipping: :math:`c > 0`.
        eps: :math:`\epsilon \ge 0`, below which no norm of weights counts.
        dim: The dimensions of a unit; ``None`` for all but the first.

    Raises:
        ValueError: If a number is out of bounds, or ``update`` is called without ``params``.
        TypeError: If a parameter is complex.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.adaptive_grad_clip(0.5)
        >>> params = [torch.tensor([[3.0, 4.0], [0.6, 0.8]])]
        >>> g = [torch.tensor([[1.0, 0.0], [1.0, 0.0]])]
        >>> tx.update(g, tx.init(params), params)[0]
        [tensor([[1.0000, 0.0000],
                [0.5000, 0.0000]])]
    """
    return AdaptiveGradClip(clipping, eps, dim)
