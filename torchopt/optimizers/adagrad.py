"""Adagrad: divide by the root of the sum of all squared gradients."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torchopt.base.numerics import is_zero, over_root
from torchopt.core.accelerated_op import accelerated
from torchopt.core.chaining import chain
from torchopt.core.hyper import hyper
from torchopt.core.rules import ElementwiseTransformation
from torchopt.core.slots import Slot, filled
from torchopt.core.transform import GradientTransformation, transformation
from torchopt.optim.meta_optimizer import MetaOptimizer
from torchopt.optim.named import from_recipe, meta_from_recipe
from torchopt.optim.optimizer import Optimizer
from torchopt.transforms.basic import add_decayed_weights, flip_sign, scale_by_learning_rate
from torchopt.typing import Hyperparameter, Step


def _initial_sum(param: Tensor, *, initial_accumulator_value: Any, **_: Any) -> Tensor:
    return filled(param, initial_accumulator_value)


@transformation
class ScaleByRss(ElementwiseTransformation):
    """Divide by the root of the sum of squares; see :func:`scale_by_rss`."""

    initial_accumulator_value: Hyperparameter = hyper(0.0, ge=0)
    eps: Hyperparameter = hyper(1e-10, ge=0)

    slots = (Slot("sum", start=_initial_sum),)
    sparse_by_entry = True

    def rule(
        self,
        g: Tensor,
        p: Any,
        t: Step,
        slots: tuple,
        *,
        eps: Any,
        initial_accumulator_value: Any,
    ) -> tuple[Tensor, tuple]:
        """Return the gradient over the root of the sum of squares, this one's included."""
        (s,) = slots
        s = s + g * g
        return over_root(g, s, 1.0, eps), (s,)


@transformation
class DecayRate(ElementwiseTransformation):
    """Divide by a number that grows with the step count."""

    lr_decay: Hyperparameter = hyper(0.0, ge=0)

    uses_step = True
    accepts_sparse = True

    def rule(
        self, g: Tensor, p: Any, t: Step, slots: tuple, *, lr_decay: Any
    ) -> tuple[Tensor, tuple]:
        """Return ``g / (1 + t * lr_decay)``."""
        return (g if is_zero(lr_decay) else g * (1 / (1 + (t - 1) * lr_decay))), slots


def scale_by_rss(
    initial_accumulator_value: Hyperparameter = 0.0, eps: Hyperparameter = 1e-10
) -> GradientTransformation:
    r"""Divide by the root of the sum of all squared gradients.

    .. math::
        s_t = s_{t-1} + g_t^2, \qquad u_t = \frac{g_t}{\sqrt{s_t} + \epsilon}

    Optax's function of this name starts at 0.1 instead of 0, and takes
    :math:`1 / \sqrt{s_t + \epsilon}` with :math:`\epsilon = 10^{-7}`.

    Args:
        initial_accumulator_value: :math:`s_0 \ge 0`; read when a state begins.
        eps: :math:`\epsilon \ge 0`, outside the root.

    Slots: ``sum``. Differentiable in gradients, slots and every number; where the sum is exactly
    zero the derivative through its root is zero. Takes sparse gradients.

    Raises:
        ValueError: If a number is out of bounds.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.scale_by_rss(initial_accumulator_value=7.0)
        >>> g = [torch.tensor([3.0, -3.0])]
        >>> tx.update(g, tx.init(g))[0]
        [tensor([ 0.7500, -0.7500])]

    Reference:
        Duchi, Hazan and Singer, Adaptive subgradient methods for online learning and stochastic
        optimization, JMLR 2011, https://jmlr.org/papers/v12/duchi11a.html.
    """
    return ScaleByRss(initial_accumulator_value, eps)


def adagrad(
    lr: Hyperparameter = 1e-2,
    lr_decay: Hyperparameter = 0.0,
    weight_decay: Hyperparameter = 0.0,
    initial_accumulator_value: Hyperparameter = 0.0,
    eps: Hyperparameter = 1e-10,
    *,
    maximize: bool = False,
    use_accelerated_op: bool | None = None,
) -> GradientTransformation:
    r"""Adagrad: divide by the root of the sum of all squared gradients.

    .. math::
        g_t = \nabla f(p_{t-1}) + \lambda p_{t-1}, \qquad s_t = s_{t-1} + g_t^2, \\
        p_t = p_{t-1} - \frac{\eta}{1 + (t - 1)\, \delta} \cdot \frac{g_t}{\sqrt{s_t} + \epsilon}

    Optax's ``adagrad`` starts at :math:`s_0 = 0.1` and has :math:`\epsilon` inside the root.

    Args:
        lr: Learning rate :math:`\eta \ge 0`.
        lr_decay: :math:`\delta \ge 0`, how fast the learning rate falls.
        weight_decay: :math:`\lambda \ge 0`; needs ``params`` in ``update``.
        initial_accumulator_value: :math:`s_0 \ge 0`; read when a state begins. A parameter group
            may have its own, which in ``torch.optim.Adagrad`` is without effect.
        eps: :math:`\epsilon \ge 0`, outside the root.
        maximize: Ascend instead of descend.
        use_accelerated_op: Fused kernels: ``None`` if available, ``True`` required,
            ``False`` never.

    Slots: ``sum``. Differentiable in gradients, parameters, slots and every number. Takes sparse
    gradients, as ``torch.optim.Adagrad`` does, without weight decay: entries that have none stay.

    Raises:
        ValueError: If a number is out of bounds.
        RuntimeError: If ``use_accelerated_op=True`` cannot be met.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.adagrad(lr=0.1, initial_accumulator_value=12.0)
        >>> params = {"w": torch.tensor([1.0])}
        >>> updates, state = tx.update({"w": torch.tensor([2.0])}, tx.init(params), params)
        >>> torchopt.apply_updates(params, updates)
        {'w': tensor([0.9500])}

    Reference:
        Duchi, Hazan and Singer, JMLR 2011; ``torch.optim.Adagrad``.
    """
    tx = chain(
        flip_sign(maximize),
        add_decayed_weights(weight_decay),
        ScaleByRss(initial_accumulator_value, eps),
        DecayRate(lr_decay),
        scale_by_learning_rate(lr),
    )
    return accelerated(tx, use_accelerated_op)


class Adagrad(Optimizer):
    """:func:`torchopt.adagrad` as a ``torch.optim.Optimizer``.

    Its ``state_dict`` interchanges with that of ``torch.optim.Adagrad``. The state of a parameter
    begins with its first gradient, not in the constructor.
    """

    @from_recipe(adagrad)
    def __init__(self, params: Any) -> None:
        """Take the parameters, then the arguments of :func:`torchopt.adagrad`."""


class MetaAdagrad(MetaOptimizer):
    """:func:`torchopt.adagrad` as a differentiable optimizer of a network."""

    @meta_from_recipe(adagrad)
    def __init__(self, module: Any) -> None:
        """Take the network, then the arguments of :func:`torchopt.adagrad`."""
