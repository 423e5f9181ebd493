"""SparseAdam: Adam for the entries that a sparse gradient has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchopt.base.numerics import moving_average, moving_average_of_square, over_root, power
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
class ScaleBySparseAdam(ElementwiseTransformation):
    """Scale by moments that only rows with a gradient have; see :func:`scale_by_sparse_adam`."""

    betas: tuple[Hyperparameter, Hyperparameter] = hyper((0.9, 0.999), ge=0, lt=1, length=2)
    eps: Hyperparameter = hyper(1e-8, ge=0)

    slots = (Slot("exp_avg"), Slot("exp_avg_sq"))
    uses_step = True
    sparse_by_entry = True

    def refuses(self, param: Tensor) -> str:
        """Return what to do with a parameter that is sparse itself."""
        if param.layout == torch.strided:
            return ""
        return (
            f"is sparse itself ({param.layout}), and SparseAdam keeps dense slots: use to_dense()."
        )

    def rule(
        self, g: Tensor, p: Any, t: Step, slots: tuple, *, betas: tuple[Any, Any], eps: Any
    ) -> tuple[Tensor, tuple]:
        """Return the first moment over the root of the second, corrected as a whole."""
        b1, b2 = betas
        m, v = slots
        m = moving_average(m, g, b1)
        v = moving_average_of_square(v, g, b2)
        correction = (1 - power(b2, t)) ** 0.5 / (1 - power(b1, t))
        return over_root(m, v, 1.0, eps) * correction, (m, v)


def scale_by_sparse_adam(
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999), eps: Hyperparameter = 1e-8
) -> GradientTransformation:
    r"""Scale as Adam does the entries that a sparse gradient has, and leave the others alone.

    .. math::
        m \leftarrow \beta_1 m + (1 - \beta_1) g_t, \qquad
        v \leftarrow \beta_2 v + (1 - \beta_2) g_t^2, \qquad
        u_t = \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t} \cdot \frac{m}{\sqrt v + \epsilon}

    where :math:`g_t` has an entry; elsewhere :math:`m` and :math:`v` stay, and nothing moves,
    while Adam's moments would decay. The step count :math:`t` is that of the whole tensor. Note
    that :math:`\epsilon` is added to the root before the correction, as in
    ``torch.optim.SparseAdam``.

    Args:
        betas: Decay rates :math:`(\beta_1, \beta_2)`, each in [0, 1).
        eps: :math:`\epsilon \ge 0`.

    Slots: ``exp_avg``, ``exp_avg_sq``, both dense. Differentiable in gradients, slots and every
    number; where a second moment is exactly zero the derivative through its root is zero.

    Raises:
        ValueError: If a number is out of bounds, or a parameter is sparse itself.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.scale_by_sparse_adam()
        >>> g = [torch.tensor([0.5, 0.0, -2.0]).to_sparse()]
        >>> tx.update(g, tx.init([torch.zeros(3)]))[0][0].to_dense()
        tensor([ 1.0000,  0.0000, -1.0000])

    Reference:
        ``torch.optim.SparseAdam``; Kingma and Ba, 2015, https://arxiv.org/abs/1412.6980.
    """
    return ScaleBySparseAdam(betas, eps)


def sparse_adam(
    lr: Hyperparameter = 1e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    *,
    maximize: bool = False,
    use_accelerated_op: bool | None = None,
) -> GradientTransformation:
    r"""Adam for sparse gradients: rows that have none keep their weights and their moments.

    Where :math:`g_t` has an entry:

    .. math::
        m \leftarrow \beta_1 m + (1 - \beta_1) g_t, \qquad
        v \leftarrow \beta_2 v + (1 - \beta_2) g_t^2, \\
        p_t = p_{t-1} - \eta\, \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t} \cdot
            \frac{m}{\sqrt v + \epsilon}

    Elsewhere nothing changes. The factor of :math:`\eta` is :func:`torchopt.scale_by_sparse_adam`.
    It is for embeddings with ``sparse=True``, of which a batch uses few rows. In the
    object-oriented API a step reads and writes those rows only; the other two make new slots and
    copy them. A dense gradient counts as one that has every entry; ``torch.optim.SparseAdam``
    refuses it.

    Args:
        lr: Learning rate :math:`\eta \ge 0`.
        betas: Decay rates :math:`(\beta_1, \beta_2)` of the two moments, each in [0, 1).
        eps: :math:`\epsilon \ge 0`, added to the root before its correction.
        maximize: Ascend instead of descend.
        use_accelerated_op: Fused kernels, which dense gradients have: ``None`` if available,
            ``True`` required, ``False`` never.

    Slots: ``exp_avg``, ``exp_avg_sq``. Differentiable in gradients, parameters, slots and every
    number, sparse gradients included.

    Raises:
        ValueError: If a number is out of bounds, or a parameter is sparse itself.
        RuntimeError: If ``use_accelerated_op=True`` cannot be met.

    Example:
        >>> import torch, torchopt
        >>> embedding = torch.nn.Embedding(3, 1, sparse=True)
        >>> before = embedding.weight.detach().clone()
        >>> optimizer = torchopt.SparseAdam(embedding.parameters(), lr=0.5)
        >>> embedding(torch.tensor([2])).sum().backward()
        >>> optimizer.step()
        >>> (embedding.weight.detach() - before).flatten()
        tensor([ 0.0000,  0.0000, -0.5000])

    Reference:
        ``torch.optim.SparseAdam``; Kingma and Ba, 2015, https://arxiv.org/abs/1412.6980.
    """
    tx = chain(flip_sign(maximize), ScaleBySparseAdam(betas, eps), scale_by_learning_rate(lr))
    return accelerated(tx, use_accelerated_op)


class SparseAdam(Optimizer):
    """:func:`torchopt.sparse_adam` as a ``torch.optim.Optimizer``.

    Its ``state_dict`` interchanges with that of ``torch.optim.SparseAdam``.
    """

    foreign_hyperparameters = frozenset({"weight_decay"})  # which Adam's states have

    @from_recipe(sparse_adam)
    def __init__(self, params: Any) -> None:
        """Take the parameters, then the arguments of :func:`torchopt.sparse_adam`."""


class MetaSparseAdam(MetaOptimizer):
    """:func:`torchopt.sparse_adam` as a differentiable optimizer of a network."""

    @meta_from_recipe(sparse_adam)
    def __init__(self, module: Any) -> None:
        """Take the network, then the arguments of :func:`torchopt.sparse_adam`."""
