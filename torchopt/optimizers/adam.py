"""Adam: adaptive moment estimation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchopt.base.numerics import (
    is_zero,
    moving_average,
    moving_average_of_square,
    over_root,
    power,
    root,
)
from torchopt.core.accelerated_op import accelerated
from torchopt.core.chaining import chain
from torchopt.core.hyper import flag, hyper
from torchopt.core.recipe import ignoring_moment_requires_grad
from torchopt.core.rules import ElementwiseTransformation
from torchopt.core.slots import Slot
from torchopt.core.transform import GradientTransformation, transformation
from torchopt.optim.meta_optimizer import MetaOptimizer
from torchopt.optim.named import from_recipe, meta_from_recipe
from torchopt.optim.optimizer import Optimizer
from torchopt.transforms.basic import add_decayed_weights, flip_sign, scale_by_learning_rate
from torchopt.typing import Hyperparameter, Step


@transformation
class ScaleByAdam(ElementwiseTransformation):
    """Scale by bias-corrected moments; see :func:`scale_by_adam`."""

    betas: tuple[Hyperparameter, Hyperparameter] = hyper((0.9, 0.999), ge=0, lt=1, length=2)
    eps: Hyperparameter = hyper(1e-8, ge=0)
    eps_root: Hyperparameter = hyper(0.0, ge=0)
    amsgrad: bool = flag(False)

    slots = (Slot("exp_avg"), Slot("exp_avg_sq"), Slot("max_exp_avg_sq", when="amsgrad"))
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
        amsgrad: bool,
    ) -> tuple[Tensor, tuple]:
        """Return the bias-corrected first moment over the root of the second."""
        b1, b2 = betas
        m, v, v_max = slots
        m = moving_average(m, g, b1)
        v = moving_average_of_square(v, g, b2)
        if amsgrad:
            v_max = v.clone() if v_max is None else torch.maximum(v_max, v)
        w = v_max if amsgrad else v
        c1, c2 = 1 - power(b1, t), 1 - power(b2, t)
        if is_zero(eps_root):
            # m / c1 / (root(w / c2) + eps), with the scalars taken together: two passes fewer
            u = over_root(m, w, c1 / c2**0.5, c1 * eps)
        else:
            u = m / (c1 * (root(w / c2 + eps_root) + eps))
        return u, (m, v, v_max)


def scale_by_adam(
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    eps_root: Hyperparameter = 0.0,
    amsgrad: bool = False,
) -> GradientTransformation:
    r"""Divide the first moment of the gradient by the root of the second.

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, \qquad
        u_t = \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t) + \epsilon_r} + \epsilon}

    With ``amsgrad`` the running maximum of :math:`v` stands in place of :math:`v_t`.

    Args:
        betas: Decay rates :math:`(\beta_1, \beta_2)`, each in [0, 1).
        eps: :math:`\epsilon \ge 0`, outside the root.
        eps_root: :math:`\epsilon_r \ge 0`, inside the root. Not needed for finite meta-gradients.
        amsgrad: Never let the denominator shrink (Reddi et al., 2018).

    Slots: ``exp_avg``, ``exp_avg_sq`` and, with ``amsgrad``, ``max_exp_avg_sq``. Differentiable in
    gradients, slots and every number; where a second moment is exactly zero the derivative through
    its root is zero.

    Raises:
        ValueError: If a number is out of bounds.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.scale_by_adam()
        >>> g = [torch.tensor([0.5, -2.0])]
        >>> tx.update(g, tx.init(g))[0]
        [tensor([ 1.0000, -1.0000])]

    Reference:
        Kingma and Ba, Adam: a method for stochastic optimization, ICLR 2015,
        https://arxiv.org/abs/1412.6980.
    """
    return ScaleByAdam(betas, eps, eps_root, amsgrad)


@ignoring_moment_requires_grad
def adam(
    lr: Hyperparameter = 1e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0.0,
    amsgrad: bool = False,
    *,
    eps_root: Hyperparameter = 0.0,
    maximize: bool = False,
    exp_avg_dtype: torch.dtype | None = None,
    use_accelerated_op: bool | None = None,
) -> GradientTransformation:
    r"""Adam, with L2 weight decay.

    .. math::
        g_t = \nabla f(p_{t-1}) + \lambda p_{t-1}, \\
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, \\
        p_t = p_{t-1} - \eta\, \frac{m_t / (1 - \beta_1^t)}
            {\sqrt{v_t / (1 - \beta_2^t) + \epsilon_r} + \epsilon}

    With ``amsgrad`` the running maximum of :math:`v` replaces :math:`v_t`. The quotient is
    :func:`torchopt.scale_by_adam`.

    Args:
        lr: Learning rate :math:`\eta \ge 0`.
        betas: Decay rates :math:`(\beta_1, \beta_2)` of the two moments, each in [0, 1).
        eps: :math:`\epsilon \ge 0`, added to the root.
        weight_decay: :math:`\lambda \ge 0`; needs ``params`` in ``update``.
        amsgrad: Use the running maximum of the second moment.
        eps_root: :math:`\epsilon_r \ge 0`, added inside the root.
        maximize: Ascend instead of descend.
        exp_avg_dtype: The dtype that the first moment is kept in, such as ``torch.bfloat16``; see
            :meth:`torchopt.GradientTransformation.with_slot_dtypes`.
        use_accelerated_op: Fused kernels: ``None`` if available, ``True`` required,
            ``False`` never.

    Slots: ``exp_avg``, ``exp_avg_sq``, with ``amsgrad`` ``max_exp_avg_sq``. Differentiable in
    gradients, parameters, slots and every number.

    Raises:
        ValueError: If a number is out of bounds.
        RuntimeError: If ``use_accelerated_op=True`` cannot be met.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.adam(lr=0.1)
        >>> params = {"w": torch.tensor([1.0])}
        >>> updates, state = tx.update({"w": torch.tensor([2.0])}, tx.init(params), params)
        >>> torchopt.apply_updates(params, updates)
        {'w': tensor([0.9000])}

    Reference:
        Kingma and Ba, ICLR 2015, https://arxiv.org/abs/1412.6980; ``torch.optim.Adam``.
    """
    tx = chain(
        flip_sign(maximize),
        add_decayed_weights(weight_decay),
        scale_by_adam(betas, eps, eps_root, amsgrad),
        scale_by_learning_rate(lr),
    )
    if exp_avg_dtype is not None:
        tx = tx.with_slot_dtypes({"exp_avg": exp_avg_dtype})
    return accelerated(tx, use_accelerated_op)


class Adam(Optimizer):
    """:func:`torchopt.adam` as a ``torch.optim.Optimizer``.

    Its ``state_dict`` interchanges with that of ``torch.optim.Adam``.
    """

    optional_hyperparameters = frozenset({"eps_root"})
    former_defaults = {"amsgrad": False, "maximize": False}
    fixed_options = {"decoupled_weight_decay": False}

    @from_recipe(adam)
    def __init__(self, params: Any) -> None:
        """Take the parameters, then the arguments of :func:`torchopt.adam`."""


class MetaAdam(MetaOptimizer):
    """:func:`torchopt.adam` as a differentiable optimizer of a network."""

    @meta_from_recipe(adam)
    def __init__(self, module: Any) -> None:
        """Take the network, then the arguments of :func:`torchopt.adam`."""
