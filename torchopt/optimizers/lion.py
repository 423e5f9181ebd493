"""Lion: the sign of an interpolated momentum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchopt.base.numerics import moving_average
from torchopt.core.accelerated_op import accelerated
from torchopt.core.chaining import chain
from torchopt.core.hyper import hyper
from torchopt.core.rules import ElementwiseTransformation
from torchopt.core.slots import Slot
from torchopt.core.transform import GradientTransformation, transformation
from torchopt.optim.meta_optimizer import MetaOptimizer
from torchopt.optim.named import from_recipe, meta_from_recipe
from torchopt.optim.optimizer import Optimizer
from torchopt.transforms.basic import add_decayed_weights, flip_sign, scale_by_learning_rate
from torchopt.typing import Hyperparameter, Step


@transformation
class ScaleByLion(ElementwiseTransformation):
    """Take the sign of an interpolated momentum; see :func:`scale_by_lion`."""

    betas: tuple[Hyperparameter, Hyperparameter] = hyper((0.9, 0.99), ge=0, lt=1, length=2)

    slots = (Slot("exp_avg"),)

    def rule(
        self, g: Tensor, p: Any, t: Step, slots: tuple, *, betas: tuple[Any, Any]
    ) -> tuple[Tensor, tuple]:
        """Return the sign of the momentum that ``b1`` makes, and the one that ``b2`` makes."""
        b1, b2 = betas
        (m,) = slots
        u = moving_average(m, g, b1).sign()
        m = moving_average(m, g, b2)
        return u, (m,)


def scale_by_lion(
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.99),
) -> GradientTransformation:
    r"""Take the sign of the gradient interpolated with its momentum.

    .. math::
        u_t = \operatorname{sign}(\beta_1 m_{t-1} + (1 - \beta_1) g_t), \qquad
        m_t = \beta_2 m_{t-1} + (1 - \beta_2) g_t

    Args:
        betas: Decay rates :math:`(\beta_1, \beta_2)`, each in [0, 1): of what the sign is taken
            of, and of what is kept.

    Slots: ``exp_avg``. The update is a piecewise constant function of gradients, slots and betas:
    its derivative is zero, at the jumps too (where it has none). Kept momentum is differentiable
    in gradients, slots and the second beta. Of a complex number the signs of both parts are taken.
    The sign of ``nan`` is 0 in torch: a gradient that is ``nan`` stops its entry without a word,
    for good, since ``exp_avg`` stays ``nan``; put :func:`torchopt.nan_to_num` before.

    Raises:
        ValueError: If a number is out of bounds.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.scale_by_lion()
        >>> g = [torch.tensor([0.5, -2.0, 0.0])]
        >>> tx.update(g, tx.init(g))[0]
        [tensor([ 1., -1.,  0.])]

    Reference:
        Chen et al., Symbolic discovery of optimization algorithms, NeurIPS 2023, algorithm 2,
        https://arxiv.org/abs/2302.06675.
    """
    return ScaleByLion(betas)


def lion(
    lr: Hyperparameter = 1e-4,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.99),
    weight_decay: Hyperparameter = 0.0,
    *,
    mask: Any = None,
    maximize: bool = False,
    exp_avg_dtype: torch.dtype | None = None,
    use_accelerated_op: bool | None = None,
) -> GradientTransformation:
    r"""Lion (evolved sign momentum), with decoupled weight decay.

    .. math::
        u_t = \operatorname{sign}(\beta_1 m_{t-1} + (1 - \beta_1) g_t), \qquad
        m_t = \beta_2 m_{t-1} + (1 - \beta_2) g_t, \\
        p_t = p_{t-1} - \eta\, (u_t + \lambda p_{t-1})

    Every entry moves by :math:`\eta`, so the paper takes a learning rate three to ten times
    smaller than for AdamW, and a weight decay larger by as much.

    Args:
        lr: Learning rate :math:`\eta \ge 0`.
        betas: Decay rates :math:`(\beta_1, \beta_2)`, each in [0, 1): of what the sign is taken
            of, and of what is kept.
        weight_decay: :math:`\lambda \ge 0`; needs ``params`` in ``update``.
        mask: Which parameters decay; see :func:`torchopt.masked`. ``None`` means all.
        maximize: Ascend instead of descend.
        exp_avg_dtype: The dtype that the momentum is kept in, such as ``torch.bfloat16``; see
            :meth:`torchopt.GradientTransformation.with_slot_dtypes`.
        use_accelerated_op: Fused kernels: ``None`` if available, ``True`` required,
            ``False`` never.

    Slots: ``exp_avg``.

    **What a meta-gradient reaches.** The sign is piecewise constant, so nothing flows through
    :math:`u_t`: the derivatives by gradients, slots and betas are exactly zero. What is left is
    :math:`\partial p_t / \partial p_{t-1} = 1 - \eta \lambda`,
    :math:`\partial p_t / \partial \eta = -(u_t + \lambda p_{t-1})` and
    :math:`\partial p_t / \partial \lambda = -\eta\, p_{t-1}`: learning rates, weight decay and
    initial parameters are learned, the last ones by their first-order meta-gradient. Betas, and
    whatever acts through the inner gradient only (weights of examples, a learned loss), are not:
    their meta-gradient is the right one, zero, although a change large enough to turn a sign does
    change the result.

    Raises:
        ValueError: If a number is out of bounds.
        RuntimeError: If ``use_accelerated_op=True`` cannot be met.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.lion(lr=0.1, weight_decay=0.5)
        >>> params = {"w": torch.tensor([1.0])}
        >>> updates, state = tx.update({"w": torch.tensor([2.0])}, tx.init(params), params)
        >>> torchopt.apply_updates(params, updates)
        {'w': tensor([0.8500])}

    Reference:
        Chen et al., Symbolic discovery of optimization algorithms, NeurIPS 2023, algorithm 2,
        https://arxiv.org/abs/2302.06675.
    """
    tx = chain(
        flip_sign(maximize),
        ScaleByLion(betas),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(lr),
    )
    if exp_avg_dtype is not None:
        tx = tx.with_slot_dtypes({"exp_avg": exp_avg_dtype})
    return accelerated(tx, use_accelerated_op)


class Lion(Optimizer):
    """:func:`torchopt.lion` as a ``torch.optim.Optimizer``."""

    @from_recipe(lion)
    def __init__(self, params: Any) -> None:
        """Take the parameters, then the arguments of :func:`torchopt.lion`."""


class MetaLion(MetaOptimizer):
    """:func:`torchopt.lion` as a differentiable optimizer of a network."""

    @meta_from_recipe(lion)
    def __init__(self, module: Any) -> None:
        """Take the network, then the arguments of :func:`torchopt.lion`."""
