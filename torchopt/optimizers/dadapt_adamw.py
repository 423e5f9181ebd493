"""D-Adaptation of AdamW: its learning rate is an estimate of the distance to the solution."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torchopt.base import misuse
from torchopt.base.numerics import is_zero, moving_average, moving_average_of_square, over_root
from torchopt.core.accelerated_op import accelerated
from torchopt.core.chaining import chain
from torchopt.core.hyper import flag, hyper
from torchopt.core.slots import Slot
from torchopt.core.transform import GradientTransformation, transformation
from torchopt.optim.meta_optimizer import MetaOptimizer
from torchopt.optim.named import from_recipe, meta_from_recipe
from torchopt.optim.optimizer import Optimizer
from torchopt.optimizers.distance import ESTIMATE, DistanceEstimating, corrected, of_number
from torchopt.transforms.basic import flip_sign
from torchopt.transforms.clip import whole_number
from torchopt.typing import Hyperparameter, Step


@transformation
class StepByDAdaptAdamW(DistanceEstimating):
    """The whole step of AdamW with D-Adaptation; see :func:`dadapt_adamw`."""

    lr: Hyperparameter = hyper(1.0, ge=0, scalar=True)
    betas: tuple[Hyperparameter, Hyperparameter] = hyper(
        (0.9, 0.999), ge=0, lt=1, length=2, scalar=True
    )
    eps: Hyperparameter = hyper(1e-8, gt=0)
    estim_lr0: Hyperparameter = hyper(1e-6, gt=0, scalar=True)
    weight_decay: Hyperparameter = hyper(0.0, ge=0)
    use_bias_correction: bool = flag(True)

    slots = (
        Slot("exp_avg"),
        Slot("exp_avg_sq"),
        Slot("grad_sum"),
        Slot("numerator_weighted", shape=of_number),
        ESTIMATE,
    )

    def common(
        self, d: Tensor, t: Step, *, lr: Any, betas: Any, use_bias_correction: bool, **_: Any
    ) -> Tensor:
        """Return the rate."""
        return corrected(d, t, lr, betas, use_bias_correction)

    def look(
        self, g: Tensor, p: Any, slots: tuple, common: Any, *, betas: Any, eps: Any, **_: Any
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """Return the moments, of steps and not of gradients, and what the estimate is made of."""
        m, v, s, numerator = slots
        b3 = betas[1] ** 0.5
        agreement = whole_number((g * over_root(s, v, 1.0, eps)).sum())
        numerator = b3 * numerator + (1 - b3) * common * agreement
        u = g * common
        m = moving_average(m, u, betas[0])
        v = moving_average_of_square(v, g, betas[1])
        s = moving_average(s, u, b3)
        return (m, v, s, numerator), numerator, (1 - b3) * whole_number(s.abs().sum())

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
        """Return Adam's update, in whose first moment the rate is already."""
        u = -over_root(slots[0], slots[1], 1.0, eps)
        if is_zero(weight_decay):
            return u
        return u - misuse.given_params("Weight decay", p) * (common * weight_decay)


def dadapt_adamw(
    lr: Hyperparameter = 1.0,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    estim_lr0: Hyperparameter = 1e-6,
    weight_decay: Hyperparameter = 0.0,
    use_bias_correction: bool = True,
    *,
    maximize: bool = False,
    use_accelerated_op: bool | None = None,
) -> GradientTransformation:
    r"""AdamW with D-Adaptation, which finds its learning rate by an estimate of the distance.

    With :math:`\eta_t = d_{t-1}\, \gamma \sqrt{1 - \beta_2^t} / (1 - \beta_1^t)`,
    :math:`\beta_3 = \sqrt{\beta_2}` and sums over all parameters

    .. math::
        r_t = \beta_3 r_{t-1} + (1 - \beta_3)\, \eta_t
            \left\langle g_t, \frac{s_{t-1}}{\sqrt{v_{t-1}} + \epsilon} \right\rangle, \\
        m_t = \beta_1 m_{t-1} + (1 - \beta_1)\, \eta_t g_t, \qquad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2)\, g_t^2, \qquad
        s_t = \beta_3 s_{t-1} + (1 - \beta_3)\, \eta_t g_t, \\
        d_t = \max\!\left(d_{t-1}, \frac{r_t}{(1 - \beta_3) \lVert s_t \rVert_1}\right), \qquad
        p_t = p_{t-1} - \frac{m_t}{\sqrt{v_t} + \epsilon} - \eta_t \lambda\, p_{t-1}

    Args:
        lr: :math:`\gamma \ge 0`, a factor of the rate: 1, or a schedule that ends at 0.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1).
        eps: :math:`\epsilon > 0`.
        estim_lr0: :math:`d_0 > 0`, the first estimate, well below the distance.
        weight_decay: :math:`\lambda \ge 0`, decoupled. For the coupled one, the default of the
            authors' code, put :func:`torchopt.add_decayed_weights` before.
        use_bias_correction: The correction in :math:`\eta_t`, as in Optax. Without it (the paper,
            and the default of the authors' code) :math:`\eta_t = d_{t-1} \gamma`.
        maximize: Ascend instead of descend.
        use_accelerated_op: Fused kernels: ``None`` if available, ``True`` required,
            ``False`` never. Sums over all parameters have none.

    The estimate is one number for all parameters, as :func:`torchopt.prodigy` says.

    Slots: ``exp_avg``, ``exp_avg_sq``, ``grad_sum`` (:math:`s`), and for each parameter the numbers
    ``numerator_weighted``, its part of :math:`r`, and ``estim_lr``, the common :math:`d`. What a
    meta-gradient reaches: everything, the estimate too; in steps in which it does not grow it
    passes the old one alone.

    Raises:
        ValueError: If a number is out of bounds, or ``update`` is called without ``params`` where
            there is weight decay.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.dadapt_adamw()
        >>> params = {"w": torch.tensor([3.0, -1.0])}
        >>> state = tx.init(params)
        >>> for _ in range(200):
        ...     grads = {"w": 2 * params["w"]}
        ...     params, state = tx.apply_gradients(grads, state, params)
        >>> bool(params["w"].norm() < 1), bool(0.3 < state.estim_lr["w"] < 5)
        (True, True)

    Reference:
        Defazio and Mishchenko, ICML 2023, https://arxiv.org/abs/2301.07733, algorithm 5.
    """
    step = StepByDAdaptAdamW(lr, betas, eps, estim_lr0, weight_decay, use_bias_correction)
    return accelerated(chain(flip_sign(maximize), step), use_accelerated_op)


class DAdaptAdamW(Optimizer):
    """:func:`torchopt.dadapt_adamw` as a ``torch.optim.Optimizer``."""

    @from_recipe(dadapt_adamw)
    def __init__(self, params: Any) -> None:
        """Take the parameters, then the arguments of :func:`torchopt.dadapt_adamw`."""


class MetaDAdaptAdamW(MetaOptimizer):
    """:func:`torchopt.dadapt_adamw` as a differentiable optimizer of a network."""

    @meta_from_recipe(dadapt_adamw)
    def __init__(self, module: Any) -> None:
        """Take the network, then the arguments of :func:`torchopt.dadapt_adamw`."""
