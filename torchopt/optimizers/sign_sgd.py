"""Sign-SGD and Signum: steps of one size, by the sign of the gradient or of its average."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torchopt.base.numerics import moving_average
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
class ScaleBySign(ElementwiseTransformation):
    """Take the sign; see :func:`scale_by_sign`."""

    def rule(self, g: Tensor, p: Any, t: Step, slots: tuple) -> tuple[Tensor, tuple]:
        """Return the sign."""
        return g.sign(), slots


@transformation
class ScaleBySignum(ElementwiseTransformation):
    """Take the sign of a moving average, as :func:`signum` does."""

    momentum: Hyperparameter = hyper(0.9, ge=0, lt=1)

    slots = (Slot("momentum_buffer"),)

    def rule(
        self, g: Tensor, p: Any, t: Step, slots: tuple, *, momentum: Any
    ) -> tuple[Tensor, tuple]:
        """Return the sign of the new average, and the average."""
        b = moving_average(slots[0], g, momentum)
        return b.sign(), (b,)


def scale_by_sign() -> GradientTransformation:
    r"""Take the sign of each entry: :math:`u = \operatorname{sign}(g)`, 0 where it is 0.

    No slots. The update is a piecewise constant function of the gradient: its derivative is zero,
    at the jump too (where it has none). Of a complex number the signs of both parts are taken. The
    sign of ``nan`` is 0 in torch.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.scale_by_sign()
        >>> g = [torch.tensor([0.5, -2.0, 0.0])]
        >>> tx.update(g, tx.init(g))[0]
        [tensor([ 1., -1.,  0.])]

    Reference:
        Bernstein et al., signSGD: compressed optimisation for non-convex problems, ICML 2018,
        https://arxiv.org/abs/1802.04434; ``optax.scale_by_sign``.
    """
    return ScaleBySign()


def sign_sgd(
    lr: Hyperparameter = 1e-3,
    weight_decay: Hyperparameter = 0.0,
    *,
    mask: Any = None,
    maximize: bool = False,
    use_accelerated_op: bool | None = None,
) -> GradientTransformation:
    r"""Sign-SGD, with decoupled weight decay.

    .. math::
        p_t = p_{t-1} - \eta\, (\operatorname{sign}(g_t) + \lambda p_{t-1})

    Args:
        lr: Learning rate :math:`\eta \ge 0`, by which every entry moves.
        weight_decay: :math:`\lambda \ge 0`; needs ``params`` in ``update``. Optax has none here.
        mask: Which parameters decay; see :func:`torchopt.masked`. ``None`` means all.
        maximize: Ascend instead of descend.
        use_accelerated_op: Fused kernels: ``None`` if available, ``True`` required,
            ``False`` never.

    No slots.

    **What a meta-gradient reaches.** The sign is piecewise constant, so nothing flows through it:
    learning rates, weight decay and initial parameters are learned, the last ones by their
    first-order meta-gradient. The derivative by whatever acts through the inner gradient only is
    zero; see :func:`torchopt.lion`, of which the same is true.

    Raises:
        ValueError: If a number is out of bounds.
        RuntimeError: If ``use_accelerated_op=True`` cannot be met.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.sign_sgd(lr=0.1)
        >>> params = {"w": torch.tensor([1.0, -1.0])}
        >>> updates, state = tx.update({"w": torch.tensor([2.0, 0.1])}, tx.init(params), params)
        >>> torchopt.apply_updates(params, updates)
        {'w': tensor([ 0.9000, -1.1000])}

    Reference:
        Bernstein et al., signSGD: compressed optimisation for non-convex problems, ICML 2018,
        https://arxiv.org/abs/1802.04434; ``optax.sign_sgd``.
    """
    tx = chain(
        flip_sign(maximize),
        scale_by_sign(),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(lr),
    )
    return accelerated(tx, use_accelerated_op)


def signum(
    lr: Hyperparameter = 1e-3,
    momentum: Hyperparameter = 0.9,
    weight_decay: Hyperparameter = 0.0,
    *,
    mask: Any = None,
    maximize: bool = False,
    use_accelerated_op: bool | None = None,
) -> GradientTransformation:
    r"""Signum: the sign of the momentum, with decoupled weight decay.

    .. math::
        b_t = \mu\, b_{t-1} + (1 - \mu)\, g_t, \qquad
        p_t = p_{t-1} - \eta\, (\operatorname{sign}(b_t) + \lambda p_{t-1})

    Args:
        lr: Learning rate :math:`\eta \ge 0`, by which every entry moves.
        momentum: :math:`\mu` in [0, 1); ``beta`` in Optax.
        weight_decay: :math:`\lambda \ge 0`; needs ``params`` in ``update``. Optax has none here.
        mask: Which parameters decay; see :func:`torchopt.masked`. ``None`` means all.
        maximize: Ascend instead of descend.
        use_accelerated_op: Fused kernels: ``None`` if available, ``True`` required,
            ``False`` never.

    Slots: ``momentum_buffer``.

    **What a meta-gradient reaches.** As for :func:`torchopt.sign_sgd`: learning rates, weight decay
    and initial parameters. Nothing flows through the sign, so the derivative by ``momentum`` is
    zero, too; the buffer itself is differentiable in gradients and ``momentum``.

    Raises:
        ValueError: If a number is out of bounds.
        RuntimeError: If ``use_accelerated_op=True`` cannot be met.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.signum(lr=0.1)
        >>> params, state = [torch.tensor([1.0])], tx.init([torch.tensor([1.0])])
        >>> for g in (3.0, -0.2):
        ...     params, state = tx.apply_gradients([torch.tensor([g])], state, params)
        >>> params
        [tensor([0.8000])]

    Reference:
        Bernstein et al., ICML 2018, https://arxiv.org/abs/1802.04434; ``optax.signum``.
    """
    tx = chain(
        flip_sign(maximize),
        ScaleBySignum(momentum),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(lr),
    )
    return accelerated(tx, use_accelerated_op)


class SignSGD(Optimizer):
    """:func:`torchopt.sign_sgd` as a ``torch.optim.Optimizer``."""

    @from_recipe(sign_sgd)
    def __init__(self, params: Any) -> None:
        """Take the parameters, then the arguments of :func:`torchopt.sign_sgd`."""


class Signum(Optimizer):
    """:func:`torchopt.signum` as a ``torch.optim.Optimizer``."""

    @from_recipe(signum)
    def __init__(self, params: Any) -> None:
        """Take the parameters, then the arguments of :func:`torchopt.signum`."""


class MetaSignSGD(MetaOptimizer):
    """:func:`torchopt.sign_sgd` as a differentiable optimizer of a network."""

    @meta_from_recipe(sign_sgd)
    def __init__(self, module: Any) -> None:
        """Take the network, then the arguments of :func:`torchopt.sign_sgd`."""


class MetaSignum(MetaOptimizer):
    """:func:`torchopt.signum` as a differentiable optimizer of a network."""

    @meta_from_recipe(signum)
    def __init__(self, module: Any) -> None:
        """Take the network, then the arguments of :func:`torchopt.signum`."""
