"""LARS: momentum with a learning rate for each layer."""

from __future__ import annotations

from typing import Any

from torchopt.core.accelerated_op import accelerated
from torchopt.core.chaining import chain
from torchopt.core.transform import GradientTransformation
from torchopt.optim.meta_optimizer import MetaOptimizer
from torchopt.optim.named import from_recipe, meta_from_recipe
from torchopt.optim.optimizer import Optimizer
from torchopt.transforms.basic import add_decayed_weights, flip_sign, scale_by_learning_rate
from torchopt.transforms.momentum import Trace
from torchopt.transforms.trust_ratio import ScaleByLayerRate
from torchopt.transforms.wrap import masked
from torchopt.typing import Hyperparameter


def lars(
    lr: Hyperparameter = 1e-3,
    momentum: Hyperparameter = 0.9,
    dampening: Hyperparameter = 0.0,
    weight_decay: Hyperparameter = 0.0,
    nesterov: bool = False,
    trust_coefficient: Hyperparameter = 1e-3,
    eps: Hyperparameter = 0.0,
    *,
    mask: Any = None,
    trust_ratio_mask: Any = None,
    maximize: bool = False,
    use_accelerated_op: bool | None = None,
) -> GradientTransformation:
    r"""LARS: momentum with a learning rate for each parameter, for large batches.

    .. math::
        g_t = \nabla f(p_{t-1}) + \lambda p_{t-1}, \qquad
        a_t = \eta\, \xi\, \frac{\lVert p_{t-1} \rVert}{\lVert g_t \rVert + \epsilon}\, g_t, \\
        b_t = \mu\, b_{t-1} + (1 - \tau)\, a_t \;\;(b_1 = \mu b_0 + a_1), \qquad
        p_t = p_{t-1} - b_t

    With ``nesterov`` the step is :math:`a_t + \mu b_t`. The learning rate is inside the momentum,
    as in the paper: a new one acts on new gradients only. Where one of the norms is 0,
    :math:`a_t = \eta\, g_t`.

    Args:
        lr: Learning rate :math:`\eta \ge 0`.
        momentum: :math:`\mu \ge 0`. The Python number 0 keeps no buffer.
        dampening: :math:`\tau`, not applied at the first step, as in :func:`torchopt.trace`.
        weight_decay: :math:`\lambda \ge 0`.
        nesterov: Look ahead.
        trust_coefficient: :math:`\xi \ge 0`.
        eps: :math:`\epsilon \ge 0`.
        mask: Which parameters decay; see :func:`torchopt.masked`. ``None`` means all.
        trust_ratio_mask: Which parameters have a rate of their own; ``None`` means all. The others
            take the step :math:`\eta\, g_t`. The paper's code leaves out biases and
            normalizations, here and in ``mask``: ``lambda params: {n: p.dim() > 1 for ...}``.
        maximize: Ascend instead of descend.
        use_accelerated_op: Fused kernels: ``None`` if available, ``True`` required,
            ``False`` never. The norm of a whole parameter has none.

    It is ``optax.lars``, but for ``dampening``. The paper's denominator is
    :math:`\lVert \nabla f \rVert + \lambda \lVert p \rVert` instead of
    :math:`\lVert \nabla f + \lambda p \rVert`.

    Slots: ``momentum_buffer``, which holds updates: minus :math:`b_t`. ``update`` needs
    ``params``. Differentiable in gradients, parameters, slots and every number; where a norm is
    zero the ratio counts as a constant, see :func:`torchopt.scale_by_trust_ratio`.

    Raises:
        ValueError: If a number is out of bounds, ``nesterov`` is without momentum or with
            dampening, or ``update`` is called without ``params``.
        RuntimeError: If ``use_accelerated_op=True``.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.lars(lr=0.1, trust_coefficient=1.0)
        >>> params = {"w": torch.tensor([3.0, 4.0])}
        >>> updates, state = tx.update({"w": torch.tensor([0.0, 2.0])}, tx.init(params), params)
        >>> torchopt.apply_updates(params, updates)
        {'w': tensor([3.0000, 3.5000])}

    Reference:
        You, Gitman and Ginsburg, Large batch training of convolutional networks, 2017, algorithm 1,
        https://arxiv.org/abs/1708.03888; ``optax.lars``.
    """
    ratio = ScaleByLayerRate(trust_coefficient, eps)
    tx = chain(
        flip_sign(maximize),
        add_decayed_weights(weight_decay, mask),
        ratio if trust_ratio_mask is None else masked(ratio, trust_ratio_mask),
        scale_by_learning_rate(lr),
        Trace(momentum, dampening, nesterov),
    )
    return accelerated(tx, use_accelerated_op)


class LARS(Optimizer):
    """:func:`torchopt.lars` as a ``torch.optim.Optimizer``."""

    @from_recipe(lars)
    def __init__(self, params: Any) -> None:
        """Take the parameters, then the arguments of :func:`torchopt.lars`."""


class MetaLARS(MetaOptimizer):
    """:func:`torchopt.lars` as a differentiable optimizer of a network."""

    @meta_from_recipe(lars)
    def __init__(self, module: Any) -> None:
        """Take the network, then the arguments of :func:`torchopt.lars`."""
