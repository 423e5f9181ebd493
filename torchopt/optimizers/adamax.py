"""Adamax: Adam with the infinity norm instead of the second moment."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchopt.base.numerics import moving_average, power
from torchopt.core.accelerated_op import accelerated
from torchopt.core.chaining import chain
from torchopt.core.hyper import hyper
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
class ScaleByAdamax(ElementwiseTransformation):
    """Divide by a decaying maximum; see :func:`scale_by_adamax`."""

    betas: tuple[Hyperparameter, Hyperparameter] = hyper((0.9, 0.999), ge=0, lt=1, length=2)
    eps: Hyperparameter = hyper(1e-8, ge=0)

    slots = (Slot("exp_avg"), Slot("exp_inf"))
    uses_step = True

    def rule(
        self, g: Tensor, p: Any, t: Step, slots: tuple, *, betas: tuple[Any, Any], eps: Any
    ) -> tuple[Tensor, tuple]:
        """Return the bias-corrected first moment over the decaying maximum of the gradient."""
        b1, b2 = betas
        m, n = slots
        m = moving_average(m, g, b1)
        n = torch.maximum(n * b2, g.abs() + eps)
        return m / (n * (1 - power(b1, t))), (m, n)


def scale_by_adamax(
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999), eps: Hyperparameter = 1e-8
) -> GradientTransformation:
    r"""Divide the first moment of the gradient by a decaying maximum.

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
        n_t = \max(\beta_2 n_{t-1},\ |g_t| + \epsilon), \qquad
        u_t = \frac{m_t}{(1 - \beta_1^t)\, n_t}

    Args:
        betas: Decay rates :math:`(\beta_1, \beta_2)`, each in [0, 1).
        eps: :math:`\epsilon \ge 0`, inside the maximum, as in torch and Optax; the paper has none.

    Slots: ``exp_avg``, ``exp_inf``. Differentiable in gradients, slots and every number. Where both
    sides of the maximum are equal the derivative is the mean of those of the two; where the
    gradient is exactly zero that of its absolute value is zero.

    Raises:
        ValueError: If a number is out of bounds.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.scale_by_adamax(betas=(0.5, 0.75))
        >>> g = [torch.tensor([1.0, -4.0])]
        >>> _, state = tx.update(g, tx.init(g))
        >>> tx.update([torch.tensor([1.0, 1.0])], state)[0]
        [tensor([ 1.0000, -0.2222])]

    Reference:
        Kingma and Ba, Adam: a method for stochastic optimization, ICLR 2015, algorithm 2,
        https://arxiv.org/abs/1412.6980; ``torch.optim.Adamax``.
    """
    return ScaleByAdamax(betas, eps)


@ignoring_moment_requires_grad
def adamax(
    lr: Hyperparameter = 2e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0.0,
    *,
    maximize: bool = False,
    use_accelerated_op: bool | None = None,
) -> GradientTransformation:
    r"""Adamax: Adam with the infinity norm instead of the second moment.

    .. math::
        g_t = \nabla f(p_{t-1}) + \lambda p_{t-1}, \qquad
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \\
        n_t = \max(\beta_2 n_{t-1},\ |g_t| + \epsilon), \qquad
        p_t = p_{t-1} - \frac{\eta}{1 - \beta_1^t} \cdot \frac{m_t}{n_t}

    The function of this name in TorchOpt 0.7.3 had the defaults ``lr=1e-3`` and ``eps=1e-6``; its
    classes had those of torch, as everything here.

    Args:
        lr: Learning rate :math:`\eta \ge 0`.
        betas: Decay rates :math:`(\beta_1, \beta_2)`, each in [0, 1).
        eps: :math:`\epsilon \ge 0`, inside the maximum.
        weight_decay: :math:`\lambda \ge 0`; needs ``params`` in ``update``.
        maximize: Ascend instead of descend.
        use_accelerated_op: Fused kernels: ``None`` if available, ``True`` required,
            ``False`` never.

    Slots: ``exp_avg``, ``exp_inf``. Differentiable in gradients, parameters, slots and every
    number; see :func:`torchopt.scale_by_adamax` for ties of the maximum.

    Raises:
        ValueError: If a number is out of bounds.
        RuntimeError: If ``use_accelerated_op=True`` cannot be met.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.adamax(lr=0.1)
        >>> params = {"w": torch.tensor([1.0])}
        >>> updates, state = tx.update({"w": torch.tensor([2.0])}, tx.init(params), params)
        >>> torchopt.apply_updates(params, updates)
        {'w': tensor([0.9000])}

    Reference:
        Kingma and Ba, ICLR 2015; ``torch.optim.Adamax``.
    """
    tx = chain(
        flip_sign(maximize),
        add_decayed_weights(weight_decay),
        scale_by_adamax(betas, eps),
        scale_by_learning_rate(lr),
    )
    return accelerated(tx, use_accelerated_op)


class Adamax(Optimizer):
    """:func:`torchopt.adamax` as a ``torch.optim.Optimizer``.

    Its ``state_dict`` interchanges with that of ``torch.optim.Adamax``.
    """

    @from_recipe(adamax)
    def __init__(self, params: Any) -> None:
        """Take the parameters, then the arguments of :func:`torchopt.adamax`."""


class MetaAdamax(MetaOptimizer):
    """:func:`torchopt.adamax` as a differentiable optimizer of a network."""

    @meta_from_recipe(adamax)
    def __init__(self, module: Any) -> None:
        """Take the network, then the arguments of :func:`torchopt.adamax`."""
