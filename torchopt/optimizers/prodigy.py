"""Prodigy: AdamW whose learning rate is an estimate of the distance to the solution."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torchopt.base import misuse
from torchopt.base.numerics import is_zero, moving_average, moving_average_of_square, over_root
from torchopt.core.accelerated_op import accelerated
from torchopt.core.chaining import chain
from torchopt.core.hyper import flag, hyper
from torchopt.core.slots import PARAM, Slot
from torchopt.core.transform import GradientTransformation, transformation
from torchopt.optim.meta_optimizer import MetaOptimizer
from torchopt.optim.named import from_recipe, meta_from_recipe
from torchopt.optim.optimizer import Optimizer
from torchopt.optimizers.distance import ESTIMATE, DistanceEstimating, corrected, of_number
from torchopt.transforms.basic import flip_sign
from torchopt.transforms.clip import whole_number
from torchopt.typing import Hyperparameter, Step


@transformation
class StepByProdigy(DistanceEstimating):
    """The whole step of Prodigy; see :func:`prodigy`."""

    lr: Hyperparameter = hyper(1.0, ge=0, scalar=True)
    betas: tuple[Hyperparameter, Hyperparameter] = hyper(
        (0.9, 0.999), ge=0, lt=1, length=2, scalar=True
    )
    beta3: Hyperparameter | None = hyper(None, ge=0, lt=1, optional=True, scalar=True)
    eps: Hyperparameter = hyper(1e-8, ge=0)
    estim_lr0: Hyperparameter = hyper(1e-6, gt=0, scalar=True)
    estim_lr_coef: Hyperparameter = hyper(1.0, ge=0, scalar=True)
    weight_decay: Hyperparameter = hyper(0.0, ge=0)
    safeguard_warmup: bool = flag(False)
    use_bias_correction: bool = flag(True)

    slots = (
        Slot("exp_avg"),
        Slot("exp_avg_sq"),
        Slot("grad_sum"),
        Slot("params0", start=PARAM),
        Slot("numerator_weighted", shape=of_number),
        ESTIMATE,
    )

    def common(
        self,
        d: Tensor,
        t: Step,
        *,
        lr: Any,
        betas: Any,
        estim_lr0: Any,
        safeguard_warmup: bool,
        use_bias_correction: bool,
        **_: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the estimate, the rate, and the weights of a gradient in the two sums."""
        rate = corrected(d, t, lr, betas, use_bias_correction)
        ratio = d / estim_lr0  # without it the sums would be as small as the first estimate
        return d, rate, ratio * rate, ratio * (d if safeguard_warmup else rate)

    def look(
        self,
        g: Tensor,
        p: Any,
        slots: tuple,
        common: Any,
        *,
        betas: Any,
        beta3: Any,
        estim_lr_coef: Any,
        **_: Any,
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """Return the moments of the scaled gradient, and the sums that the estimate is made of."""
        m, v, s, p0, numerator = slots
        d, _rate, of_numerator, of_sum = common
        b3 = betas[1] ** 0.5 if beta3 is None else beta3
        way = p0 - misuse.given_params("prodigy", p)
        numerator = b3 * numerator + of_numerator * whole_number((g * way).sum())
        scaled = g * d
        m = moving_average(m, scaled, betas[0])
        v = moving_average_of_square(v, scaled, betas[1])
        s = s * b3 + g * of_sum
        total = whole_number(s.abs().sum())
        return (m, v, s, p0, numerator), numerator * estim_lr_coef, total

    def move(
        self,
        g: Tensor,
        p: Any,
        slots: tuple,
        common: Any,
        new: Tensor,
        *,
        eps: Any,
        weight_decay: Any,
        **_: Any,
    ) -> Tensor:
        """Return Adam's update at the rate before this step."""
        u = over_root(slots[0], slots[1], 1.0, new * eps)
        if not is_zero(weight_decay):
            u = u + p * weight_decay
        return u * -common[1]


def prodigy(
    lr: Hyperparameter = 1.0,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    beta3: Hyperparameter | None = None,
    eps: Hyperparameter = 1e-8,
    estim_lr0: Hyperparameter = 1e-6,
    estim_lr_coef: Hyperparameter = 1.0,
    weight_decay: Hyperparameter = 0.0,
    safeguard_warmup: bool = False,
    use_bias_correction: bool = True,
    *,
    maximize: bool = False,
    use_accelerated_op: bool | None = None,
) -> GradientTransformation:
    r"""Prodigy: AdamW that finds its learning rate by an estimate of the distance to the solution.

    With :math:`\eta_t = d_{t-1}\, \gamma \sqrt{1 - \beta_2^t} / (1 - \beta_1^t)` and sums over all
    parameters

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1)\, d_{t-1} g_t, \qquad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2)\, d_{t-1}^2 g_t^2, \\
        r_t = \beta_3 r_{t-1} + \tfrac{d_{t-1}}{d_0} \eta_t \langle g_t, p_0 - p_{t-1} \rangle,
        \qquad s_t = \beta_3 s_{t-1} + \tfrac{d_{t-1}}{d_0} \eta_t\, g_t, \\
        d_t = \max\!\left(d_{t-1},\; c\, \frac{r_t}{\lVert s_t \rVert_1}\right), \qquad
        p_t = p_{t-1} - \eta_t \left(\frac{m_t}{\sqrt{v_t} + d_t\, \epsilon}
            + \lambda p_{t-1}\right)

    Args:
        lr: :math:`\gamma \ge 0`, a factor of the rate: 1, or a schedule that ends at 0.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1).
        beta3: :math:`\beta_3` in [0, 1), the memory of the estimate; ``None`` for
            :math:`\sqrt{\beta_2}`.
        eps: :math:`\epsilon \ge 0`.
        estim_lr0: :math:`d_0 > 0`, the first estimate, well below the distance. The authors' code
            calls it ``d0``.
        estim_lr_coef: :math:`c \ge 0`, a factor of the estimates; there ``d_coef``.
        weight_decay: :math:`\lambda \ge 0`, decoupled. For the coupled one put
            :func:`torchopt.add_decayed_weights` before.
        safeguard_warmup: Leave the learning rate out of :math:`s`, for schedules that begin with
            a long warm-up: :math:`d_{t-1}` instead of :math:`\eta_t` there.
        use_bias_correction: The correction in :math:`\eta_t`, as in Optax. Without it (the paper,
            and the default of the authors' code) :math:`\eta_t = d_{t-1} \gamma`.
        maximize: Ascend instead of descend.
        use_accelerated_op: Fused kernels: ``None`` if available, ``True`` required,
            ``False`` never. Sums over all parameters have none.

    The estimate is one number for all parameters, whatever their groups and learning rates. A
    parameter that is trained from some later step on begins with that of the others. While all
    gradients have been zero, nothing moves, and the estimate stays.

    Slots: ``exp_avg``, ``exp_avg_sq``, ``grad_sum`` (:math:`s`), ``params0``, the first
    parameters, connected to them; and for each parameter the numbers ``numerator_weighted``, its
    part of :math:`r`, and ``estim_lr``, the common :math:`d`. What a meta-gradient reaches:
    everything, the estimate too; in steps in which it does not grow it passes the old one alone.

    Raises:
        ValueError: If a number is out of bounds, or ``update`` is called without ``params``.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.prodigy()
        >>> params = {"w": torch.tensor([3.0, -1.0])}
        >>> state = tx.init(params)
        >>> for _ in range(100):
        ...     grads = {"w": 2 * params["w"]}
        ...     params, state = tx.apply_gradients(grads, state, params)
        >>> bool(params["w"].norm() < 0.5), bool(0.5 < state.estim_lr["w"] < 5)
        (True, True)

    Reference:
        Mishchenko and Defazio, Prodigy: An expeditiously adaptive parameter-free learner, ICML
        2024, https://arxiv.org/abs/2306.06101.
    """
    step = StepByProdigy(
        lr,
        betas,
        beta3,
        eps,
        estim_lr0,
        estim_lr_coef,
        weight_decay,
        safeguard_warmup,
        use_bias_correction,
    )
    return accelerated(chain(flip_sign(maximize), step), use_accelerated_op)


class Prodigy(Optimizer):
    """:func:`torchopt.prodigy` as a ``torch.optim.Optimizer``."""

    @from_recipe(prodigy)
    def __init__(self, params: Any) -> None:
        """Take the parameters, then the arguments of :func:`torchopt.prodigy`."""


class MetaProdigy(MetaOptimizer):
    """:func:`torchopt.prodigy` as a differentiable optimizer of a network."""

    @meta_from_recipe(prodigy)
    def __init__(self, module: Any) -> None:
        """Take the network, then the arguments of :func:`torchopt.prodigy`."""
