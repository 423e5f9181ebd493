"""Trust ratio: give the update of each parameter a size in proportion to the parameter's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchopt.base import misuse
from torchopt.base.distributed import whole
from torchopt.base.numerics import is_zero, root
from torchopt.core.hyper import hyper
from torchopt.core.rules import TensorTransformation
from torchopt.core.transform import GradientTransformation, transformation
from torchopt.typing import Hyperparameter, Step


class TrustRatio(TensorTransformation):
    """The rule of :func:`scale_by_trust_ratio`; subclasses say which of its numbers may be set."""

    batches = True

    def rule(
        self,
        g: Tensor,
        p: Any,
        t: Step,
        slots: tuple,
        *,
        min_norm: Any = 0.0,
        trust_coefficient: Any = 1.0,
        eps: Any = 0.0,
    ) -> tuple[Tensor, tuple]:
        """Return the update times the ratio of norms."""
        p = misuse.given_params("The trust ratio", p)
        p_norm, g_norm = _norm(p, min_norm), _norm(g, min_norm)
        without = (p_norm == 0) | (g_norm == 0)
        # the divisor is guarded too: behind one ``where`` alone 0 / 0 leaves nan in derivatives
        ratio = trust_coefficient * p_norm / (torch.where(without, 1.0, g_norm) + eps)
        return g * torch.where(without, 1.0, ratio), slots


def _norm(x: Tensor, floor: Any) -> Tensor:
    """Return the norm of all entries, or its floor; derivatives of any order are zero at zero."""
    norm = root(whole(x.square().sum()))
    if is_zero(floor):
        return norm
    if isinstance(floor, Tensor):
        return torch.maximum(norm, floor.to(norm.dtype))
    return norm.clamp(min=floor)


@transformation
class ScaleByNormRatio(TrustRatio):
    """The trust ratio as LAMB has it, with no numbers to set."""


@transformation
class ScaleByLayerRate(TrustRatio):
    """The trust ratio as LARS has it."""

    trust_coefficient: Hyperparameter = hyper(1e-3, ge=0)
    eps: Hyperparameter = hyper(0.0, ge=0)


@transformation
class ScaleByTrustRatio(TrustRatio):
    """Scale by the ratio of norms; see :func:`scale_by_trust_ratio`."""

    min_norm: Hyperparameter = hyper(0.0, ge=0, scalar=True)
    trust_coefficient: Hyperparameter = hyper(1.0, ge=0)
    eps: Hyperparameter = hyper(0.0, ge=0)


def scale_by_trust_ratio(
    min_norm: Hyperparameter = 0.0,
    trust_coefficient: Hyperparameter = 1.0,
    eps: Hyperparameter = 0.0,
) -> GradientTransformation:
    r"""Scale each parameter's update by the ratio of the parameter's norm to the update's.

    .. math::
        u = r\, g, \qquad
        r = \xi\, \frac{\max(\lVert p \rVert, n)}{\max(\lVert g \rVert, n) + \epsilon},
        \qquad r = 1 \text{ where one of the two norms is } 0

    Norms are those of a whole parameter (2-norms of all entries). Where :math:`r = 1` for a norm
    that is zero, parameters that start at zero move, and :math:`\xi` does not count.

    Args:
        min_norm: :math:`n \ge 0`, a floor of both norms. Above 0 no norm is zero.
        trust_coefficient: :math:`\xi \ge 0`.
        eps: :math:`\epsilon \ge 0`.

    No slots; ``update`` needs ``params``. Differentiable in gradients, parameters and every number.
    The ratio jumps where a norm becomes zero: there it counts as a constant, so that
    :math:`\partial u / \partial g = 1` and all derivatives are finite. At a floor the derivative is
    that of the branch taken. To leave parameters out, such as biases, put it into
    :func:`torchopt.masked`. It has no fused kernel: a norm is no operation on single entries.

    Raises:
        ValueError: If a number is out of bounds, or ``update`` is called without ``params``.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.scale_by_trust_ratio(trust_coefficient=0.5)
        >>> params = [torch.tensor([3.0, 4.0]), torch.zeros(1)]
        >>> grads = [torch.tensor([0.0, 2.0]), torch.ones(1)]
        >>> tx.update(grads, tx.init(params), params)[0]
        [tensor([0.0000, 2.5000]), tensor([1.])]

    Reference:
        You, Gitman and Ginsburg, Large batch training of convolutional networks, 2017,
        https://arxiv.org/abs/1708.03888; ``optax.scale_by_trust_ratio``.
    """
    return ScaleByTrustRatio(min_norm, trust_coefficient, eps)
