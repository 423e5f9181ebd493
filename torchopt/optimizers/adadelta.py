"""Adadelta: a running root mean square of updates over that of gradients."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torchopt.base.numerics import moving_average_of_square, root
from torchopt.core.accelerated_op import accelerated
from torchopt.core.chaining import chain
from torchopt.core.hyper import hyper
from torchopt.core.recipe import ignoring_moment_requires_grad
from torchopt.core.rules import ElementwiseTransformation
from torchopt.core.slots import Slot
from torchopt.core.transform import GradientTransformation, transformation
from torchopt.optim.meta_optimizer import MetaOptimizer
from torchopt.optim.named import from_recipe, meta_from_recipe
from torchopt.optim.optimizer import Optimizer
from torchopt.transforms.basic import add_decayed_weights, flip_sign, scale_by_learning_rate
from torchopt.typing import Hyperparameter, Step


@transformation
class ScaleByAdadelta(ElementwiseTransformation):
    """Scale by the ratio of two running root mean squares; see :func:`scale_by_adadelta`."""

    rho: Hyperparameter = hyper(0.9, ge=0, le=1)
    eps: Hyperparameter = hyper(1e-6, ge=0)

    slots = (Slot("square_avg"), Slot("acc_delta"))

    def rule(
        self, g: Tensor, p: Any, t: Step, slots: tuple, *, rho: Any, eps: Any
    ) -> tuple[Tensor, tuple]:
        """Return the gradient times the root of earlier updates over that of gradients."""
        v, d = slots
        v = moving_average_of_square(v, g, rho)
        u = root(d + eps) / root(v + eps) * g
        return u, (v, moving_average_of_square(d, u, rho))


@ignoring_moment_requires_grad
def scale_by_adadelta(
    rho: Hyperparameter = 0.9, eps: Hyperparameter = 1e-6
) -> GradientTransformation:
    r"""Scale by a running root mean square of the updates over that of the gradients.

    .. math::
        v_t = \rho v_{t-1} + (1 - \rho) g_t^2, \qquad
        u_t = \sqrt{\frac{d_{t-1} + \epsilon}{v_t + \epsilon}}\; g_t, \qquad
        d_t = \rho d_{t-1} + (1 - \rho) u_t^2

    Args:
        rho: Decay rate :math:`\rho` in [0, 1].
        eps: :math:`\epsilon \ge 0`, inside both roots. Updates grow from it, and with 0 never do.

    Slots: ``square_avg`` (:math:`v`), ``acc_delta`` (:math:`d`, of updates before the learning
    rate). Differentiable in gradients, slots and every number; with :math:`\epsilon = 0` the
    derivative through a root of zero is zero.

    Raises:
        ValueError: If a number is out of bounds.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.scale_by_adadelta(rho=0.75, eps=1.0)
        >>> g = [torch.tensor([0.0, -2.0])]
        >>> tx.update(g, tx.init(g))[0]
        [tensor([ 0.0000, -1.4142])]

    Reference:
        Zeiler, Adadelta: an adaptive learning rate method, 2012, https://arxiv.org/abs/1212.5701;
        ``torch.optim.Adadelta``.
    """
    return ScaleByAdadelta(rho, eps)


@ignoring_moment_requires_grad
def adadelta(
    lr: Hyperparameter = 1.0,
    rho: Hyperparameter = 0.9,
    eps: Hyperparameter = 1e-6,
    weight_decay: Hyperparameter = 0.0,
    *,
    maximize: bool = False,
    use_accelerated_op: bool | None = None,
) -> GradientTransformation:
    r"""Adadelta: a running root mean square of updates over that of gradients.

    .. math::
        g_t = \nabla f(p_{t-1}) + \lambda p_{t-1}, \qquad
        v_t = \rho v_{t-1} + (1 - \rho) g_t^2, \\
        u_t = \sqrt{\frac{d_{t-1} + \epsilon}{v_t + \epsilon}}\; g_t, \qquad
        d_t = \rho d_{t-1} + (1 - \rho) u_t^2, \qquad
        p_t = p_{t-1} - \eta\, u_t

    :math:`u_t` is :func:`torchopt.scale_by_adadelta`. The function of this name in TorchOpt 0.7.3
    had the default ``lr=1e-3``; its classes had torch's default, as everything here does.

    Args:
        lr: Learning rate :math:`\eta \ge 0`.
        rho: Decay rate :math:`\rho` of both averages, in [0, 1].
        eps: :math:`\epsilon \ge 0`, added inside both roots.
        weight_decay: :math:`\lambda \ge 0`; needs ``params`` in ``update``.
        maximize: Ascend instead of descend.
        use_accelerated_op: Fused kernels: ``None`` if available, ``True`` required,
            ``False`` never.

    Slots: ``square_avg``, ``acc_delta``. Differentiable in gradients, parameters, slots and every
    number.

    Raises:
        ValueError: If a number is out of bounds.
        RuntimeError: If ``use_accelerated_op=True`` cannot be met.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.adadelta(lr=0.5, rho=0.75, eps=1.0)
        >>> params = {"w": torch.tensor([1.0])}
        >>> updates, state = tx.update({"w": torch.tensor([2.0])}, tx.init(params), params)
        >>> torchopt.apply_updates(params, updates)
        {'w': tensor([0.2929])}

    Reference:
        Zeiler, 2012, https://arxiv.org/abs/1212.5701; ``torch.optim.Adadelta``.
    """
    tx = chain(
        flip_sign(maximize),
        add_decayed_weights(weight_decay),
        scale_by_adadelta(rho, eps),
        scale_by_learning_rate(lr),
    )
    return accelerated(tx, use_accelerated_op)


class Adadelta(Optimizer):
    """:func:`torchopt.adadelta` as a ``torch.optim.Optimizer``.

    Its ``state_dict`` interchanges with that of ``torch.optim.Adadelta``.
    """

    counts_steps = True  # torch.optim.Adadelta keeps a count that its rule does not read

    @from_recipe(adadelta)
    def __init__(self, params: Any) -> None:
        """Take the parameters, then the arguments of :func:`torchopt.adadelta`."""


class MetaAdadelta(MetaOptimizer):
    """:func:`torchopt.adadelta` as a differentiable optimizer of a network."""

    @meta_from_recipe(adadelta)
    def __init__(self, module: Any) -> None:
        """Take the network, then the arguments of :func:`torchopt.adadelta`."""
