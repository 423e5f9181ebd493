"""RMSprop: divide by a running root mean square."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchopt.base.numerics import moving_average, moving_average_of_square, over_root
from torchopt.core.accelerated_op import accelerated
from torchopt.core.chaining import chain
from torchopt.core.hyper import HyperSpec, check_number, flag, hyper
from torchopt.core.rules import ElementwiseTransformation
from torchopt.core.slots import Slot
from torchopt.core.transform import GradientTransformation, transformation
from torchopt.optim.meta_optimizer import MetaOptimizer
from torchopt.optim.named import from_recipe, meta_from_recipe
from torchopt.optim.optimizer import Optimizer
from torchopt.transforms.basic import add_decayed_weights, flip_sign, scale_by_learning_rate
from torchopt.transforms.momentum import trace
from torchopt.typing import Hyperparameter, Step


@transformation
class ScaleByRms(ElementwiseTransformation):
    """Divide by a running root mean square; see :func:`scale_by_rms`."""

    alpha: Hyperparameter = hyper(0.99, ge=0, lt=1)
    eps: Hyperparameter = hyper(1e-8, ge=0)
    centered: bool = flag(False)
    initial_scale: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("initial_scale", self.initial_scale, HyperSpec(ge=0))

    @property
    def slots(self) -> tuple[Slot, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The second moment, which starts at ``initial_scale``, and the mean if ``centered``."""
        return Slot("square_avg", start=self.initial_scale), Slot("grad_avg", when="centered")

    def rule(
        self,
        g: Tensor,
        p: Any,
        t: Step,
        slots: tuple,
        *,
        alpha: Any,
        eps: Any,
        centered: bool,
    ) -> tuple[Tensor, tuple]:
        """Return the gradient over the root of its second moment, or of its variance."""
        v, a = slots
        v = moving_average_of_square(v, g, alpha)
        if not centered:
            return over_root(g, v, 1.0, eps), (v, a)
        a = moving_average(torch.zeros_like(g) if a is None else a, g, alpha)
        # rounding may leave a variance of zero slightly negative
        return over_root(g, torch.relu(v - a.square()), 1.0, eps), (v, a)


def scale_by_rms(
    alpha: Hyperparameter = 0.99, eps: Hyperparameter = 1e-8, initial_scale: float = 0.0
) -> GradientTransformation:
    r"""Divide by a running root mean square of the gradient.

    .. math::
        v_t = \alpha v_{t-1} + (1 - \alpha) g_t^2, \qquad u_t = \frac{g_t}{\sqrt{v_t} + \epsilon}

    Optax's ``scale_by_rms`` has ``decay`` for :math:`\alpha`, 0.9 by default, and
    :math:`\epsilon` inside the root unless it is given ``eps_in_sqrt=False``.

    Args:
        alpha: Decay rate :math:`\alpha` in [0, 1).
        eps: :math:`\epsilon \ge 0`, outside the root.
        initial_scale: Initial value of :math:`v`.

    Slots: ``square_avg``. Differentiable in gradients, slots and every number; where a second
    moment is exactly zero the derivative through its root is zero.

    Raises:
        ValueError: If a number is out of bounds.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.scale_by_rms(alpha=0.75)
        >>> g = [torch.tensor([0.1, -3.0])]
        >>> tx.update(g, tx.init(g))[0]
        [tensor([ 2.0000, -2.0000])]

    Reference:
        Tieleman and Hinton, Lecture 6.5 of Neural Networks for Machine Learning, 2012;
        ``torch.optim.RMSprop``.
    """
    return ScaleByRms(alpha, eps, False, initial_scale)


def scale_by_stddev(
    alpha: Hyperparameter = 0.99, eps: Hyperparameter = 1e-8, initial_scale: float = 0.0
) -> GradientTransformation:
    r"""Divide by a running standard deviation of the gradient (centered RMSprop).

    .. math::
        v_t = \alpha v_{t-1} + (1 - \alpha) g_t^2, \qquad
        a_t = \alpha a_{t-1} + (1 - \alpha) g_t, \qquad
        u_t = \frac{g_t}{\sqrt{v_t - a_t^2} + \epsilon}

    Optax's ``scale_by_stddev`` has ``decay`` for :math:`\alpha`, 0.9 by default, and
    :math:`\epsilon` inside the root unless it is given ``eps_in_sqrt=False``.

    Args:
        alpha: Decay rate :math:`\alpha` in [0, 1).
        eps: :math:`\epsilon \ge 0`, outside the root.
        initial_scale: Initial value of :math:`v`.

    Slots: ``square_avg``, ``grad_avg``. Differentiable in gradients, slots and every number; where
    a variance is exactly zero the derivative through its root is zero.

    Raises:
        ValueError: If a number is out of bounds.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.scale_by_stddev(alpha=0.5)
        >>> g = [torch.tensor([0.1, -3.0])]
        >>> tx.update(g, tx.init(g))[0]
        [tensor([ 2.0000, -2.0000])]

    Reference:
        Graves, Generating sequences with recurrent neural networks, 2013,
        https://arxiv.org/abs/1308.0850; ``torch.optim.RMSprop``.
    """
    return ScaleByRms(alpha, eps, True, initial_scale)


def rmsprop(
    lr: Hyperparameter = 1e-2,
    alpha: Hyperparameter = 0.99,
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0.0,
    momentum: Hyperparameter = 0.0,
    centered: bool = False,
    *,
    initial_scale: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    use_accelerated_op: bool | None = None,
) -> GradientTransformation:
    r"""RMSprop, with momentum and L2 weight decay.

    .. math::
        g_t = \nabla f(p_{t-1}) + \lambda p_{t-1}, \qquad
        v_t = \alpha v_{t-1} + (1 - \alpha) g_t^2, \\
        b_t = \mu b_{t-1} + \frac{g_t}{\sqrt{v_t} + \epsilon}, \qquad
        p_t = p_{t-1} - \eta\, b_t

    If ``centered``, :math:`v_t - a_t^2` is under the root, with
    :math:`a_t = \alpha a_{t-1} + (1 - \alpha) g_t`. With ``nesterov`` the step is the quotient plus
    :math:`\mu b_t`. The quotient is :func:`torchopt.scale_by_rms` or
    :func:`torchopt.scale_by_stddev`.

    Optax's ``rmsprop`` has ``decay=0.9`` for ``alpha``, and ``eps`` inside the root unless it is
    given ``eps_in_sqrt=False``.

    Args:
        lr: Learning rate :math:`\eta \ge 0`.
        alpha: Decay rate :math:`\alpha` of the second moment, in [0, 1).
        eps: :math:`\epsilon \ge 0`, added to the root.
        weight_decay: :math:`\lambda \ge 0`; needs ``params`` in ``update``.
        momentum: :math:`\mu \ge 0`.
        centered: Divide by the standard deviation instead of the root mean square.
        initial_scale: Initial value of the second moment :math:`v`.
        nesterov: Use Nesterov momentum; needs ``momentum > 0``.
        maximize: Ascend instead of descend.
        use_accelerated_op: Fused kernels: ``None`` if available, ``True`` required,
            ``False`` never.

    Slots: ``square_avg``; ``grad_avg`` if centered; ``momentum_buffer`` if the momentum is not the
    number 0. Differentiable in gradients, parameters, slots and every number.

    Raises:
        ValueError: If a number is out of bounds.
        RuntimeError: If ``use_accelerated_op=True`` cannot be met.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.rmsprop(lr=0.1, alpha=0.75)
        >>> params = {"w": torch.tensor([1.0])}
        >>> updates, state = tx.update({"w": torch.tensor([2.0])}, tx.init(params), params)
        >>> torchopt.apply_updates(params, updates)
        {'w': tensor([0.8000])}

    Reference:
        Tieleman and Hinton, 2012; ``torch.optim.RMSprop``.
    """
    tx = chain(
        flip_sign(maximize),
        add_decayed_weights(weight_decay),
        ScaleByRms(alpha, eps, centered, initial_scale),
        trace(momentum, 0.0, nesterov),
        scale_by_learning_rate(lr),
    )
    return accelerated(tx, use_accelerated_op)


class RMSprop(Optimizer):
    """:func:`torchopt.rmsprop` as a ``torch.optim.Optimizer``.

    Its ``state_dict`` interchanges with that of ``torch.optim.RMSprop``.
    """

    optional_hyperparameters = frozenset({"dampening", "nesterov"})
    former_defaults = {"momentum": 0.0, "centered": False, "maximize": False}
    counts_steps = True  # torch.optim.RMSprop keeps a count that its rule does not read

    @from_recipe(rmsprop)
    def __init__(self, params: Any) -> None:
        """Take the parameters, then the arguments of :func:`torchopt.rmsprop`."""


class MetaRMSprop(MetaOptimizer):
    """:func:`torchopt.rmsprop` as a differentiable optimizer of a network."""

    @meta_from_recipe(rmsprop)
    def __init__(self, module: Any) -> None:
        """Take the network, then the arguments of :func:`torchopt.rmsprop`."""
