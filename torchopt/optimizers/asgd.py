"""ASGD: averaged stochastic gradient descent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchopt.base import misuse
from torchopt.base.numerics import add_scaled, as_wide, is_zero, power
from torchopt.core.accelerated_op import accelerated
from torchopt.core.chaining import chain
from torchopt.core.hyper import hyper
from torchopt.core.rules import ElementwiseTransformation
from torchopt.core.slots import PARAM, Counter, Slot
from torchopt.core.transform import GradientTransformation, transformation
from torchopt.optim.meta_optimizer import MetaOptimizer
from torchopt.optim.named import from_recipe, meta_from_recipe
from torchopt.optim.optimizer import Optimizer
from torchopt.transforms.basic import add_decayed_weights, flip_sign
from torchopt.typing import Hyperparameter, Step


@transformation
class StepByASGD(ElementwiseTransformation):
    """The whole step of averaged SGD; see :func:`asgd`."""

    lr: Hyperparameter = hyper(1e-2, ge=0)
    lambd: Hyperparameter = hyper(1e-4, ge=0)
    alpha: Hyperparameter = hyper(0.75, ge=0)
    t0: Hyperparameter = hyper(1e6, ge=0)

    slots = (Slot("ax", start=PARAM),)
    counters = (Counter("eta", 0.0, ahead=True), Counter("mu", 1.0, ahead=True))
    evaluates = True

    def count(self, t: Step, *, lr: Any, lambd: Any, alpha: Any, t0: Any, **_: Any) -> dict:
        """Return rate and weight of the next step: it takes those that this one leaves."""
        elapsed = t - t0
        late = elapsed.clamp(min=1.0) if isinstance(elapsed, Tensor) else max(elapsed, 1.0)
        return {"eta": lr / power(1 + lambd * lr * t, alpha), "mu": 1 / late}

    def rule(
        self,
        g: Tensor,
        p: Any,
        t: Step,
        slots: tuple,
        *,
        lr: Any,
        lambd: Any,
        eta: Any,
        mu: Any,
        **_: Any,
    ) -> tuple[Tensor, tuple]:
        """Return the decayed step and the average of the parameters after it."""
        p = misuse.given_params(type(self).__name__, p)
        u = (g if is_zero(lambd) else add_scaled(g, p, lambd)) * -_rate(t, lr, eta)
        return u, (_weighted(slots[0], p + u, mu),)

    def to_eval(self, p: Tensor, slots: tuple, **_: Any) -> Tensor:
        """Return the average."""
        return slots[0]

    def to_train(self, p: Tensor, slots: tuple, **_: Any) -> Tensor:
        """Refuse: an average does not tell what it is one of."""
        raise RuntimeError(
            "The state has no 'trained' weights, which optimizer.eval() puts there, and ASGD's "
            "average does not lead back to them: load weights saved after optimizer.train()."
        )


def _rate(t: Step, lr: Any, eta: Any) -> Any:
    """Return the rate that the last step left; before the first there is none."""
    if isinstance(t, Tensor):
        return torch.where(t == 1, lr, eta + 0 * t)  # two numbers would make a float32
    return lr if t == 1 else eta


def _weighted(ax: Tensor, p: Tensor, mu: Any) -> Tensor:
    """Return ``(1 - mu) * ax + mu * p``, which is ``p`` for a weight of 1."""
    if isinstance(mu, Tensor):
        return (1 - mu) * ax + mu * p
    return torch.lerp(as_wide(ax, p), p, mu)


def asgd(
    lr: Hyperparameter = 1e-2,
    lambd: Hyperparameter = 1e-4,
    alpha: Hyperparameter = 0.75,
    t0: Hyperparameter = 1e6,
    weight_decay: Hyperparameter = 0.0,
    *,
    maximize: bool = False,
    use_accelerated_op: bool | None = None,
) -> GradientTransformation:
    r"""Averaged stochastic gradient descent.

    .. math::
        g_t = \nabla f(p_{t-1}) + \omega p_{t-1}, \qquad
        p_t = (1 - \lambda \eta_{t-1})\, p_{t-1} - \eta_{t-1} g_t, \\
        \bar p_t = \bar p_{t-1} + \mu_{t-1} (p_t - \bar p_{t-1}), \\
        \eta_t = \frac{\eta}{(1 + \lambda \eta\, t)^\alpha}, \quad \eta_0 = \eta, \qquad
        \mu_t = \frac{1}{\max(1, t - t_0)}, \quad \mu_0 = 1

    Up to the step after :math:`t_0` the average :math:`\bar p` is the parameter itself. As in
    ``torch.optim`` a step takes the rate that the step before it has left, so that another ``lr``,
    as of a scheduler, acts one step late. To evaluate the average take
    ``tx.eval_params(state, params)``, ``optimizer.eval()`` and ``optimizer.train()``, or
    ``inner.eval_params()``. (Optax has no ASGD.)

    Args:
        lr: Learning rate :math:`\eta \ge 0`.
        lambd: :math:`\lambda \ge 0`, how fast weights and learning rate decay.
        alpha: :math:`\alpha \ge 0`, the power with which the learning rate does.
        t0: :math:`t_0 \ge 0`, the step after which the average begins.
        weight_decay: :math:`\omega \ge 0`.
        maximize: Ascend instead of descend.
        use_accelerated_op: Fused kernels: ``None`` if available, ``True`` required,
            ``False`` never.

    Slots: ``ax`` (:math:`\bar p`), which starts as the parameter and is connected to it, and the
    numbers ``eta`` and ``mu`` of the next step. ``update`` needs ``params``. Differentiable in
    gradients, parameters, slots and every number; in ``t0`` almost everywhere, and only the
    average depends on it.

    Raises:
        ValueError: If a number is out of bounds.
        RuntimeError: If ``use_accelerated_op=True`` cannot be met.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.asgd(lr=1.0, lambd=0.0, t0=0)
        >>> params = [torch.tensor([4.0])]
        >>> state = tx.init(params)
        >>> for _ in range(3):
        ...     params, state = tx.apply_gradients([torch.tensor([1.0])], state, params)
        >>> params, tx.eval_params(state, params)
        ([tensor([1.])], [tensor([1.5000])])

    Reference:
        Polyak and Juditsky, Acceleration of stochastic approximation by averaging, SIAM Journal on
        Control and Optimization 30(4), 1992, https://doi.org/10.1137/0330046; Bottou, Large-scale
        machine learning with stochastic gradient descent, COMPSTAT 2010, for the learning rate;
        ``torch.optim.ASGD``.
    """
    tx = chain(
        flip_sign(maximize), add_decayed_weights(weight_decay), StepByASGD(lr, lambd, alpha, t0)
    )
    return accelerated(tx, use_accelerated_op)


class ASGD(Optimizer):
    """:func:`torchopt.asgd` as a ``torch.optim.Optimizer``.

    Its ``state_dict`` interchanges with that of ``torch.optim.ASGD``.
    """

    @from_recipe(asgd)
    def __init__(self, params: Any) -> None:
        """Take the parameters, then the arguments of :func:`torchopt.asgd`."""


class MetaASGD(MetaOptimizer):
    """:func:`torchopt.asgd` as a differentiable optimizer of a network."""

    @meta_from_recipe(asgd)
    def __init__(self, module: Any) -> None:
        """Take the network, then the arguments of :func:`torchopt.asgd`."""
