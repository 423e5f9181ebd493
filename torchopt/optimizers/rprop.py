"""Rprop: step sizes that grow while the sign of the gradient stays, and shrink when it changes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchopt.core.accelerated_op import accelerated
from torchopt.core.chaining import chain
from torchopt.core.hyper import hyper
from torchopt.core.rules import ElementwiseTransformation
from torchopt.core.slots import Slot, filled
from torchopt.core.transform import GradientTransformation, transformation
from torchopt.optim.meta_optimizer import MetaOptimizer
from torchopt.optim.named import from_recipe, meta_from_recipe
from torchopt.optim.optimizer import Optimizer
from torchopt.transforms.basic import flip_sign
from torchopt.typing import Hyperparameter, Step


def _first_step_size(param: Tensor, *, lr: Any, **_: Any) -> Tensor:
    return filled(param, lr)


@transformation
class StepByRprop(ElementwiseTransformation):
    """The whole step of Rprop; see :func:`rprop`."""

    lr: Hyperparameter = hyper(1e-2, ge=0)
    etas: tuple[Hyperparameter, Hyperparameter] = hyper(
        (0.5, 1.2), gt=(0, 1), lt=(1, None), length=2
    )
    step_sizes: tuple[Hyperparameter, Hyperparameter] = hyper((1e-6, 50.0), ge=0, length=2)

    slots = (Slot("prev"), Slot("step_size", start=_first_step_size))

    def rule(
        self,
        g: Tensor,
        p: Any,
        t: Step,
        slots: tuple,
        *,
        lr: Any,
        etas: tuple[Any, Any],
        step_sizes: tuple[Any, Any],
    ) -> tuple[Tensor, tuple]:
        """Return a step of the new size against the gradient, or none where its sign changed."""
        prev, size = slots
        (smaller, greater), (low, high) = etas, step_sizes
        agreement = g * prev
        turned = agreement < 0
        size = torch.where(agreement > 0, size * greater, torch.where(turned, size * smaller, size))
        size = torch.where(size < low, low, size)
        size = torch.where(size > high, high, size)
        g = torch.where(turned, 0.0, g)
        return -(g.sign() * size), (g, size)


def rprop(
    lr: Hyperparameter = 1e-2,
    etas: tuple[Hyperparameter, Hyperparameter] = (0.5, 1.2),
    step_sizes: tuple[Hyperparameter, Hyperparameter] = (1e-6, 50.0),
    *,
    maximize: bool = False,
    use_accelerated_op: bool | None = None,
) -> GradientTransformation:
    r"""Rprop: step sizes that grow while the gradient keeps its sign, and shrink when it changes.

    For each entry:

    .. math::
        g_0 = 0, \qquad d_0 = \eta, \\
        d_t = \operatorname{clamp}\!\left(d_{t-1} \cdot \begin{cases}
            \eta_+ & g_t\, g_{t-1} > 0 \\ \eta_- & g_t\, g_{t-1} < 0 \\ 1 & \text{otherwise}
            \end{cases},\ \Gamma_{\min},\ \Gamma_{\max}\right), \qquad
        p_t = p_{t-1} - d_t \operatorname{sign}(g_t)

    and where the sign has changed :math:`g_t` is set to zero first: the entry rests for one step.
    It is meant for gradients of all data, not of batches. Optax's ``rprop`` of version 0.2.8 moves
    by the update of the step before.

    Args:
        lr: First step size :math:`\eta \ge 0`. It is read when a state begins and not any more:
            schedulers of the learning rate have no effect, as in ``torch.optim.Rprop``.
        etas: Factors :math:`(\eta_-, \eta_+)`, in (0, 1) and above 1.
        step_sizes: Bounds :math:`(\Gamma_{\min}, \Gamma_{\max})` of the step sizes, each >= 0,
            the first one's included.
        maximize: Ascend instead of descend.
        use_accelerated_op: Fused kernels: ``None`` if available, ``True`` required,
            ``False`` never.

    Slots: ``prev`` (the last gradient, zero where its sign had changed), ``step_size``.

    **What a meta-gradient reaches.** Gradients act by their signs only, so nothing flows through
    them: derivatives by gradients and ``prev`` are exactly zero, and that by the initial parameters
    is the first-order one. Step sizes are products of what they started as and of the factors, so
    ``lr``, ``etas`` and ``step_size`` are learned, and where a bound holds, that bound instead.

    Raises:
        ValueError: If a number is out of bounds.
        RuntimeError: If ``use_accelerated_op=True`` cannot be met.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.rprop(lr=0.5, etas=(0.5, 2.0))
        >>> params = {"w": torch.tensor([1.0])}
        >>> state = tx.init(params)
        >>> for g in (3.0, 0.1, -1.0, -1.0):
        ...     updates, state = tx.update({"w": torch.tensor([g])}, state)
        ...     print(-updates["w"].item())
        0.5
        1.0
        0.0
        -0.5

    Reference:
        Riedmiller and Braun, A direct adaptive method for faster backpropagation learning: the
        RPROP algorithm, ICNN 1993; ``torch.optim.Rprop``.
    """
    tx = chain(flip_sign(maximize), StepByRprop(lr, etas, step_sizes))
    return accelerated(tx, use_accelerated_op)


class Rprop(Optimizer):
    """:func:`torchopt.rprop` as a ``torch.optim.Optimizer``.

    Its ``state_dict`` interchanges with that of ``torch.optim.Rprop``.
    """

    counts_steps = True  # torch.optim.Rprop keeps a count that its rule does not read

    @from_recipe(rprop)
    def __init__(self, params: Any) -> None:
        """Take the parameters, then the arguments of :func:`torchopt.rprop`."""


class MetaRprop(MetaOptimizer):
    """:func:`torchopt.rprop` as a differentiable optimizer of a network."""

    @meta_from_recipe(rprop)
    def __init__(self, module: Any) -> None:
        """Take the network, then the arguments of :func:`torchopt.rprop`."""
