"""Polyak-SGD: the step that would reach a known minimum along the tangent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchopt.core.accelerated_op import accelerated
from torchopt.core.chaining import chain
from torchopt.core.engine import Leaves
from torchopt.core.hyper import choice, hyper
from torchopt.core.transform import GradientTransformation, transformation
from torchopt.optim.meta_optimizer import MetaOptimizer
from torchopt.optim.named import from_recipe, meta_from_recipe
from torchopt.optim.optimizer import Optimizer
from torchopt.transforms.basic import scale_by_learning_rate
from torchopt.transforms.clip import all_zero, square_sum
from torchopt.typing import Hyperparameter


VARIANTS = ("sps", "sps+")


@transformation
class ScaleByPolyak(GradientTransformation):
    """Multiply by the step to the minimum of the tangent; see :func:`scale_by_polyak`."""

    max_learning_rate: Hyperparameter = hyper(1.0, ge=0, scalar=True)
    f_min: Hyperparameter = hyper(0.0, scalar=True)
    eps: Hyperparameter = hyper(0.0, ge=0, scalar=True)
    variant: str = choice("sps", among=VARIANTS)

    reads = ("value",)

    def step(self, leaves: Leaves) -> tuple[list[Tensor], list[tuple[Tensor | None, ...]]]:
        """Multiply all gradients by the step size that the loss and their common norm give."""
        value = leaves.call.extra.get("value")
        if value is None and all_zero(leaves.g):
            return [torch.zeros_like(g) for g in leaves.g], leaves.slots
        if not isinstance(value, (int, float, Tensor)) or (
            isinstance(value, Tensor) and value.numel() != 1
        ):
            given = "none" if value is None else f"{value!r:.60}"
            raise ValueError(
                f"The Polyak step needs the value of the loss, a single number, got {given}. Write "
                "tx.update(grads, state, params, value=loss), optimizer.step(closure) with a "
                "closure that returns the loss, or inner.step(grads=..., value=loss)."
            )
        total = square_sum(leaves.g)
        value = torch.as_tensor(value, dtype=total.dtype, device=total.device).reshape(())
        updates = []
        for g, h in zip(leaves.g, leaves.hyper):
            size = _step_size(value, total, **h)
            updates.append(g * size.to(device=g.device, dtype=g.dtype))
        return updates, leaves.slots


def _step_size(
    value: Tensor, total: Tensor, *, max_learning_rate: Any, f_min: Any, eps: Any, variant: str
) -> Tensor:
    """Return the step to where the tangent is at the minimum; none where the gradient is zero."""
    gap = value - f_min
    if variant == "sps+":
        gap = gap.clamp(min=0.0)
    divisor = total + eps
    flat = divisor == 0
    size = gap / torch.where(flat, 1.0, divisor)
    return torch.where(flat, 0.0, torch.clamp(size, max=max_learning_rate))


def scale_by_polyak(
    max_learning_rate: Hyperparameter = 1.0,
    f_min: Hyperparameter = 0.0,
    eps: Hyperparameter = 0.0,
    variant: str = "sps",
) -> GradientTransformation:
    r"""Multiply by the step that would bring the tangent of the loss to its minimum.

    .. math::
        u = g \cdot \min\!\left(\frac{f - f_{\min}}{\lVert g \rVert^2 + \epsilon},
            \gamma_{\max}\right)

    The norm is over all parameters taken as one vector; where it is zero, with ``eps``, the update
    is zero. (Optax leaves out steps from gradients whose squared norm is below ``2e-16``, too.)

    Args:
        max_learning_rate: :math:`\gamma_{\max} \ge 0`.
        f_min: :math:`f_{\min}`, the least value of the loss, or a bound below it.
        eps: :math:`\epsilon \ge 0`.
        variant: ``"sps"``, or ``"sps+"``, which takes no step where the loss is below
            :math:`f_{\min}`; there the first one ascends.

    The value :math:`f` of the loss comes with each update: ``update(grads, state, params,
    value=loss)``; :meth:`torchopt.Optimizer.step` takes that of its closure, and
    :meth:`torchopt.MetaOptimizer.step` its loss, or what ``value`` says beside ``grads``. It is the
    loss whose gradient is given: the mean, where gradients of several batches or processes are
    averaged (parameters of FSDP2 tell the processes, and the mean is taken here). A step from
    gradients that are all zero needs none.

    No slots. Differentiable in gradients, the value and every number; with the gradient that is
    zero everywhere no derivative passes.

    Raises:
        ValueError: If a number is out of bounds, or no value is given.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.scale_by_polyak()
        >>> g = [torch.tensor([3.0, 4.0])]
        >>> tx.update(g, tx.init(g), value=5.0)[0]
        [tensor([0.6000, 0.8000])]

    Reference:
        Loizou et al., Stochastic Polyak step-size for SGD, AISTATS 2021,
        https://arxiv.org/abs/2002.10542; Garrigos et al., 2023, https://arxiv.org/abs/2307.14528,
        for ``"sps+"``.
    """
    return ScaleByPolyak(max_learning_rate, f_min, eps, variant)


def polyak_sgd(
    lr: Hyperparameter = 1.0,
    max_learning_rate: Hyperparameter = 1.0,
    f_min: Hyperparameter = 0.0,
    eps: Hyperparameter = 0.0,
    variant: str = "sps",
    *,
    use_accelerated_op: bool | None = None,
) -> GradientTransformation:
    r"""SGD with Polyak's step size.

    .. math::
        p_t = p_{t-1} - \eta\, g_t \min\!\left(
            \frac{f(p_{t-1}) - f_{\min}}{\lVert g_t \rVert^2 + \epsilon}, \gamma_{\max}\right)

    Args:
        lr: :math:`\eta \ge 0`, a factor of the step. Optax's ``scaling``, which is applied to the
            gradient before its norm is taken there, against the formula.
        max_learning_rate: :math:`\gamma_{\max} \ge 0`.
        f_min: :math:`f_{\min}`, the least value of the loss, or a bound below it.
        eps: :math:`\epsilon \ge 0`.
        variant: ``"sps"`` or ``"sps+"``; see :func:`torchopt.scale_by_polyak`.
        use_accelerated_op: Fused kernels: ``None`` if available, ``True`` required,
            ``False`` never. The norm of all gradients has none.

    The value of the loss comes with each update: ``update(grads, state, params, value=loss)``; in
    the object-oriented API from the closure of ``step(closure)``; in the differentiable one it is
    the loss of ``step(loss)``.

    No slots. Differentiable in gradients, parameters, the value and every number.

    Raises:
        ValueError: If a number is out of bounds, or no value is given.

    Example:
        >>> import torch, torchopt
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        >>> optimizer = torchopt.PolyakSGD([w])
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = w.square().sum()
        ...     loss.backward()
        ...     return loss
        >>> [round(optimizer.step(closure).item(), 4) for _ in range(4)]
        [14.0, 3.5, 0.875, 0.2188]

    Reference:
        Loizou et al., AISTATS 2021, https://arxiv.org/abs/2002.10542.
    """
    tx = chain(
        scale_by_polyak(max_learning_rate, f_min, eps, variant),
        scale_by_learning_rate(lr),
    )
    return accelerated(tx, use_accelerated_op)


class PolyakSGD(Optimizer):
    """:func:`torchopt.polyak_sgd` as a ``torch.optim.Optimizer``; call ``step(closure)``."""

    @from_recipe(polyak_sgd)
    def __init__(self, params: Any) -> None:
        """Take the parameters, then the arguments of :func:`torchopt.polyak_sgd`."""


class MetaPolyakSGD(MetaOptimizer):
    """:func:`torchopt.polyak_sgd` as a differentiable optimizer of a network."""

    @meta_from_recipe(polyak_sgd)
    def __init__(self, module: Any) -> None:
        """Take the network, then the arguments of :func:`torchopt.polyak_sgd`."""
