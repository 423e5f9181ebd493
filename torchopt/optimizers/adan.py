"""Adan: Nesterov momentum from differences of gradients, with a second moment."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchopt.base import misuse
from torchopt.base.numerics import (
    add_scaled,
    is_zero,
    moving_average,
    moving_average_of_square,
    over_root,
    power,
)
from torchopt.core.accelerated_op import accelerated
from torchopt.core.chaining import chain
from torchopt.core.hyper import flag, hyper
from torchopt.core.rules import ElementwiseTransformation
from torchopt.core.slots import Slot
from torchopt.core.transform import GradientTransformation, transformation
from torchopt.optim.meta_optimizer import MetaOptimizer
from torchopt.optim.named import from_recipe, meta_from_recipe
from torchopt.optim.optimizer import Optimizer
from torchopt.transforms.basic import flip_sign
from torchopt.typing import Hyperparameter, Step


@transformation
class ScaleByAdan(ElementwiseTransformation):
    """Scale by moments of gradients and of their differences; see :func:`scale_by_adan`."""

    betas: tuple[Hyperparameter, Hyperparameter, Hyperparameter] = hyper(
        (0.98, 0.92, 0.99), ge=0, lt=1, length=3
    )
    eps: Hyperparameter = hyper(1e-8, ge=0)

    slots = (Slot("exp_avg"), Slot("exp_avg_diff"), Slot("exp_avg_sq"), Slot("neg_pre_grad"))
    uses_step = True

    def rule(
        self, g: Tensor, p: Any, t: Step, slots: tuple, *, betas: tuple[Any, Any, Any], eps: Any
    ) -> tuple[Tensor, tuple]:
        """Return the corrected moments over the root of the second, and all new moments."""
        b1, b2, b3 = betas
        m, d, n, negative = slots
        difference = g + _before(g, negative, t)
        m = moving_average(m, g, b1)
        d = moving_average(d, difference, b2)
        n = moving_average_of_square(n, add_scaled(g, difference, b2), b3)
        u = m * (1 / (1 - power(b1, t))) + d * (b2 / (1 - power(b2, t)))
        return over_root(u, n, 1 / (1 - power(b3, t)) ** 0.5, eps), (m, d, n, -g)


def _before(g: Tensor, negative: Tensor, t: Step) -> Tensor:
    """Return the gradient before, negated; at the first step it is that of this step."""
    if isinstance(t, Tensor):
        return torch.where(t == 1, -g, negative)
    return -g if t == 1 else negative


@transformation
class StepProximally(ElementwiseTransformation):
    """Take a step, and let parameters decay after it by a division; or as AdamW does."""

    lr: Hyperparameter = hyper(1e-3, ge=0)
    weight_decay: Hyperparameter = hyper(0.0, ge=0)
    no_prox: bool = flag(False)

    def rule(
        self,
        g: Tensor,
        p: Any,
        t: Step,
        slots: tuple,
        *,
        lr: Any,
        weight_decay: Any,
        no_prox: bool,
    ) -> tuple[Tensor, tuple]:
        """Return ``(p - lr * g) / (1 + lr * weight_decay) - p``, in a form that does not cancel."""
        if is_zero(weight_decay):
            return g * -lr, slots
        u = add_scaled(g, misuse.given_params("Weight decay", p), weight_decay)
        return u * (-lr if no_prox else -lr / (1 + lr * weight_decay)), slots


def scale_by_adan(
    betas: tuple[Hyperparameter, Hyperparameter, Hyperparameter] = (0.98, 0.92, 0.99),
    eps: Hyperparameter = 1e-8,
) -> GradientTransformation:
    r"""Scale by moments of gradients and of their differences.

    .. math::
        \Delta_t = g_t - g_{t-1} \;\;(g_0 = g_1), \qquad
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
        d_t = \beta_2 d_{t-1} + (1 - \beta_2) \Delta_t, \\
        n_t = \beta_3 n_{t-1} + (1 - \beta_3) (g_t + \beta_2 \Delta_t)^2, \qquad
        u_t = \left( \frac{m_t}{1 - \beta_1^t} + \beta_2 \frac{d_t}{1 - \beta_2^t} \right)
            \bigg/ \left( \sqrt{n_t / (1 - \beta_3^t)} + \epsilon \right)

    The betas are those of the authors' code: 1 minus those of the paper. Optax 0.2.8 has
    :math:`1 - \beta_2` in the two places where :math:`\beta_2` multiplies a difference, which is
    the paper's formula with the code's betas.

    Args:
        betas: Decay rates :math:`(\beta_1, \beta_2, \beta_3)`, each in [0, 1): of gradients, of
            their differences, and of squares.
        eps: :math:`\epsilon \ge 0`, outside the root.

    Slots: ``exp_avg``, ``exp_avg_diff``, ``exp_avg_sq`` and ``neg_pre_grad``, the last gradient
    with the other sign, as the authors keep it; at the first step it is not read. Differentiable
    in gradients, slots and every number; where a second moment is exactly zero the derivative
    through its root is zero.

    Raises:
        ValueError: If a number is out of bounds.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.scale_by_adan()
        >>> g = [torch.tensor([0.5, -2.0])]
        >>> [u.round(decimals=4) for u in tx.update(g, tx.init(g))[0]]
        [tensor([ 1., -1.])]

    Reference:
        Xie et al., Adan: adaptive Nesterov momentum algorithm for faster optimizing deep models,
        2022, https://arxiv.org/abs/2208.06677; https://github.com/sail-sg/Adan.
    """
    return ScaleByAdan(betas, eps)


def adan(
    lr: Hyperparameter = 1e-3,
    betas: tuple[Hyperparameter, Hyperparameter, Hyperparameter] = (0.98, 0.92, 0.99),
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0.0,
    no_prox: bool = False,
    *,
    maximize: bool = False,
    use_accelerated_op: bool | None = None,
) -> GradientTransformation:
    r"""Adan: adaptive Nesterov momentum.

    .. math::
        \Delta_t = g_t - g_{t-1} \;\;(g_0 = g_1), \qquad
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \\
        d_t = \beta_2 d_{t-1} + (1 - \beta_2) \Delta_t, \qquad
        n_t = \beta_3 n_{t-1} + (1 - \beta_3) (g_t + \beta_2 \Delta_t)^2, \\
        u_t = \left( \frac{m_t}{1 - \beta_1^t} + \beta_2 \frac{d_t}{1 - \beta_2^t} \right)
            \bigg/ \left( \sqrt{n_t / (1 - \beta_3^t)} + \epsilon \right), \qquad
        p_t = \frac{p_{t-1} - \eta\, u_t}{1 + \eta \lambda}

    :math:`u_t` is :func:`torchopt.scale_by_adan`. With ``no_prox`` the weights decay as in AdamW:
    :math:`p_t = p_{t-1} - \eta\, (u_t + \lambda p_{t-1})`, which is what Optax does.

    Args:
        lr: Learning rate :math:`\eta \ge 0`.
        betas: Decay rates :math:`(\beta_1, \beta_2, \beta_3)` of gradients, of their differences,
            and of squares, each in [0, 1).
        eps: :math:`\epsilon \ge 0`, added to the root. (Optax also adds ``eps_root=1e-8`` inside
            the root.)
        weight_decay: :math:`\lambda \ge 0`; needs ``params`` in ``update``. Like any number it may
            be a dict by parameter name, for weights that do not decay.
        no_prox: Decay as AdamW does.
        maximize: Ascend instead of descend.
        use_accelerated_op: Fused kernels: ``None`` if available, ``True`` required,
            ``False`` never.

    The authors' ``max_grad_norm`` is :func:`torchopt.clip_grad_norm` before it in a chain.

    Slots: ``exp_avg``, ``exp_avg_diff``, ``exp_avg_sq``, ``neg_pre_grad``. Differentiable in
    gradients, parameters, slots and every number.

    Raises:
        ValueError: If a number is out of bounds.
        RuntimeError: If ``use_accelerated_op=True`` cannot be met.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.adan(lr=0.1, weight_decay=0.5)
        >>> params = {"w": torch.tensor([1.0])}
        >>> updates, state = tx.update({"w": torch.tensor([2.0])}, tx.init(params), params)
        >>> torchopt.apply_updates(params, updates)
        {'w': tensor([0.8571])}

    Reference:
        Xie et al., 2022, https://arxiv.org/abs/2208.06677; https://github.com/sail-sg/Adan.
    """
    step = StepProximally(lr, weight_decay, no_prox)
    tx = chain(flip_sign(maximize), scale_by_adan(betas, eps), step)
    return accelerated(tx, use_accelerated_op)


class Adan(Optimizer):
    """:func:`torchopt.adan` as a ``torch.optim.Optimizer``."""

    @from_recipe(adan)
    def __init__(self, params: Any) -> None:
        """Take the parameters, then the arguments of :func:`torchopt.adan`."""


class MetaAdan(MetaOptimizer):
    """:func:`torchopt.adan` as a differentiable optimizer of a network."""

    @meta_from_recipe(adan)
    def __init__(self, module: Any) -> None:
        """Take the network, then the arguments of :func:`torchopt.adan`."""
