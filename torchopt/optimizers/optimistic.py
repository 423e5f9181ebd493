"""Optimistic gradient descent: a step that expects the gradient to go on changing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchopt.base.numerics import add_scaled
from torchopt.core.accelerated_op import accelerated
from torchopt.core.chaining import chain
from torchopt.core.hyper import hyper
from torchopt.core.rules import ElementwiseTransformation
from torchopt.core.slots import Slot
from torchopt.core.transform import GradientTransformation, transformation
from torchopt.optim.meta_optimizer import MetaOptimizer
from torchopt.optim.named import from_recipe, meta_from_recipe
from torchopt.optim.optimizer import Optimizer
from torchopt.transforms.basic import flip_sign, scale_by_learning_rate
from torchopt.typing import Hyperparameter, Step


@transformation
class ScaleByOptimisticGradient(ElementwiseTransformation):
    """Add the change since the gradient before; see :func:`scale_by_optimistic_gradient`."""

    alpha: Hyperparameter = hyper(1.0)
    beta: Hyperparameter = hyper(1.0)

    slots = (Slot("previous_grad"),)
    uses_step = True

    def rule(
        self, g: Tensor, p: Any, t: Step, slots: tuple, *, alpha: Any, beta: Any
    ) -> tuple[Tensor, tuple]:
        """Return ``alpha * g + beta * (g - previous)``, and the gradient."""
        (previous,) = slots
        if isinstance(t, Tensor):
            previous = torch.where(t == 1, g, previous)
        elif t == 1:
            previous = g
        # a gradient buffer that is reused later must not change the state
        return add_scaled(g * alpha, g - previous, beta), (g.clone(),)


def scale_by_optimistic_gradient(
    alpha: Hyperparameter = 1.0, beta: Hyperparameter = 1.0
) -> GradientTransformation:
    r"""Add to the gradient its change since the one before.

    .. math::
        u_t = \alpha\, g_t + \beta\, (g_t - g_{t-1}), \qquad g_0 = g_1

    Args:
        alpha: :math:`\alpha`, any number.
        beta: :math:`\beta`, any number.

    Slots: ``previous_grad``; at the first step it is not read. Linear, and differentiable, in
    gradients, slot and both numbers.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.scale_by_optimistic_gradient()
        >>> g, state = torch.tensor([1.0]), tx.init(torch.ones(1))
        >>> for _ in range(3):
        ...     updates, state = tx.update(g.clone(), state)
        ...     print(updates.item())
        ...     g = g + 1
        1.0
        3.0
        4.0

    Reference:
        Mokhtari et al., A unified analysis of extra-gradient and optimistic gradient methods for
        saddle point problems, AISTATS 2020, https://arxiv.org/abs/1901.08511.
    """
    return ScaleByOptimisticGradient(alpha, beta)


def optimistic_gradient_descent(
    lr: Hyperparameter = 1e-3,
    alpha: Hyperparameter = 1.0,
    beta: Hyperparameter = 1.0,
    *,
    maximize: bool = False,
    use_accelerated_op: bool | None = None,
) -> GradientTransformation:
    r"""Optimistic gradient descent, which converges in games where gradient descent cycles.

    .. math::
        p_t = p_{t-1} - \eta\, \big(\alpha\, g_t + \beta\, (g_t - g_{t-1})\big), \qquad g_0 = g_1

    Args:
        lr: Learning rate :math:`\eta \ge 0`. (Optax has no default.)
        alpha: :math:`\alpha`, the weight of the gradient.
        beta: :math:`\beta`, the weight of its change.
        maximize: Ascend instead of descend: for the other player of a game.
        use_accelerated_op: Fused kernels: ``None`` if available, ``True`` required,
            ``False`` never.

    Slots: ``previous_grad``. Differentiable in gradients, parameters, slot and every number.

    Raises:
        ValueError: If a number is out of bounds.
        RuntimeError: If ``use_accelerated_op=True`` cannot be met.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.optimistic_gradient_descent(lr=0.5)
        >>> params = {
        ...     "x": torch.tensor(1.0),
        ...     "y": torch.tensor(1.0),
        ... }  # of x y
        >>> state = tx.init(params)
        >>> for _ in range(60):
        ...     grads = {"x": params["y"].clone(), "y": -params["x"]}
        ...     params, state = tx.apply_gradients(grads, state, params)
        >>> bool(params["x"].abs() < 1e-3), bool(params["y"].abs() < 1e-3)
        (True, True)

    Reference:
        Mokhtari et al., AISTATS 2020, https://arxiv.org/abs/1901.08511.
    """
    tx = chain(
        flip_sign(maximize),
        scale_by_optimistic_gradient(alpha, beta),
        scale_by_learning_rate(lr),
    )
    return accelerated(tx, use_accelerated_op)


class OptimisticGradientDescent(Optimizer):
    """:func:`torchopt.optimistic_gradient_descent` as a ``torch.optim.Optimizer``."""

    @from_recipe(optimistic_gradient_descent)
    def __init__(self, params: Any) -> None:
        """Take the parameters, then those of :func:`torchopt.optimistic_gradient_descent`."""


class MetaOptimisticGradientDescent(MetaOptimizer):
    """:func:`torchopt.optimistic_gradient_descent` as a differentiable optimizer of a network."""

    @meta_from_recipe(optimistic_gradient_descent)
    def __init__(self, module: Any) -> None:
        """Take the network, then those of :func:`torchopt.optimistic_gradient_descent`."""
