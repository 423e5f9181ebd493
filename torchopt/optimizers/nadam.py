"""NAdam: Adam with Nesterov momentum."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torchopt.base.numerics import moving_average, moving_average_of_square, over_root, power
from torchopt.core.accelerated_op import accelerated
from torchopt.core.chaining import chain
from torchopt.core.hyper import hyper
from torchopt.core.rules import ElementwiseTransformation
from torchopt.core.slots import Counter, Slot
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
class ScaleByNAdam(ElementwiseTransformation):
    """Scale by moments with Nesterov's look ahead; see :func:`scale_by_nadam`."""

    betas: tuple[Hyperparameter, Hyperparameter] = hyper((0.9, 0.999), ge=0, lt=1, length=2)
    eps: Hyperparameter = hyper(1e-8, ge=0)
    momentum_decay: Hyperparameter = hyper(4e-3, ge=0)

    slots = (Slot("exp_avg"), Slot("exp_avg_sq"))
    counters = (Counter("mu_product", start=1.0),)
    uses_step = True

    def count(
        self, t: Step, *, mu_product: Any, betas: tuple[Any, Any], momentum_decay: Any, **_: Any
    ) -> dict[str, Any]:
        """Return the product of the momenta up to this step."""
        return {"mu_product": mu_product * _momentum(betas[0], momentum_decay, t)}

    def rule(
        self,
        g: Tensor,
        p: Any,
        t: Step,
        slots: tuple,
        *,
        betas: tuple[Any, Any],
        eps: Any,
        momentum_decay: Any,
        mu_product: Any,
    ) -> tuple[Tensor, tuple]:
        """Return gradient and next first moment, bias-corrected, over the root of the second."""
        b1, b2 = betas
        m, v = slots
        m = moving_average(m, g, b1)
        v = moving_average_of_square(v, g, b2)
        mu, mu_next = (_momentum(b1, momentum_decay, n) for n in (t, t + 1))
        ahead = g * ((1 - mu) / (1 - mu_product)) + m * (mu_next / (1 - mu_product * mu_next))
        return over_root(ahead, v, 1 / (1 - power(b2, t)) ** 0.5, eps), (m, v)


def _momentum(b1: Any, decay: Any, t: Any) -> Any:
    """Return the momentum of step ``t``, which grows from half of its limit to it."""
    return b1 * (1 - 0.5 * power(0.96, t * decay))


def scale_by_nadam(
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    momentum_decay: Hyperparameter = 4e-3,
) -> GradientTransformation:
    r"""Scale as Adam does, looking ahead to the momentum of the next step.

    .. math::
        \mu_t = \beta_1 \left(1 - \tfrac12\, 0.96^{t \psi}\right), \qquad
        P_t = \prod_{i=1}^t \mu_i, \\
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, \\
        u_t = \left( \frac{1 - \mu_t}{1 - P_t}\, g_t
            + \frac{\mu_{t+1}}{1 - P_t\, \mu_{t+1}}\, m_t \right)
            \bigg/ \left( \sqrt{v_t / (1 - \beta_2^t)} + \epsilon \right)

    Optax's ``scale_by_adam(nesterov=True)`` has the constant :math:`\mu_t = \beta_1` in its place:
    :math:`\psi \to \infty`.

    Args:
        betas: Decay rates :math:`(\beta_1, \beta_2)`, each in [0, 1).
        eps: :math:`\epsilon \ge 0`, outside the root.
        momentum_decay: :math:`\psi \ge 0`, how fast the momentum grows.

    Slots: ``exp_avg``, ``exp_avg_sq``, and the number ``mu_product`` (:math:`P_t`). Differentiable
    in gradients, slots and every number; where a second moment is exactly zero the derivative
    through its root is zero.

    Raises:
        ValueError: If a number is out of bounds.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.scale_by_nadam()
        >>> g = [torch.tensor([0.5, -2.0])]
        >>> tx.update(g, tx.init(g))[0]
        [tensor([ 1.0565, -1.0565])]

    Reference:
        Dozat, Incorporating Nesterov momentum into Adam, ICLR 2016 workshop,
        https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ; ``torch.optim.NAdam``.
    """
    return ScaleByNAdam(betas, eps, momentum_decay)


def nadam(
    lr: Hyperparameter = 2e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0.0,
    momentum_decay: Hyperparameter = 4e-3,
    decoupled_weight_decay: bool = False,
    *,
    maximize: bool = False,
    use_accelerated_op: bool | None = None,
) -> GradientTransformation:
    r"""NAdam: Adam with Nesterov momentum.

    .. math::
        g_t = \nabla f(p_{t-1}) + \lambda p_{t-1}, \qquad
        \mu_t = \beta_1 \left(1 - \tfrac12\, 0.96^{t \psi}\right), \qquad
        P_t = \prod_{i=1}^t \mu_i, \\
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, \\
        u_t = \left( \frac{1 - \mu_t}{1 - P_t}\, g_t
            + \frac{\mu_{t+1}}{1 - P_t\, \mu_{t+1}}\, m_t \right)
            \bigg/ \left( \sqrt{v_t / (1 - \beta_2^t)} + \epsilon \right), \qquad
        p_t = p_{t-1} - \eta\, u_t

    :math:`u_t` is :func:`torchopt.scale_by_nadam`. With ``decoupled_weight_decay`` the decay does
    not pass through the moments: :math:`p_t = p_{t-1} - \eta\, (u_t + \lambda p_{t-1})`.

    Args:
        lr: Learning rate :math:`\eta \ge 0`.
        betas: Decay rates :math:`(\beta_1, \beta_2)` of the two moments, each in [0, 1).
        eps: :math:`\epsilon \ge 0`, added to the root.
        weight_decay: :math:`\lambda \ge 0`; needs ``params`` in ``update``.
        momentum_decay: :math:`\psi \ge 0`, how fast the momentum grows.
        decoupled_weight_decay: Decay as AdamW does.
        maximize: Ascend instead of descend.
        use_accelerated_op: Fused kernels: ``None`` if available, ``True`` required,
            ``False`` never.

    Optax's ``nadam`` has no ``momentum_decay``: its momentum is constant, as it is here in the
    limit of a large one (``1e9``); its ``nadamw`` is ``decoupled_weight_decay``.

    Slots: ``exp_avg``, ``exp_avg_sq``, and the number ``mu_product``. Differentiable in gradients,
    parameters, slots and every number.

    Raises:
        ValueError: If a number is out of bounds.
        RuntimeError: If ``use_accelerated_op=True`` cannot be met.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.nadam(lr=0.1)
        >>> params = {"w": torch.tensor([1.0])}
        >>> updates, state = tx.update({"w": torch.tensor([2.0])}, tx.init(params), params)
        >>> torchopt.apply_updates(params, updates)
        {'w': tensor([0.8944])}

    Reference:
        Dozat, ICLR 2016 workshop; ``torch.optim.NAdam``.
    """
    tx = chain(
        flip_sign(maximize),
        CoupledDecay(weight_decay, decoupled_weight_decay),
        scale_by_nadam(betas, eps, momentum_decay),
        DecoupledDecay(weight_decay, decoupled_weight_decay),
        scale_by_learning_rate(lr),
    )
    return accelerated(tx, use_accelerated_op)


class NAdam(Optimizer):
    """:func:`torchopt.nadam` as a ``torch.optim.Optimizer``.

    Its ``state_dict`` interchanges with that of ``torch.optim.NAdam``.
    """

    former_defaults = {"decoupled_weight_decay": False, "maximize": False}

    @from_recipe(nadam)
    def __init__(self, params: Any) -> None:
        """Take the parameters, then the arguments of :func:`torchopt.nadam`."""


class MetaNAdam(MetaOptimizer):
    """:func:`torchopt.nadam` as a differentiable optimizer of a network."""

    @meta_from_recipe(nadam)
    def __init__(self, module: Any) -> None:
        """Take the network, then the arguments of :func:`torchopt.nadam`."""
