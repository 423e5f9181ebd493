"""RAdam: Adam that waits until its second moment is reliable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchopt.base.numerics import (
    exact,
    moving_average,
    moving_average_of_square,
    over_root,
    power,
    root,
)
from torchopt.core.accelerated_op import accelerated
from torchopt.core.chaining import chain
from torchopt.core.hyper import hyper
from torchopt.core.recipe import ignoring_moment_requires_grad
from torchopt.core.rules import ElementwiseTransformation
from torchopt.core.slots import Slot
from torchopt.core.step_count import read_number
from torchopt.core.transform import GradientTransformation, transformation
from torchopt.optim.meta_optimizer import MetaOptimizer
from torchopt.optim.named import from_recipe, meta_from_recipe
from torchopt.optim.optimizer import Optimizer
from torchopt.transforms.basic import (
    CoupledDecay,
    DecoupledDecay,
    flip_sign,
    scale_by_learning_rate,
)
from torchopt.typing import Hyperparameter, Step


@transformation
class ScaleByRAdam(ElementwiseTransformation):
    """Scale by rectified moments; see :func:`scale_by_radam`."""

    betas: tuple[Hyperparameter, Hyperparameter] = hyper((0.9, 0.999), ge=0, lt=1, length=2)
    eps: Hyperparameter = hyper(1e-8, ge=0)

    slots = (Slot("exp_avg"), Slot("exp_avg_sq"))
    uses_step = True

    def rule(
        self, g: Tensor, p: Any, t: Step, slots: tuple, *, betas: tuple[Any, Any], eps: Any
    ) -> tuple[Tensor, tuple]:
        """Return the bias-corrected first moment, over the rectified root where there is one."""
        b1, b2 = betas
        m, v = slots
        m = moving_average(m, g, b1)
        v = moving_average_of_square(v, g, b2)
        if torch.compiler.is_compiling() and not isinstance(t, Tensor):
            t = exact(torch.tensor(t))  # a branch by a number would be compiled by itself
        c1, c2 = 1 - power(b1, t), 1 - power(b2, t)
        limit = 2 / (1 - b2) - 1
        length = limit - 2 * t * power(b2, t) / c2
        known = length > 5
        if type(known) is Tensor:
            known = read_number(known)
        if not isinstance(known, Tensor):
            if not known:
                return m / c1, (m, v)
            scale = c1 * _wider(length, limit) / c2**0.5
            return over_root(m, v, scale, scale * eps), (m, v)
        # both are computed: what is not chosen gets numbers of which every derivative is finite
        length = torch.where(known, length, 6.0)
        limit = torch.where(known, limit, length + 1.0)
        scale = c1 * _wider(length, limit) / c2**0.5
        return m / torch.where(known, scale * (root(v) + eps), c1), (m, v)


def _wider(length: Any, limit: Any) -> Any:
    """Return by how much the root has to be wider: one over the paper's rectification."""
    return ((limit - 4) * (limit - 2) * length / ((length - 4) * (length - 2) * limit)) ** 0.5


def scale_by_radam(
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999), eps: Hyperparameter = 1e-8
) -> GradientTransformation:
    r"""Scale as Adam does, once the second moment is reliable; before that, as momentum does.

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, \\
        \rho_\infty = \frac{2}{1 - \beta_2} - 1, \qquad
        \rho_t = \rho_\infty - \frac{2 t \beta_2^t}{1 - \beta_2^t}, \qquad
        r_t = \sqrt{\frac{(\rho_t - 4)(\rho_t - 2)\, \rho_\infty}
                        {(\rho_\infty - 4)(\rho_\infty - 2)\, \rho_t}}, \\
        u_t = \frac{m_t}{1 - \beta_1^t} \cdot \begin{cases}
            r_t \sqrt{1 - \beta_2^t} \big/ (\sqrt{v_t} + \epsilon) & \rho_t > 5 \\
            1 & \text{otherwise} \end{cases}

    Whether :math:`\rho_t > 5` depends on the step count and :math:`\beta_2` only: never in the
    first five steps, and never for :math:`\beta_2 \le 2/3`. Optax adds :math:`\epsilon` to the root
    of the corrected moment, :math:`\sqrt{v_t / (1 - \beta_2^t)}`; the authors' code does not
    move before.

    Args:
        betas: Decay rates :math:`(\beta_1, \beta_2)`, each in [0, 1).
        eps: :math:`\epsilon \ge 0`, outside the root.

    Slots: ``exp_avg``, ``exp_avg_sq``. Differentiable in gradients, slots and every number; where
    :math:`\rho_t` passes 5 the update jumps as a function of :math:`\beta_2`, and its derivative
    is that of the side it is on. Where a second moment is exactly zero the derivative through its
    root is zero.

    Raises:
        ValueError: If a number is out of bounds.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.scale_by_radam()
        >>> g = [torch.tensor([0.5, -2.0])]
        >>> tx.update(g, tx.init(g))[0]
        [tensor([ 0.5000, -2.0000])]

    Reference:
        Liu et al., On the variance of the adaptive learning rate and beyond, ICLR 2020,
        https://arxiv.org/abs/1908.03265; ``torch.optim.RAdam``.
    """
    return ScaleByRAdam(betas, eps)


@ignoring_moment_requires_grad
def radam(
    lr: Hyperparameter = 1e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0.0,
    decoupled_weight_decay: bool = False,
    *,
    maximize: bool = False,
    use_accelerated_op: bool | None = None,
) -> GradientTransformation:
    r"""RAdam: Adam that waits until its second moment is reliable.

    .. math::
        g_t = \nabla f(p_{t-1}) + \lambda p_{t-1}, \\
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, \\
        \rho_\infty = \frac{2}{1 - \beta_2} - 1, \qquad
        \rho_t = \rho_\infty - \frac{2 t \beta_2^t}{1 - \beta_2^t}, \qquad
        r_t = \sqrt{\frac{(\rho_t - 4)(\rho_t - 2)\, \rho_\infty}
                        {(\rho_\infty - 4)(\rho_\infty - 2)\, \rho_t}}, \\
        u_t = \frac{m_t}{1 - \beta_1^t} \cdot \begin{cases}
            r_t \sqrt{1 - \beta_2^t} \big/ (\sqrt{v_t} + \epsilon) & \rho_t > 5 \\
            1 & \text{otherwise} \end{cases}, \qquad
        p_t = p_{t-1} - \eta\, u_t

    :math:`u_t` is :func:`torchopt.scale_by_radam`. With ``decoupled_weight_decay`` the decay does
    not pass through the moments: :math:`p_t = p_{t-1} - \eta\, (u_t + \lambda p_{t-1})`.
    The function of this name in TorchOpt 0.7.3 had the default ``eps=1e-6``; its classes had
    torch's default, as everything here does. Optax adds ``eps`` to the root of the corrected
    moment.

    Args:
        lr: Learning rate :math:`\eta \ge 0`.
        betas: Decay rates :math:`(\beta_1, \beta_2)` of the two moments, each in [0, 1).
        eps: :math:`\epsilon \ge 0`, added to the root.
        weight_decay: :math:`\lambda \ge 0`; needs ``params`` in ``update``.
        decoupled_weight_decay: Decay as AdamW does.
        maximize: Ascend instead of descend.
        use_accelerated_op: Fused kernels: ``None`` if available, ``True`` required,
            ``False`` never.

    Slots: ``exp_avg``, ``exp_avg_sq``. Differentiable in gradients, parameters, slots and every
    number. Until the second moment comes in, at step 6 at the earliest, nothing depends on the
    second beta and on eps: a meta-gradient by them is zero, or absent (``allow_unused=True``).

    Raises:
        ValueError: If a number is out of bounds.
        RuntimeError: If ``use_accelerated_op=True`` cannot be met.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.radam(lr=0.1)
        >>> params = {"w": torch.tensor([1.0])}
        >>> updates, state = tx.update({"w": torch.tensor([2.0])}, tx.init(params), params)
        >>> torchopt.apply_updates(params, updates)
        {'w': tensor([0.8000])}

    Reference:
        Liu et al., ICLR 2020, https://arxiv.org/abs/1908.03265; ``torch.optim.RAdam``.
    """
    tx = chain(
        flip_sign(maximize),
        CoupledDecay(weight_decay, decoupled_weight_decay),
        scale_by_radam(betas, eps),
        DecoupledDecay(weight_decay, decoupled_weight_decay),
        scale_by_learning_rate(lr),
    )
    return accelerated(tx, use_accelerated_op)


class RAdam(Optimizer):
    """:func:`torchopt.radam` as a ``torch.optim.Optimizer``.

    Its ``state_dict`` interchanges with that of ``torch.optim.RAdam``.
    """

    former_defaults = {"decoupled_weight_decay": False, "maximize": False}
    foreign_hyperparameters = frozenset({"amsgrad"})  # Adam's state has the same slots

    @from_recipe(radam)
    def __init__(self, params: Any) -> None:
        """Take the parameters, then the arguments of :func:`torchopt.radam`."""


class MetaRAdam(MetaOptimizer):
    """:func:`torchopt.radam` as a differentiable optimizer of a network."""

    @meta_from_recipe(radam)
    def __init__(self, module: Any) -> None:
        """Take the network, then the arguments of :func:`torchopt.radam`."""
