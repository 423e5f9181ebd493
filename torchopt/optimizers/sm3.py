"""SM3: a second moment kept as one number for each row, column and so on."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from torchopt.base.numerics import as_wide, moving_average
from torchopt.core.accelerated_op import accelerated
from torchopt.core.chaining import chain
from torchopt.core.hyper import hyper
from torchopt.core.rules import TensorTransformation
from torchopt.core.slots import Slot
from torchopt.core.transform import GradientTransformation, transformation
from torchopt.optim.meta_optimizer import MetaOptimizer
from torchopt.optim.named import from_recipe, meta_from_recipe
from torchopt.optim.optimizer import Optimizer
from torchopt.transforms.basic import add_decayed_weights, flip_sign, scale_by_learning_rate
from torchopt.typing import Hyperparameter, Step


def _slices(shape: torch.Size) -> tuple[int, ...]:
    """Return how many slices a tensor has, over all of its dimensions; a number is one."""
    return (sum(shape) if shape else 1,)


@transformation
class ScaleBySM3(TensorTransformation):
    """Divide by a root that whole slices share; see :func:`scale_by_sm3`."""

    momentum: Hyperparameter = hyper(0.9, ge=0, lt=1)
    eps: Hyperparameter = hyper(1e-8, gt=0)

    # a tensor has as many vectors as dimensions: they stand in one, one after the other
    slots = (Slot("accumulator", shape=_slices), Slot("momentum_buffer"))
    accepts_complex = False
    batches = True

    def rule(
        self, g: Tensor, p: Any, t: Step, slots: tuple, *, momentum: Any, eps: Any
    ) -> tuple[Tensor, tuple]:
        """Return the new momentum, of gradients over the root of what their slices share."""
        if g.numel() == 0:
            return g, slots
        accumulator, m = slots
        v = _least(accumulator, g.shape) + g.square()
        u = g * (v + eps).rsqrt()
        m = moving_average(as_wide(m, u), u, momentum)
        return m, (_greatest(v), m)


def _least(accumulator: Tensor, shape: torch.Size) -> Tensor:
    """Return for each entry the least of what is kept for the slices that it lies in."""
    if len(shape) < 2:
        return accumulator.reshape(shape)
    pieces = accumulator.split(list(shape))
    spread = [
        x.reshape([-1 if k == d else 1 for k in range(len(shape))]) for d, x in enumerate(pieces)
    ]
    return functools.reduce(torch.minimum, spread)


def _greatest(v: Tensor) -> Tensor:
    """Return the greatest entry of each slice, of all dimensions one after the other."""
    if v.dim() < 2:
        return v.reshape(-1)
    others = [[k for k in range(v.dim()) if k != d] for d in range(v.dim())]
    return torch.cat([v.amax(dim=dims) for dims in others])


def scale_by_sm3(
    momentum: Hyperparameter = 0.9, eps: Hyperparameter = 1e-8
) -> GradientTransformation:
    r"""Divide by the root of a sum of squares of which only the greatest of each slice are kept.

    For an entry :math:`i` of a tensor and the slices :math:`S \ni i` that it lies in, a row and a
    column of a matrix:

    .. math::
        v_t(i) = \min_{S \ni i} \mu_{t-1}(S) + g_t(i)^2, \qquad
        \mu_t(S) = \max_{i \in S} v_t(i), \qquad
        u_t = m_t = \beta m_{t-1} + (1 - \beta) \frac{g_t}{\sqrt{v_t + \epsilon}}

    A vector or a number keeps a sum for each entry, as Adagrad does.

    Args:
        momentum: :math:`\beta` in [0, 1).
        eps: :math:`\epsilon > 0`, inside the root. The authors' code has 1e-30, Optax 1e-8.

    Slots: ``accumulator``, one vector with the :math:`\mu` of all dimensions one after the other
    (of a :math:`3 \times 5` matrix three for rows, then five for columns), and ``momentum_buffer``.
    Differentiable in gradients, slots and every number; where several entries are the least or the
    greatest, each has an equal part in the derivative, which is exact where they are one number
    (the greatest entry of a matrix, which its row and its column share). Where gradients are zero
    the derivative by them is finite, but as large as :math:`1 / \sqrt{\epsilon}`. It has no fused
    kernel: a maximum over slices is no operation on single entries.

    Raises:
        ValueError: If a number is out of bounds.
        TypeError: If a gradient is complex.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.scale_by_sm3(momentum=0.0)
        >>> g = [torch.tensor([[3.0, 0.5], [-2.0, 1.0]])]
        >>> updates, state = tx.update(g, tx.init(g))
        >>> updates, state.accumulator
        ([tensor([[ 1.,  1.],
                [-1.,  1.]])], [tensor([9., 4., 9., 1.])])

    Reference:
        Anil et al., Memory-efficient adaptive optimization, NeurIPS 2019, algorithm SM3-II,
        https://arxiv.org/abs/1901.11150; ``optax.scale_by_sm3``.
    """
    return ScaleBySM3(momentum, eps)


def sm3(
    lr: Hyperparameter = 0.1,
    momentum: Hyperparameter = 0.9,
    weight_decay: Hyperparameter = 0.0,
    eps: Hyperparameter = 1e-8,
    *,
    maximize: bool = False,
    use_accelerated_op: bool | None = None,
) -> GradientTransformation:
    r"""SM3: Adagrad in the memory of one number for each row and column.

    For an entry :math:`i` of a tensor and the slices :math:`S \ni i` that contain it, a row and a
    column of a matrix:

    .. math::
        g_t = \nabla f(p_{t-1}) + \lambda p_{t-1}, \\
        v_t(i) = \min_{S \ni i} \mu_{t-1}(S) + g_t(i)^2, \qquad
        \mu_t(S) = \max_{i \in S} v_t(i), \\
        m_t = \beta m_{t-1} + (1 - \beta) \frac{g_t}{\sqrt{v_t + \epsilon}}, \qquad
        p_t = p_{t-1} - \eta\, m_t

    :math:`m_t` is :func:`torchopt.scale_by_sm3`. A vector or a number keeps a sum for each entry,
    as Adagrad does.

    Args:
        lr: Learning rate :math:`\eta \ge 0`.
        momentum: Decay rate :math:`\beta` of the momentum, in [0, 1).
        weight_decay: :math:`\lambda \ge 0`; needs ``params`` in ``update``. Optax has none here.
        eps: :math:`\epsilon > 0`, added inside the root.
        maximize: Ascend instead of descend.
        use_accelerated_op: Fused kernels: ``None`` if available, ``True`` required,
            ``False`` never. The maximum over a slice has none.

    Slots: ``accumulator``, a vector with one number for each slice of each dimension, and
    ``momentum_buffer``. Differentiable in gradients, parameters, slots and every number.

    Raises:
        ValueError: If a number is out of bounds.
        TypeError: If a gradient is complex.
        RuntimeError: If ``use_accelerated_op=True``.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.sm3(lr=0.1, momentum=0.0)
        >>> params = {"w": torch.tensor([[1.0, 1.0]])}
        >>> updates, state = tx.update({"w": torch.tensor([[3.0, -4.0]])}, tx.init(params), params)
        >>> torchopt.apply_updates(params, updates)
        {'w': tensor([[0.9000, 1.1000]])}

    Reference:
        Anil et al., Memory-efficient adaptive optimization, NeurIPS 2019,
        https://arxiv.org/abs/1901.11150; ``optax.sm3``.
    """
    tx = chain(
        flip_sign(maximize),
        add_decayed_weights(weight_decay),
        scale_by_sm3(momentum, eps),
        scale_by_learning_rate(lr),
    )
    return accelerated(tx, use_accelerated_op)


class SM3(Optimizer):
    """:func:`torchopt.sm3` as a ``torch.optim.Optimizer``."""

    @from_recipe(sm3)
    def __init__(self, params: Any) -> None:
        """Take the parameters, then the arguments of :func:`torchopt.sm3`."""


class MetaSM3(MetaOptimizer):
    """:func:`torchopt.sm3` as a differentiable optimizer of a network."""

    @meta_from_recipe(sm3)
    def __init__(self, module: Any) -> None:
        """Take the network, then the arguments of :func:`torchopt.sm3`."""
