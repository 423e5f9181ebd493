"""ADOPT: Adam whose second moment does not know the gradient that it divides."""

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
    power,
    root,
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
from torchopt.transforms.basic import (
    CoupledDecay,
    flip_sign,
    scale_by_learning_rate,
)
from torchopt.typing import Hyperparameter, Step


@transformation
class ScaleByAdopt(ElementwiseTransformation):
    """Average gradients over the root of the moment before them; see :func:`scale_by_adopt`."""

    betas: tuple[Hyperparameter, Hyperparameter] = hyper((0.9, 0.9999), ge=0, lt=1, length=2)
    eps: Hyperparameter = hyper(1e-6, ge=0)
    use_clipping: bool = flag(True)
    clip_exponent: Hyperparameter = hyper(0.25, ge=0)

    slots = (Slot("exp_avg"), Slot("exp_avg_sq"))
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
        use_clipping: bool,
        clip_exponent: Any,
    ) -> tuple[Tensor, tuple]:
        """Return the momentum of scaled gradients; at the first step nothing but a start."""
        m, v = slots
        first = t == 1
        if not isinstance(first, Tensor) and first:
            nothing = g * 0.0  # in the graph, so that no step looks as if it had been detached
            return nothing, (m + nothing, v + g * g)
        # at the first step of a count that is a tensor, what is computed here is left out below
        known = torch.where(first, 1.0, v) if isinstance(first, Tensor) else v
        scaled = g / torch.clamp(root(known), min=eps)
        if use_clipping:
            bound = power(t - 1, clip_exponent)
            scaled = torch.clamp(scaled, -bound, bound)
        u = moving_average(m, scaled, betas[0])
        new_v = moving_average_of_square(v, g, betas[1])
        if isinstance(first, Tensor):
            return torch.where(first, 0.0, u), (
                torch.where(first, m, u),
                torch.where(first, v + g * g, new_v),
            )
        return u, (u, new_v)


@transformation
class DecoupledDecayAfterFirst(ElementwiseTransformation):
    """Add decayed parameters to the update, if the decay is decoupled; not to the first update."""

    weight_decay: Hyperparameter = hyper(0.0, ge=0, shared=True)
    decoupled_weight_decay: bool = flag(False, shared=True)

    uses_step = True

    def rule(
        self,
        g: Tensor,
        p: Any,
        t: Step,
        slots: tuple,
        *,
        weight_decay: Any,
        decoupled_weight_decay: bool,
    ) -> tuple[Tensor, tuple]:
        """Return ``g + weight_decay * p``, or ``g``."""
        if is_zero(weight_decay) or not decoupled_weight_decay:
            return g, slots
        p, first = misuse.given_params("Weight decay", p), t == 1
        if not isinstance(first, Tensor):
            return (g if first else add_scaled(g, p, weight_decay)), slots
        return torch.where(first, g, add_scaled(g, p, weight_decay)), slots


def scale_by_adopt(
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.9999),
    eps: Hyperparameter = 1e-6,
    use_clipping: bool = True,
    clip_exponent: Hyperparameter = 0.25,
) -> GradientTransformation:
    r"""Average gradients, each over the root of the second moment of those before it.

    .. math::
        v_1 = g_1^2, \quad m_1 = u_1 = 0; \qquad
        s_t = \frac{g_t}{\max(\sqrt{v_{t-1}}, \epsilon)} \text{ clipped to } \pm (t - 1)^\kappa, \\
        u_t = m_t = \beta_1 m_{t-1} + (1 - \beta_1) s_t, \qquad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2

    The first gradient only starts the second moment. The count in the bound is 1 at the second
    step, the first that moves, as in the authors' code and in Optax.

    Args:
        betas: Decay rates :math:`(\beta_1, \beta_2)`, each in [0, 1).
        eps: :math:`\epsilon \ge 0`, the least root that is divided by.
        use_clipping: Clip the scaled gradients; ``False`` is the first version of the paper.
        clip_exponent: :math:`\kappa \ge 0`.

    Slots: ``exp_avg``, ``exp_avg_sq``. Differentiable in gradients, slots and every number, but
    where an entry is clipped, which passes no derivative but to :math:`\kappa`; where a second
    moment is exactly zero the derivative through its root is zero.

    Raises:
        ValueError: If a number is out of bounds.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.scale_by_adopt()
        >>> g = [torch.tensor([0.5, -2.0])]
        >>> updates, state = tx.update(g, tx.init(g), inplace=False)
        >>> updates[0].abs(), tx.update(g, state)[0]
        (tensor([0., 0.]), [tensor([ 0.1000, -0.1000])])

    Reference:
        Taniguchi et al., ADOPT: modified Adam can converge with any beta2 with the optimal rate,
        NeurIPS 2024, https://arxiv.org/abs/2411.02853; https://github.com/iShohei220/adopt.
    """
    return ScaleByAdopt(betas, eps, use_clipping, clip_exponent)


def adopt(
    lr: Hyperparameter = 1e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.9999),
    eps: Hyperparameter = 1e-6,
    weight_decay: Hyperparameter = 0.0,
    decoupled_weight_decay: bool = False,
    use_clipping: bool = True,
    clip_exponent: Hyperparameter = 0.25,
    *,
    maximize: bool = False,
    use_accelerated_op: bool | None = None,
) -> GradientTransformation:
    r"""ADOPT: Adam that converges with any decay rate of the second moment.

    .. math::
        g_t = \nabla f(p_{t-1}) + \lambda p_{t-1}, \qquad
        v_1 = g_1^2, \quad m_1 = 0, \quad p_1 = p_0; \\
        s_t = \frac{g_t}{\max(\sqrt{v_{t-1}}, \epsilon)} \text{ clipped to } \pm (t - 1)^\kappa,
        \qquad m_t = \beta_1 m_{t-1} + (1 - \beta_1) s_t, \\
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, \qquad
        p_t = p_{t-1} - \eta\, m_t

    The first step moves nothing: it only starts the second moment. With ``decoupled_weight_decay``
    the decay does not pass through the moments:
    :math:`p_t = p_{t-1} - \eta\, (m_t + \lambda p_{t-1})` from the second step on. Without learning
    rate and decay it is :func:`torchopt.scale_by_adopt`.

    Args:
        lr: Learning rate :math:`\eta \ge 0`.
        betas: Decay rates :math:`(\beta_1, \beta_2)` of the two moments, each in [0, 1).
        eps: :math:`\epsilon \ge 0`, the least root that is divided by.
        weight_decay: :math:`\lambda \ge 0`; needs ``params`` in ``update``. (Optax has none.)
        decoupled_weight_decay: Decay as AdamW does. The authors' ``decouple``.
        use_clipping: Clip scaled gradients to :math:`\pm (t - 1)^\kappa`.
        clip_exponent: :math:`\kappa \ge 0`; for other bounds than powers the authors and Optax
            take a function, ``clip_lambda`` and ``clip_value_fn``.
        maximize: Ascend instead of descend.
        use_accelerated_op: Fused kernels: ``None`` if available, ``True`` required,
            ``False`` never.

    Slots: ``exp_avg``, ``exp_avg_sq``. Differentiable in gradients, parameters, slots and every
    number.

    **What a meta-gradient reaches.** The first step moves nothing: of its gradient only the second
    moment knows. An entry that is clipped passes a derivative to ``clip_exponent`` alone, and an
    ``eps`` below the roots has none.

    Raises:
        ValueError: If a number is out of bounds.
        RuntimeError: If ``use_accelerated_op=True`` cannot be met.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.adopt(lr=0.1)
        >>> params = {"w": torch.tensor([1.0])}
        >>> state = tx.init(params)
        >>> for _ in range(2):
        ...     params, state = tx.apply_gradients({"w": torch.tensor([2.0])}, state, params)
        >>> params
        {'w': tensor([0.9900])}

    Reference:
        Taniguchi et al., NeurIPS 2024, https://arxiv.org/abs/2411.02853.
    """
    tx = chain(
        flip_sign(maximize),
        CoupledDecay(weight_decay, decoupled_weight_decay),
        scale_by_adopt(betas, eps, use_clipping, clip_exponent),
        DecoupledDecayAfterFirst(weight_decay, decoupled_weight_decay),
        scale_by_learning_rate(lr),
    )
    return accelerated(tx, use_accelerated_op)


class ADOPT(Optimizer):
    """:func:`torchopt.adopt` as a ``torch.optim.Optimizer``."""

    @from_recipe(adopt)
    def __init__(self, params: Any) -> None:
        """Take the parameters, then the arguments of :func:`torchopt.adopt`."""


class MetaADOPT(MetaOptimizer):
    """:func:`torchopt.adopt` as a differentiable optimizer of a network."""

    @meta_from_recipe(adopt)
    def __init__(self, module: Any) -> None:
        """Take the network, then the arguments of :func:`torchopt.adopt`."""
