"""Stochastic gradient descent with momentum."""

from __future__ import annotations

from typing import Any

import torch

from torchopt.core.accelerated_op import accelerated
from torchopt.core.chaining import chain
from torchopt.core.recipe import ignoring_moment_requires_grad
from torchopt.core.transform import GradientTransformation
from torchopt.optim.meta_optimizer import MetaOptimizer
from torchopt.optim.named import from_recipe, meta_from_recipe
from torchopt.optim.optimizer import Optimizer
from torchopt.transforms.basic import add_decayed_weights, flip_sign, scale_by_learning_rate
from torchopt.transforms.momentum import trace
from torchopt.typing import Hyperparameter


@ignoring_moment_requires_grad
def sgd(
    lr: Hyperparameter = 1e-3,
    momentum: Hyperparameter = 0.0,
    dampening: Hyperparameter = 0.0,
    weight_decay: Hyperparameter = 0.0,
    nesterov: bool = False,
    *,
    maximize: bool = False,
    momentum_buffer_dtype: torch.dtype | None = None,
    use_accelerated_op: bool | None = None,
) -> GradientTransformation:
    r"""Stochastic gradient descent, with momentum and L2 weight decay.

    .. math::
        g_t = \nabla f(p_{t-1}) + \lambda p_{t-1}, \qquad
        b_t = \mu b_{t-1} + (1 - \tau) g_t \;\;(b_1 = \mu b_0 + g_1), \qquad
        p_t = p_{t-1} - \eta\, b_t

    A fresh buffer :math:`b_0` is zero. With ``nesterov`` the step is :math:`g_t + \mu b_t`; without
    momentum it is :math:`g_t`.

    Args:
        lr: Learning rate :math:`\eta \ge 0`.
        momentum: :math:`\mu \ge 0`.
        dampening: :math:`\tau`; not applied at the first step.
        weight_decay: :math:`\lambda \ge 0`; needs ``params`` in ``update``.
        nesterov: Use Nesterov momentum; needs ``momentum > 0`` and ``dampening = 0``.
        maximize: Ascend instead of descend.
        momentum_buffer_dtype: The dtype that the momentum is kept in, such as
            ``torch.bfloat16``; see
            :meth:`torchopt.GradientTransformation.with_slot_dtypes`.
        use_accelerated_op: Fused kernels: ``None`` if available, ``True`` required,
            ``False`` never.

    Slots: ``momentum_buffer``, if the momentum is not the number 0. Differentiable in gradients,
    parameters, slots and every number. Sparse gradients are taken without weight decay; the buffer
    of a parameter that has had no other is sparse as well.

    Raises:
        ValueError: If a number is out of bounds.
        RuntimeError: If ``use_accelerated_op=True`` cannot be met.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.sgd(lr=0.1, momentum=0.9)
        >>> params = {"w": torch.tensor([1.0])}
        >>> updates, state = tx.update({"w": torch.tensor([2.0])}, tx.init(params), params)
        >>> torchopt.apply_updates(params, updates)
        {'w': tensor([0.8000])}

    Reference:
        Sutskever, Martens, Dahl and Hinton, On the importance of initialization and momentum in
        deep learning, ICML 2013; ``torch.optim.SGD`` for the conventions.
    """
    tx = chain(
        flip_sign(maximize),
        add_decayed_weights(weight_decay),
        trace(momentum, dampening, nesterov),
        scale_by_learning_rate(lr),
    )
    if momentum_buffer_dtype is not None:
        tx = tx.with_slot_dtypes({"momentum_buffer": momentum_buffer_dtype})
    return accelerated(tx, use_accelerated_op)


class SGD(Optimizer):
    """:func:`torchopt.sgd` as a ``torch.optim.Optimizer``.

    Its ``state_dict`` interchanges with that of ``torch.optim.SGD``.
    """

    former_defaults = {"momentum": 0.0, "nesterov": False, "maximize": False}

    @from_recipe(sgd)
    def __init__(self, params: Any) -> None:
        """Take the parameters, then the arguments of :func:`torchopt.sgd`."""


class MetaSGD(MetaOptimizer):
    """:func:`torchopt.sgd` as a differentiable optimizer of a network."""

    @meta_from_recipe(sgd)
    def __init__(self, module: Any) -> None:
        """Take the network, then the arguments of :func:`torchopt.sgd`."""
