"""AdEMAMix: Adam with a second, slow momentum."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torchopt.base.numerics import (
    is_zero,
    logarithm,
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
class ScaleByAdEMAMix(ElementwiseTransformation):
    """Scale a mixture of a fast and a slow momentum; see :func:`scale_by_ademamix`."""

    betas: tuple[Hyperparameter, Hyperparameter, Hyperparameter] = hyper(
        (0.9, 0.999, 0.9999), ge=0, lt=1, length=3
    )
    alpha: Hyperparameter = hyper(5.0, ge=0)
    eps: Hyperparameter = hyper(1e-8, ge=0)
    alpha_warmup: int = hyper(0, ge=0, integer=True)
    beta3_warmup: int = hyper(0, ge=0, integer=True)

    slots = (Slot("exp_avg_fast"), Slot("exp_avg_slow"), Slot("exp_avg_sq"))
    uses_step = True

    def rule(
        self,
        g: Tensor,
        p: Any,
        t: Step,
        slots: tuple,
        *,
        betas: tuple[Any, Any, Any],
        alpha: Any,
        eps: Any,
        alpha_warmup: int,
        beta3_warmup: int,
    ) -> tuple[Tensor, tuple]:
        """Return the mixture of both first moments over the root of the second."""
        b1, b2, b3 = betas
        fast, slow, v = slots
        fast = moving_average(fast, g, b1)
        slow = moving_average(slow, g, _slowing(b1, b3, _part(t, beta3_warmup)))
        v = moving_average_of_square(v, g, b2)
        mixture = fast * (1 / (1 - power(b1, t))) + slow * (alpha * _part(t, alpha_warmup))
        return over_root(mixture, v, 1 / (1 - power(b2, t)) ** 0.5, eps), (fast, slow, v)


def _part(t: Step, steps: int) -> Any:
    """Return how much of a warm-up is over."""
    if is_zero(steps):
        return 1.0
    part = t / steps
    return part.clamp(max=1.0) if isinstance(part, Tensor) else min(part, 1.0)


def _slowing(b1: Any, b3: Any, over: Any) -> Any:
    """Return a decay rate between two, whose half-life is a part of the way from one to other."""
    if not isinstance(over, Tensor) and over == 1.0:
        return b3
    half_life = _half_life(b1) * (1 - over) + _half_life(b3) * over
    return 0.0 if is_zero(half_life) else power(0.5, 1 / half_life)


def _half_life(beta: Any) -> Any:
    """Return after how many steps half of a momentum is left."""
    return 0.0 if is_zero(beta) else logarithm(0.5) / logarithm(beta)


def scale_by_ademamix(
    betas: tuple[Hyperparameter, Hyperparameter, Hyperparameter] = (0.9, 0.999, 0.9999),
    alpha: Hyperparameter = 5.0,
    eps: Hyperparameter = 1e-8,
    alpha_warmup: int = 0,
    beta3_warmup: int = 0,
) -> GradientTransformation:
    r"""Scale the mixture of a fast momentum and a slow one as Adam does.

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
        s_t = \beta_3(t)\, s_{t-1} + (1 - \beta_3(t))\, g_t, \qquad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, \\
        u_t = \left( \frac{m_t}{1 - \beta_1^t} + \alpha(t)\, s_t \right)
            \bigg/ \left( \sqrt{v_t / (1 - \beta_2^t)} + \epsilon \right)

    The slow momentum is not corrected for its start at zero. Over the warm-ups, of :math:`T` steps
    each, :math:`\alpha(t) = \alpha\, t / T`, and the half-life of the slow momentum goes in a line
    from that of the fast one to its own:

    .. math::
        \beta_3(t) = \exp\left(
            \frac{\ln \beta_1 \ln \beta_3}{(1 - t / T) \ln \beta_3 + (t / T) \ln \beta_1} \right)

    Args:
        betas: Decay rates :math:`(\beta_1, \beta_2, \beta_3)`, each in [0, 1): of the fast
            momentum, of squares, and of the slow momentum.
        alpha: :math:`\alpha \ge 0`, the weight of the slow momentum.
        eps: :math:`\epsilon \ge 0`, outside the root.
        alpha_warmup: Over how many steps :math:`\alpha` grows; 0 for none.
        beta3_warmup: Over how many steps :math:`\beta_3` grows; 0 for none.

    The step :math:`t` is 1 at the first update, as in the paper and the authors' PyTorch code
    (which adds 1e-8 to a beta before it takes a logarithm). Optax has no warm-ups, but takes
    schedules, whose count is 0 there; so may ``alpha`` and an entry of ``betas`` here.

    Slots: ``exp_avg_fast``, ``exp_avg_slow``, ``exp_avg_sq``. Differentiable in gradients, slots
    and every number but the two of steps; where a second moment is exactly zero the derivative
    through its root is zero.

    Raises:
        ValueError: If a number is out of bounds.
        TypeError: If a number of steps is no whole number.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.scale_by_ademamix((0.9, 0.999, 0.99), alpha=5.0)
        >>> g = [torch.tensor([0.5, -2.0])]
        >>> tx.update(g, tx.init(g))[0]
        [tensor([ 1.0500, -1.0500])]

    Reference:
        Pagliardini et al., The AdEMAMix optimizer: better, faster, older, ICLR 2025,
        https://arxiv.org/abs/2409.03137; https://github.com/apple/ml-ademamix.
    """
    return ScaleByAdEMAMix(betas, alpha, eps, alpha_warmup, beta3_warmup)


def ademamix(
    lr: Hyperparameter = 1e-3,
    betas: tuple[Hyperparameter, Hyperparameter, Hyperparameter] = (0.9, 0.999, 0.9999),
    alpha: Hyperparameter = 5.0,
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0.0,
    *,
    alpha_warmup: int = 0,
    beta3_warmup: int = 0,
    mask: Any = None,
    maximize: bool = False,
    use_accelerated_op: bool | None = None,
) -> GradientTransformation:
    r"""AdEMAMix: AdamW with a mixture of a fast and a slow momentum.

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, \\
        s_t = \beta_3(t)\, s_{t-1} + (1 - \beta_3(t))\, g_t, \\
        p_t = p_{t-1} - \eta \left( \frac{m_t / (1 - \beta_1^t) + \alpha(t)\, s_t}
            {\sqrt{v_t / (1 - \beta_2^t)} + \epsilon} + \lambda p_{t-1} \right)

    The quotient is :func:`torchopt.scale_by_ademamix`. Without warm-ups :math:`\alpha(t) = \alpha`
    and :math:`\beta_3(t) = \beta_3`. A warm-up of :math:`T` steps makes
    :math:`\alpha(t) = \alpha \min(1, t / T)`, and lets the half-life of :math:`s` grow linearly
    from that of :math:`m` to its own.

    Args:
        lr: Learning rate :math:`\eta \ge 0`.
        betas: Decay rates :math:`(\beta_1, \beta_2, \beta_3)` of the fast momentum, of squares, and
            of the slow momentum, each in [0, 1).
        alpha: The weight :math:`\alpha \ge 0` of the slow momentum. 5 as in Optax; the authors'
            PyTorch code has 2, and the paper trains with 5 to 10.
        eps: :math:`\epsilon \ge 0`, added to the root.
        weight_decay: :math:`\lambda \ge 0`; needs ``params`` in ``update``.
        alpha_warmup: Over how many steps ``alpha`` grows from 0 to its value. The paper takes all
            steps of the training, for both.
        beta3_warmup: Over how many steps the slow momentum becomes slow.
        mask: Which parameters decay; see :func:`torchopt.masked`. ``None`` means all.
        maximize: Ascend instead of descend.
        use_accelerated_op: Fused kernels: ``None`` if available, ``True`` required,
            ``False`` never.

    Slots: ``exp_avg_fast``, ``exp_avg_slow``, ``exp_avg_sq``. Differentiable in gradients,
    parameters, slots and every number but the two of steps.

    Raises:
        ValueError: If a number is out of bounds.
        TypeError: If a number of steps is no whole number.
        RuntimeError: If ``use_accelerated_op=True`` cannot be met.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.ademamix(lr=0.1, alpha_warmup=1000, beta3_warmup=1000)
        >>> params = {"w": torch.tensor([1.0])}
        >>> updates, state = tx.update({"w": torch.tensor([2.0])}, tx.init(params), params)
        >>> torchopt.apply_updates(params, updates)["w"].round(decimals=3)
        tensor([0.9000])

    Reference:
        Pagliardini et al., ICLR 2025, https://arxiv.org/abs/2409.03137.
    """
    tx = chain(
        flip_sign(maximize),
        scale_by_ademamix(betas, alpha, eps, alpha_warmup, beta3_warmup),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(lr),
    )
    return accelerated(tx, use_accelerated_op)


class AdEMAMix(Optimizer):
    """:func:`torchopt.ademamix` as a ``torch.optim.Optimizer``."""

    @from_recipe(ademamix)
    def __init__(self, params: Any) -> None:
        """Take the parameters, then the arguments of :func:`torchopt.ademamix`."""


class MetaAdEMAMix(MetaOptimizer):
    """:func:`torchopt.ademamix` as a differentiable optimizer of a network."""

    @meta_from_recipe(ademamix)
    def __init__(self, module: Any) -> None:
        """Take the network, then the arguments of :func:`torchopt.ademamix`."""
