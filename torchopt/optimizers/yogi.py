"""Yogi: Adam whose second moment changes by no more than the square of a gradient."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torchopt.base.numerics import moving_average, over_root, power
from torchopt.core.accelerated_op import accelerated
from torchopt.core.chaining import chain
from torchopt.core.hyper import HyperSpec, check_number, hyper
from torchopt.core.rules import ElementwiseTransformation
from torchopt.core.slots import Slot
from torchopt.core.transform import GradientTransformation, transformation
from torchopt.optim.meta_optimizer import MetaOptimizer
from torchopt.optim.named import from_recipe, meta_from_recipe
from torchopt.optim.optimizer import Optimizer
from torchopt.transforms.basic import add_decayed_weights, flip_sign, scale_by_learning_rate
from torchopt.typing import Hyperparameter, Step


@transformation
class ScaleByYogi(ElementwiseTransformation):
    """Scale by moments, of which the second changes additively; see :func:`scale_by_yogi`."""

    betas: tuple[Hyperparameter, Hyperparameter] = hyper((0.9, 0.999), ge=0, lt=1, length=2)
    eps: Hyperparameter = hyper(1e-3, ge=0)
    initial_accumulator_value: float = 1e-6

    uses_step = True

    def __post_init__(self) -> None:
        super().__post_init__()
        name = "initial_accumulator_value"
        check_number(name, self.initial_accumulator_value, HyperSpec(ge=0))

    @property
    def slots(self) -> tuple[Slot, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Both moments, which start at ``initial_accumulator_value``."""
        start = self.initial_accumulator_value
        return Slot("exp_avg", start=start), Slot("exp_avg_sq", start=start)

    def rule(
        self, g: Tensor, p: Any, t: Step, slots: tuple, *, betas: tuple[Any, Any], eps: Any
    ) -> tuple[Tensor, tuple]:
        """Return the bias-corrected first moment over the root of the second."""
        b1, b2 = betas
        m, v = slots
        m = moving_average(m, g, b1)
        squared = g * g
        v = v - (v - squared).sign() * squared * (1 - b2)
        c1, c2 = 1 - power(b1, t), 1 - power(b2, t)
        return over_root(m, v, c1 / c2**0.5, c1 * eps), (m, v)


def scale_by_yogi(
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-3,
    initial_accumulator_value: float = 1e-6,
) -> GradientTransformation:
    r"""Scale as Adam does, with a second moment that moves towards the gradient's square by steps.

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
        v_t = v_{t-1} - (1 - \beta_2) \operatorname{sign}(v_{t-1} - g_t^2)\, g_t^2, \qquad
        u_t = \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

    Args:
        betas: Decay rates :math:`(\beta_1, \beta_2)`, each in [0, 1).
        eps: :math:`\epsilon \ge 0`, outside the root.
        initial_accumulator_value: What :math:`m_0` and :math:`v_0` are, >= 0. That of :math:`m_0`
            too, as in the authors' code and Optax, so that a parameter whose gradient is zero moves
            a little.

    Slots: ``exp_avg``, ``exp_avg_sq``. Differentiable in gradients, slots and every number but
    ``initial_accumulator_value``. The sign counts as a constant: at :math:`v_{t-1} = g_t^2`, where
    the second moment jumps by :math:`\pm (1 - \beta_2) g_t^2`, it is 0, and nothing flows from
    :math:`g_t` to :math:`v_t`. Where a second moment is exactly zero the derivative through its
    root is zero.

    Raises:
        ValueError: If a number is out of bounds.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.scale_by_yogi()
        >>> g = [torch.tensor([0.5, -2.0])]
        >>> tx.update(g, tx.init(g))[0]
        [tensor([ 0.9960, -0.9994])]

    Reference:
        Zaheer et al., Adaptive methods for nonconvex optimization, NeurIPS 2018, algorithm 2;
        ``optax.scale_by_yogi``.
    """
    return ScaleByYogi(betas, eps, initial_accumulator_value)


def yogi(
    lr: Hyperparameter = 1e-2,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-3,
    weight_decay: Hyperparameter = 0.0,
    *,
    initial_accumulator_value: float = 1e-6,
    maximize: bool = False,
    use_accelerated_op: bool | None = None,
) -> GradientTransformation:
    r"""Yogi: Adam whose second moment cannot grow or shrink fast.

    .. math::
        g_t = \nabla f(p_{t-1}) + \lambda p_{t-1}, \\
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
        v_t = v_{t-1} - (1 - \beta_2) \operatorname{sign}(v_{t-1} - g_t^2)\, g_t^2, \\
        p_t = p_{t-1} - \eta\, \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

    The quotient is :func:`torchopt.scale_by_yogi`.

    Args:
        lr: Learning rate :math:`\eta \ge 0`.
        betas: Decay rates :math:`(\beta_1, \beta_2)` of the two moments, each in [0, 1).
        eps: :math:`\epsilon \ge 0`, added to the root.
        weight_decay: :math:`\lambda \ge 0`; needs ``params`` in ``update``. Optax has none here.
        initial_accumulator_value: What both moments start at, >= 0.
        maximize: Ascend instead of descend.
        use_accelerated_op: Fused kernels: ``None`` if available, ``True`` required,
            ``False`` never.

    Both moments are corrected for their bias as in Optax; the paper does without.

    Slots: ``exp_avg``, ``exp_avg_sq``. Differentiable in gradients, parameters, slots and every
    number but ``initial_accumulator_value``, almost everywhere: see :func:`torchopt.scale_by_yogi`.

    Raises:
        ValueError: If a number is out of bounds.
        RuntimeError: If ``use_accelerated_op=True`` cannot be met.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.yogi(lr=0.1)
        >>> params = {"w": torch.tensor([1.0])}
        >>> updates, state = tx.update({"w": torch.tensor([1.0])}, tx.init(params), params)
        >>> torchopt.apply_updates(params, updates)
        {'w': tensor([0.9001])}

    Reference:
        Zaheer et al., Adaptive methods for nonconvex optimization, NeurIPS 2018; ``optax.yogi``.
    """
    tx = chain(
        flip_sign(maximize),
        add_decayed_weights(weight_decay),
        scale_by_yogi(betas, eps, initial_accumulator_value),
        scale_by_learning_rate(lr),
    )
    return accelerated(tx, use_accelerated_op)


class Yogi(Optimizer):
    """:func:`torchopt.yogi` as a ``torch.optim.Optimizer``."""

    @from_recipe(yogi)
    def __init__(self, params: Any) -> None:
        """Take the parameters, then the arguments of :func:`torchopt.yogi`."""


class MetaYogi(MetaOptimizer):
    """:func:`torchopt.yogi` as a differentiable optimizer of a network."""

    @meta_from_recipe(yogi)
    def __init__(self, module: Any) -> None:
        """Take the network, then the arguments of :func:`torchopt.yogi`."""
