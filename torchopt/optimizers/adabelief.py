"""AdaBelief: divide by how far gradients are from what was expected of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torchopt.base.numerics import (
    is_zero,
    moving_average,
    moving_average_of_square,
    over_root,
    power,
)
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
class ScaleByBelief(ElementwiseTransformation):
    """Divide by the root of the variance around the momentum; see :func:`scale_by_belief`."""

    betas: tuple[Hyperparameter, Hyperparameter] = hyper((0.9, 0.999), ge=0, lt=1, length=2)
    eps: Hyperparameter = hyper(1e-16, ge=0)
    eps_root: Hyperparameter = hyper(1e-16, ge=0)

    slots = (Slot("exp_avg"), Slot("exp_avg_var"))
    uses_step = True

    def rule(
        self,
        g: Tensor,
        p: Any,
        t: Step,
        slots: tuple,
        *,
        betas: tuple[Any, Any],
        eps: Any,
        eps_root: Any,
    ) -> tuple[Tensor, tuple]:
        """Return the bias-corrected first moment over the root of the variance around it."""
        b1, b2 = betas
        m, s = slots
        m = moving_average(m, g, b1)
        s = moving_average_of_square(s, g - m, b2)
        if not is_zero(eps_root):
            s = s + eps_root
        c1, c2 = 1 - power(b1, t), 1 - power(b2, t)
        return over_root(m, s, c1 / c2**0.5, c1 * eps), (m, s)


def scale_by_belief(
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-16,
    eps_root: Hyperparameter = 1e-16,
) -> GradientTransformation:
    r"""Divide the first moment of the gradient by the root of the variance around it.

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
        s_t = \beta_2 s_{t-1} + (1 - \beta_2) (g_t - m_t)^2 + \epsilon_r, \qquad
        u_t = \frac{m_t / (1 - \beta_1^t)}{\sqrt{s_t / (1 - \beta_2^t)} + \epsilon}

    As in the paper :math:`\epsilon_r` is kept in :math:`s_t`, so that it grows, up to
    :math:`\epsilon_r / (1 - \beta_2)`; and :math:`m_t` is the new moment.

    Args:
        betas: Decay rates :math:`(\beta_1, \beta_2)`, each in [0, 1).
        eps: :math:`\epsilon \ge 0`, outside the root.
        eps_root: :math:`\epsilon_r \ge 0`, inside. Where the gradient is what was expected it
            alone keeps the divisor from zero.

    The paper has one number for both, 1e-8, and its code 1e-16, as Optax.

    Slots: ``exp_avg``, ``exp_avg_var``. Differentiable in gradients, slots and every number; where
    a variance is exactly zero the derivative through its root is zero. Where gradients are zero the
    derivative by them is finite, but as large as :math:`1 / \sqrt{\epsilon_r}`: for meta-gradients
    take a larger one.

    Raises:
        ValueError: If a number is out of bounds.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.scale_by_belief()
        >>> g = [torch.tensor([0.5, -2.0])]
        >>> tx.update(g, tx.init(g))[0]
        [tensor([ 1.1111, -1.1111])]

    Reference:
        Zhuang et al., AdaBelief optimizer: adapting stepsizes by the belief in observed gradients,
        NeurIPS 2020, https://arxiv.org/abs/2010.07468; ``optax.scale_by_belief``.
    """
    return ScaleByBelief(betas, eps, eps_root)


def adabelief(
    lr: Hyperparameter = 1e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-16,
    weight_decay: Hyperparameter = 0.0,
    *,
    eps_root: Hyperparameter = 1e-16,
    mask: Any = None,
    maximize: bool = False,
    use_accelerated_op: bool | None = None,
) -> GradientTransformation:
    r"""AdaBelief, with decoupled weight decay.

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
        s_t = \beta_2 s_{t-1} + (1 - \beta_2) (g_t - m_t)^2 + \epsilon_r, \\
        p_t = p_{t-1} - \eta \left( \frac{m_t / (1 - \beta_1^t)}
            {\sqrt{s_t / (1 - \beta_2^t)} + \epsilon} + \lambda p_{t-1} \right)

    The quotient is :func:`torchopt.scale_by_belief`.

    Args:
        lr: Learning rate :math:`\eta \ge 0`.
        betas: Decay rates :math:`(\beta_1, \beta_2)` of moment and variance, each in [0, 1).
        eps: :math:`\epsilon \ge 0`, added to the root.
        weight_decay: :math:`\lambda \ge 0`; needs ``params`` in ``update``.
        eps_root: :math:`\epsilon_r \ge 0`, added to the variance at each step.
        mask: Which parameters decay; see :func:`torchopt.masked`. ``None`` means all.
        maximize: Ascend instead of descend.
        use_accelerated_op: Fused kernels: ``None`` if available, ``True`` required,
            ``False`` never.

    It is ``optax.adabelief``, and the paper's code with ``rectify=False``, which is not its
    default.

    Slots: ``exp_avg``, ``exp_avg_var``. Differentiable in gradients, parameters, slots and every
    number.

    Raises:
        ValueError: If a number is out of bounds.
        RuntimeError: If ``use_accelerated_op=True`` cannot be met.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.adabelief(lr=0.09)
        >>> params = {"w": torch.tensor([1.0])}
        >>> updates, state = tx.update({"w": torch.tensor([2.0])}, tx.init(params), params)
        >>> torchopt.apply_updates(params, updates)
        {'w': tensor([0.9000])}

    Reference:
        Zhuang et al., NeurIPS 2020, https://arxiv.org/abs/2010.07468; ``optax.adabelief``.
    """
    tx = chain(
        flip_sign(maximize),
        scale_by_belief(betas, eps, eps_root),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(lr),
    )
    return accelerated(tx, use_accelerated_op)


class AdaBelief(Optimizer):
    """:func:`torchopt.adabelief` as a ``torch.optim.Optimizer``."""

    @from_recipe(adabelief)
    def __init__(self, params: Any) -> None:
        """Take the parameters, then the arguments of :func:`torchopt.adabelief`."""


class MetaAdaBelief(MetaOptimizer):
    """:func:`torchopt.adabelief` as a differentiable optimizer of a network."""

    @meta_from_recipe(adabelief)
    def __init__(self, module: Any) -> None:
        """Take the network, then the arguments of :func:`torchopt.adabelief`."""
