"""NovoGrad: momentum of gradients that are divided by a running norm of their layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchopt.base import misuse
from torchopt.base.distributed import whole
from torchopt.base.numerics import add_scaled, is_zero, moving_average, root
from torchopt.core.accelerated_op import accelerated
from torchopt.core.chaining import chain
from torchopt.core.hyper import hyper
from torchopt.core.rules import TensorTransformation
from torchopt.core.slots import Slot
from torchopt.core.transform import GradientTransformation, transformation
from torchopt.optim.meta_optimizer import MetaOptimizer
from torchopt.optim.named import from_recipe, meta_from_recipe
from torchopt.optim.optimizer import Optimizer
from torchopt.transforms.basic import flip_sign, scale_by_learning_rate
from torchopt.typing import Hyperparameter, Step


def _of_a_number(shape: torch.Size) -> tuple[int, ...]:
    return ()


@transformation
class ScaleByNovograd(TensorTransformation):
    """Divide by a running norm, then accumulate; see :func:`scale_by_novograd`."""

    betas: tuple[Hyperparameter, Hyperparameter] = hyper(
        (0.9, 0.25), ge=0, lt=1, length=2, scalar=True
    )
    eps: Hyperparameter = hyper(1e-8, ge=0)
    weight_decay: Hyperparameter = hyper(0.0, ge=0)

    slots = (Slot("exp_avg"), Slot("exp_avg_sq", shape=_of_a_number))
    uses_step = True
    accepts_complex = False
    batches = True

    def rule(
        self,
        g: Tensor,
        p: Any,
        t: Step,
        slots: tuple,
        *,
        betas: tuple[Any, Any],
        eps: Any,
        weight_decay: Any,
    ) -> tuple[Tensor, tuple]:
        """Return the new momentum, of normalized gradients and decay."""
        b1, b2 = betas
        m, v = slots
        v = _second_moment(v, whole(g.square().sum()), b2, t)
        u = g / (root(v) + eps)
        if not is_zero(weight_decay):
            u = add_scaled(u, misuse.given_params("Weight decay", p), weight_decay)
        m = add_scaled(u, m, b1)
        return m, (m, v)


def _second_moment(v: Tensor, squared: Tensor, b2: Any, t: Step) -> Tensor:
    """Return the running square of the norm, which starts as that of the first gradient."""
    if isinstance(t, Tensor):
        return torch.where(t == 1, squared, moving_average(v, squared, b2))
    return squared if t == 1 else moving_average(v, squared, b2)


def scale_by_novograd(
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.25),
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0.0,
) -> GradientTransformation:
    r"""Accumulate gradients that are divided by a running norm of their parameter's.

    .. math::
        v_1 = \lVert g_1 \rVert^2, \qquad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) \lVert g_t \rVert^2, \qquad
        u_t = m_t = \beta_1 m_{t-1} + \frac{g_t}{\sqrt{v_t} + \epsilon} + \lambda p_{t-1}

    Args:
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1). The paper has (0.95, 0.98).
        eps: :math:`\epsilon \ge 0`, outside the root.
        weight_decay: :math:`\lambda \ge 0`, inside of the momentum; needs ``params`` in ``update``.

    Slots: ``exp_avg``, and ``exp_avg_sq``, one number for each parameter. Differentiable in
    gradients, parameters, slots and every number; while all gradients of a parameter have been
    zero the derivative through the norm is zero. It has no fused kernel: a norm is no operation on
    single entries.

    Raises:
        ValueError: If a number is out of bounds.
        TypeError: If a gradient is complex.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.scale_by_novograd()
        >>> g = [torch.tensor([3.0, 4.0])]
        >>> updates, state = tx.update(g, tx.init(g))
        >>> updates, state.exp_avg_sq
        ([tensor([0.6000, 0.8000])], [tensor(25.)])

    Reference:
        Ginsburg et al., Stochastic gradient methods with layer-wise adaptive moments for training
        of deep networks, 2019, algorithm 1, https://arxiv.org/abs/1905.11286;
        ``optax.scale_by_novograd``.
    """
    return ScaleByNovograd(betas, eps, weight_decay)


def novograd(
    lr: Hyperparameter = 1e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.25),
    eps: Hyperparameter = 1e-6,
    weight_decay: Hyperparameter = 0.0,
    *,
    maximize: bool = False,
    use_accelerated_op: bool | None = None,
) -> GradientTransformation:
    r"""NovoGrad: momentum with a second moment that is one number for each parameter.

    .. math::
        v_1 = \lVert g_1 \rVert^2, \qquad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) \lVert g_t \rVert^2, \\
        m_t = \beta_1 m_{t-1} + \frac{g_t}{\sqrt{v_t} + \epsilon} + \lambda p_{t-1}, \qquad
        p_t = p_{t-1} - \eta\, m_t

    The norm is that of a whole parameter. :math:`m_t` is :func:`torchopt.scale_by_novograd`.

    Args:
        lr: Learning rate :math:`\eta \ge 0`.
        betas: Decay rates :math:`(\beta_1, \beta_2)` of momentum and squared norm, each in [0, 1).
            Optax's defaults; the paper has (0.95, 0.98).
        eps: :math:`\epsilon \ge 0`, added to the root.
        weight_decay: :math:`\lambda \ge 0`; needs ``params`` in ``update``.
        maximize: Ascend instead of descend.
        use_accelerated_op: Fused kernels: ``None`` if available, ``True`` required,
            ``False`` never. The norm of a whole parameter has none.

    Slots: ``exp_avg``, and ``exp_avg_sq``, one number for each parameter. Differentiable in
    gradients, parameters, slots and every number.

    Raises:
        ValueError: If a number is out of bounds.
        TypeError: If a gradient is complex.
        RuntimeError: If ``use_accelerated_op=True``.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.novograd(lr=0.1)
        >>> params = {"w": torch.tensor([1.0, 1.0])}
        >>> updates, state = tx.update({"w": torch.tensor([3.0, -4.0])}, tx.init(params), params)
        >>> torchopt.apply_updates(params, updates)
        {'w': tensor([0.9400, 1.0800])}

    Reference:
        Ginsburg et al., 2019, https://arxiv.org/abs/1905.11286; ``optax.novograd``.
    """
    tx = chain(
        flip_sign(maximize),
        scale_by_novograd(betas, eps, weight_decay),
        scale_by_learning_rate(lr),
    )
    return accelerated(tx, use_accelerated_op)


class NovoGrad(Optimizer):
    """:func:`torchopt.novograd` as a ``torch.optim.Optimizer``."""

    @from_recipe(novograd)
    def __init__(self, params: Any) -> None:
        """Take the parameters, then the arguments of :func:`torchopt.novograd`."""


class MetaNovoGrad(MetaOptimizer):
    """:func:`torchopt.novograd` as a differentiable optimizer of a network."""

    @meta_from_recipe(novograd)
    def __init__(self, module: Any) -> None:
        """Take the network, then the arguments of :func:`torchopt.novograd`."""
