"""Schedule-free SGD and AdamW: averaging in place of a learning-rate schedule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchopt.base import misuse
from torchopt.base.numerics import add_scaled, is_zero, moving_average_of_square, over_root, power
from torchopt.core.accelerated_op import accelerated
from torchopt.core.chaining import chain
from torchopt.core.hyper import hyper
from torchopt.core.rules import ElementwiseTransformation
from torchopt.core.slots import PARAM, Counter, Slot
from torchopt.core.transform import GradientTransformation, transformation
from torchopt.optim.meta_optimizer import MetaOptimizer
from torchopt.optim.named import from_recipe, meta_from_recipe
from torchopt.optim.optimizer import Optimizer
from torchopt.transforms.basic import flip_sign
from torchopt.typing import Hyperparameter, Step


class _ScheduleFree(ElementwiseTransformation):
    """What the two have in common: the anchor, and the weights of the average."""

    counters = (Counter("weight_sum", 0.0), Counter("lr_max", 0.0))
    uses_step = True
    evaluates = True

    def count(
        self,
        t: Step,
        *,
        weight_sum: Any,
        lr_max: Any,
        lr: Any,
        warmup_steps: int,
        r: Any,
        weight_lr_power: Any,
        **_: Any,
    ) -> dict[str, Any]:
        """Return the sum of the weights up to this step, and the greatest rate."""
        lr_max = _greater(_warmed(lr, t, warmup_steps), lr_max)
        return {"weight_sum": weight_sum + _weight(t, lr_max, r, weight_lr_power), "lr_max": lr_max}

    def _moved(
        self, p: Any, z: Tensor, u: Tensor, t: Step, beta: Any, h: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Return the update of the parameter and the new anchor, for a direction ``u``."""
        p = misuse.given_params(type(self).__name__, p)
        if not is_zero(h["weight_decay"]):
            u = add_scaled(u, p, h["weight_decay"])
        lr = _warmed(h["lr"], t, h["warmup_steps"])
        weight = _weight(t, h["lr_max"], h["r"], h["weight_lr_power"])
        c = _over(weight, h["weight_sum"])
        return (z - p) * c + u * (lr * (beta * (1 - c) - 1)), z - u * lr


def _warmed(lr: Any, t: Step, warmup_steps: int) -> Any:
    """Return the learning rate of a step, which grows over the first ones."""
    if is_zero(warmup_steps):
        return lr
    part = t / warmup_steps
    return lr * (part.clamp(max=1.0) if isinstance(part, Tensor) else min(part, 1.0))


def _weight(t: Step, lr_max: Any, r: Any, weight_lr_power: Any) -> Any:
    """Return the weight of a step in the average."""
    weight = 1.0 if is_zero(r) else power(t, r)
    return weight if is_zero(weight_lr_power) else weight * power(lr_max, weight_lr_power)


def _greater(a: Any, b: Any) -> Any:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        like = a if isinstance(a, Tensor) else b
        return torch.maximum(*(torch.as_tensor(x, dtype=like.dtype) for x in (a, b)))
    return max(a, b)


def _over(a: Any, b: Any) -> Any:
    """Return a quotient; while the learning rate has always been 0, nothing."""
    if not isinstance(b, Tensor):
        return 0.0 if b == 0 else a / b
    never = b == 0
    return torch.where(never, 0.0, a / torch.where(never, 1.0, b))


def _average(y: Tensor, z: Tensor, beta: Any) -> Tensor:
    """Return the average, of which the weights that are trained are a mixture with the anchor."""
    return z + (y - z) / beta


def _mixture(x: Tensor, z: Tensor, beta: Any) -> Tensor:
    return z + (x - z) * beta


@transformation
class StepByScheduleFreeSGD(_ScheduleFree):
    """The whole step of schedule-free SGD; see :func:`schedule_free_sgd`."""

    lr: Hyperparameter = hyper(1.0, ge=0)
    momentum: Hyperparameter = hyper(0.9, gt=0, lt=1)
    weight_decay: Hyperparameter = hyper(0.0, ge=0)
    warmup_steps: int = hyper(0, ge=0, integer=True)
    r: Hyperparameter = hyper(0.0, ge=0)
    weight_lr_power: Hyperparameter = hyper(2.0, ge=0)

    slots = (Slot("z", start=PARAM),)

    def rule(
        self, g: Tensor, p: Any, t: Step, slots: tuple, *, momentum: Any, **h: Any
    ) -> tuple[Tensor, tuple]:
        """Return the update of the weights that are trained, and the anchor."""
        u, z = self._moved(p, slots[0], g, t, momentum, h)
        return u, (z,)

    def to_eval(self, p: Tensor, slots: tuple, *, momentum: Any, **_: Any) -> Tensor:
        """Return the average."""
        return _average(p, slots[0], momentum)

    def to_train(self, p: Tensor, slots: tuple, *, momentum: Any, **_: Any) -> Tensor:
        """Return the mixture of average and anchor."""
        return _mixture(p, slots[0], momentum)


@transformation
class StepByScheduleFreeAdamW(_ScheduleFree):
    """The whole step of schedule-free AdamW; see :func:`schedule_free_adamw`."""

    lr: Hyperparameter = hyper(2.5e-3, ge=0)
    betas: tuple[Hyperparameter, Hyperparameter] = hyper((0.9, 0.999), gt=0, lt=1, length=2)
    eps: Hyperparameter = hyper(1e-8, ge=0)
    weight_decay: Hyperparameter = hyper(0.0, ge=0)
    warmup_steps: int = hyper(0, ge=0, integer=True)
    r: Hyperparameter = hyper(0.0, ge=0)
    weight_lr_power: Hyperparameter = hyper(2.0, ge=0)

    slots = (Slot("z", start=PARAM), Slot("exp_avg_sq"))

    def rule(
        self, g: Tensor, p: Any, t: Step, slots: tuple, *, betas: Any, eps: Any, **h: Any
    ) -> tuple[Tensor, tuple]:
        """Return the update of the weights that are trained, the anchor and the second moment."""
        z, v = slots
        v = moving_average_of_square(v, g, betas[1])
        direction = over_root(g, v, 1 / (1 - power(betas[1], t)) ** 0.5, eps)
        u, z = self._moved(p, z, direction, t, betas[0], h)
        return u, (z, v)

    def to_eval(self, p: Tensor, slots: tuple, *, betas: Any, **_: Any) -> Tensor:
        """Return the average."""
        return _average(p, slots[0], betas[0])

    def to_train(self, p: Tensor, slots: tuple, *, betas: Any, **_: Any) -> Tensor:
        """Return the mixture of average and anchor."""
        return _mixture(p, slots[0], betas[0])


def schedule_free_sgd(
    lr: Hyperparameter = 1.0,
    momentum: Hyperparameter = 0.9,
    weight_decay: Hyperparameter = 0.0,
    warmup_steps: int = 0,
    r: Hyperparameter = 0.0,
    weight_lr_power: Hyperparameter = 2.0,
    *,
    maximize: bool = False,
    use_accelerated_op: bool | None = None,
) -> GradientTransformation:
    r"""Schedule-free SGD: averaging instead of a learning-rate schedule.

    Gradients are taken at :math:`y`, the parameters that are trained; an anchor :math:`z` takes
    plain steps, and :math:`x`, its average, is what is evaluated:

    .. math::
        u_t = \nabla f(y_t) + \lambda y_t, \qquad
        \eta_t = \eta \min(1, t / T), \qquad z_{t+1} = z_t - \eta_t u_t, \\
        w_t = t^r \max_{i \le t} \eta_i^{\,q}, \qquad c_t = w_t \Big/ \sum_{i \le t} w_i, \\
        x_{t+1} = (1 - c_t)\, x_t + c_t z_{t+1}, \qquad
        y_{t+1} = (1 - \beta)\, z_{t+1} + \beta\, x_{t+1}

    To evaluate, use ``tx.eval_params(state, params)``, ``optimizer.eval()`` and
    ``optimizer.train()``, or ``inner.eval_params()``.

    Args:
        lr: Learning rate :math:`\eta \ge 0`.
        momentum: :math:`\beta` in (0, 1).
        weight_decay: :math:`\lambda \ge 0`, at :math:`y`.
        warmup_steps: :math:`T`, a whole number.
        r: :math:`r \ge 0`, power of the step in the average's weights.
        weight_lr_power: :math:`q \ge 0`, power of the learning rate in them.
        maximize: Ascend instead of descend.
        use_accelerated_op: Fused kernels: ``None`` if available, ``True`` required,
            ``False`` never.

    Slots: ``z``, which starts as the parameter and is connected to it, and the numbers
    ``weight_sum`` and ``lr_max``. Differentiable in gradients, parameters, slots and every number
    but ``warmup_steps``.

    Raises:
        ValueError: If a number is out of bounds, or ``update`` is called without ``params``.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.schedule_free_sgd(lr=0.5, momentum=0.5)
        >>> params = [torch.tensor([4.0])]
        >>> state = tx.init(params)
        >>> for _ in range(3):
        ...     params, state = tx.apply_gradients([params[0].clone()], state, params)
        >>> params, tx.eval_params(state, params)
        ([tensor([0.7500])], [tensor([1.1250])])

    Reference:
        Defazio et al., The road less scheduled, NeurIPS 2024, https://arxiv.org/abs/2405.15682.
    """
    step = StepByScheduleFreeSGD(lr, momentum, weight_decay, warmup_steps, r, weight_lr_power)
    return accelerated(chain(flip_sign(maximize), step), use_accelerated_op)


def schedule_free_adamw(
    lr: Hyperparameter = 2.5e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0.0,
    warmup_steps: int = 0,
    r: Hyperparameter = 0.0,
    weight_lr_power: Hyperparameter = 2.0,
    *,
    maximize: bool = False,
    use_accelerated_op: bool | None = None,
) -> GradientTransformation:
    r"""Schedule-free AdamW: averaging instead of a learning-rate schedule and of momentum.

    Gradients are taken at :math:`y`, the parameters that are trained; an anchor :math:`z` takes
    the steps, and :math:`x`, its average, is what is evaluated:

    .. math::
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) \nabla f(y_t)^2, \qquad
        u_t = \frac{\nabla f(y_t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon} + \lambda y_t, \\
        \eta_t = \eta \min(1, t / T), \qquad z_{t+1} = z_t - \eta_t u_t, \\
        w_t = t^r \max_{i \le t} \eta_i^{\,q}, \qquad c_t = w_t \Big/ \sum_{i \le t} w_i, \\
        x_{t+1} = (1 - c_t)\, x_t + c_t z_{t+1}, \qquad
        y_{t+1} = (1 - \beta_1)\, z_{t+1} + \beta_1\, x_{t+1}

    How the average is evaluated, :func:`torchopt.schedule_free_sgd` says.

    Args:
        lr: Learning rate :math:`\eta \ge 0`.
        betas: :math:`(\beta_1, \beta_2)`, each in (0, 1).
        eps: :math:`\epsilon \ge 0`, outside the root.
        weight_decay: :math:`\lambda \ge 0`, at :math:`y`.
        warmup_steps: :math:`T`, over how many steps the learning rate grows to its value.
        r: :math:`r \ge 0`, power of the step in the average's weights.
        weight_lr_power: :math:`q \ge 0`, power of the learning rate in them.
        maximize: Ascend instead of descend.
        use_accelerated_op: Fused kernels: ``None`` if available, ``True`` required,
            ``False`` never.

    Slots: ``z``, which starts as the parameter and is connected to it, ``exp_avg_sq``, and the
    numbers ``weight_sum`` and ``lr_max``. Differentiable in gradients, parameters, slots and every
    number but ``warmup_steps``.

    Raises:
        ValueError: If a number is out of bounds, or ``update`` is called without ``params``.

    Example:
        >>> import torch, torchopt
        >>> net = torch.nn.Linear(2, 1)
        >>> optimizer = torchopt.AdamWScheduleFree(net.parameters(), lr=0.1)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     net(torch.ones(4, 2)).square().mean().backward()
        ...     optimizer.step()
        >>> optimizer.eval()  # the network has the weights to evaluate
        >>> optimizer.train()  # and those to go on with

    Reference:
        Defazio et al., The road less scheduled, NeurIPS 2024, https://arxiv.org/abs/2405.15682.
    """
    step = StepByScheduleFreeAdamW(lr, betas, eps, weight_decay, warmup_steps, r, weight_lr_power)
    return accelerated(chain(flip_sign(maximize), step), use_accelerated_op)


class SGDScheduleFree(Optimizer):
    """:func:`torchopt.schedule_free_sgd` as a ``torch.optim.Optimizer``."""

    @from_recipe(schedule_free_sgd)
    def __init__(self, params: Any) -> None:
        """Take the parameters, then the arguments of :func:`torchopt.schedule_free_sgd`."""


class AdamWScheduleFree(Optimizer):
    """:func:`torchopt.schedule_free_adamw` as a ``torch.optim.Optimizer``."""

    @from_recipe(schedule_free_adamw)
    def __init__(self, params: Any) -> None:
        """Take the parameters, then the arguments of :func:`torchopt.schedule_free_adamw`."""


class MetaSGDScheduleFree(MetaOptimizer):
    """:func:`torchopt.schedule_free_sgd` as a differentiable optimizer of a network."""

    @meta_from_recipe(schedule_free_sgd)
    def __init__(self, module: Any) -> None:
        """Take the network, then the arguments of :func:`torchopt.schedule_free_sgd`."""


class MetaAdamWScheduleFree(MetaOptimizer):
    """:func:`torchopt.schedule_free_adamw` as a differentiable optimizer of a network."""

    @meta_from_recipe(schedule_free_adamw)
    def __init__(self, module: Any) -> None:
        """Take the network, then the arguments of :func:`torchopt.schedule_free_adamw`."""
