"""Shampoo: a preconditioner for each dimension of a tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchopt.base.spectral import inverse_root
from torchopt.core.accelerated_op import accelerated
from torchopt.core.chaining import chain
from torchopt.core.hyper import flag, hyper
from torchopt.core.rules import TensorTransformation
from torchopt.core.transform import GradientTransformation, transformation
from torchopt.optim.meta_optimizer import MetaOptimizer
from torchopt.optim.named import from_recipe, meta_from_recipe
from torchopt.optim.optimizer import Optimizer
from torchopt.optimizers.dimensions import (
    by_dimension,
    for_dimensions,
    gram,
    identity,
    is_due,
    sizes_of,
    times,
)
from torchopt.transforms.basic import add_decayed_weights, flip_sign, scale_by_learning_rate
from torchopt.transforms.momentum import trace
from torchopt.typing import Hyperparameter, Step


def _has_matrix(
    size: int,
    among: tuple[int, ...],
    *,
    max_preconditioner_dim: int,
    precondition_1d: bool,
    **_: Any,
) -> bool:
    return (len(among) > 1 or precondition_1d) and 1 < size <= max_preconditioner_dim


def _has_root(size: int, among: tuple[int, ...], *, precondition_frequency: int, **h: Any) -> bool:
    return precondition_frequency > 1 and _has_matrix(size, among, **h)


def _has_diagonal(size: int, among: tuple[int, ...], **h: Any) -> bool:
    return not _has_matrix(size, among, **h)


@transformation
class ScaleByShampoo(TensorTransformation):
    """Multiply each dimension by an inverse root; see :func:`scale_by_shampoo`."""

    eps: Hyperparameter = hyper(1e-4, gt=0, scalar=True)
    precondition_frequency: int = hyper(1, ge=1, integer=True)
    max_preconditioner_dim: int = hyper(1024, ge=1, integer=True)
    precondition_1d: bool = flag(False)

    slots = (
        *for_dimensions("preconditioner", _has_matrix),
        *for_dimensions("inverse_root", _has_root, identity),
        *for_dimensions("diagonal", _has_diagonal, square=False),
    )
    gathers = True
    uses_step = True
    accepts_complex = False

    def rule(
        self,
        g: Tensor,
        p: Any,
        t: Step,
        slots: tuple,
        *,
        eps: Any,
        precondition_frequency: int,
        **_: Any,
    ) -> tuple[Tensor, tuple]:
        """Return the preconditioned gradient, and what its dimensions have added up to."""
        if g.numel() == 0:
            return g, slots
        sizes = sizes_of(g.shape)
        tensor = u = g.reshape(sizes)
        power = 2 * len(sizes)
        new = by_dimension(slots)
        for k, size in enumerate(sizes):
            h, root, d = new[k]
            if d is not None:
                d = d + tensor.movedim(k, 0).reshape(size, -1).square().sum(dim=1)
                shape = [size if j == k else 1 for j in range(len(sizes))]
                u = u * ((d + eps) ** (-1 / power)).reshape(shape)
                new[k] = (h, root, d)
                continue
            h = h + gram(tensor, k)
            now = _renewed(root, h, eps, power, is_due(t, precondition_frequency))
            u = times(u, now, k)
            new[k] = (h, None if root is None else now, d)
        return u.reshape(g.shape), tuple(x for column in zip(*new) for x in column)


def _renewed(root: Tensor | None, h: Tensor, eps: Any, power: int, due: Any) -> Tensor:
    """Return the inverse root of a preconditioner, or the one there is unless it is due."""
    if root is None:
        return inverse_root(h, eps, power)
    if isinstance(due, Tensor):
        return torch.where(due, inverse_root(h, eps, power), root)
    return inverse_root(h, eps, power) if due else root.clone()  # no two states share a tensor


def scale_by_shampoo(
    eps: Hyperparameter = 1e-4,
    precondition_frequency: int = 1,
    max_preconditioner_dim: int = 1024,
    precondition_1d: bool = False,
) -> GradientTransformation:
    r"""Multiply a gradient by an inverse root of a matrix along each of its dimensions.

    For a matrix :math:`G_t`:

    .. math::
        L_t = L_{t-1} + G_t G_t^\top, \qquad R_t = R_{t-1} + G_t^\top G_t, \qquad
        U_t = (L_t + \epsilon I)^{-1/4}\, G_t\, (R_t + \epsilon I)^{-1/4}

    with :math:`L_0 = R_0 = 0`, and for a tensor of :math:`k` dimensions the same along each of
    them, with the power :math:`-1 / 2k`. Of a dimension that is longer than
    ``max_preconditioner_dim`` only the diagonal is kept, as in the paper. So it is for a vector,
    which has Adagrad's rule:

    .. math:: d_t = d_{t-1} + g_t^2, \qquad u_t = g_t / \sqrt{d_t + \epsilon}

    A number is a vector with one entry. Of more than four dimensions the last ones are taken as
    one.

    Args:
        eps: :math:`\epsilon > 0`, added to every matrix: the :math:`H_0 = \epsilon I` of the paper.
        precondition_frequency: The roots of matrices are those of the first step, and then of each
            so many after it. Gradients are added up at every step, and diagonals always new.
        max_preconditioner_dim: The greatest size of a dimension that has a matrix.
        precondition_1d: Give vectors a matrix, too: :math:`(H_t + \epsilon I)^{-1/2} g_t`, the full
            matrix of Adagrad.

    Slots: for each dimension :math:`k` from 0 ``preconditioner_k``, a square matrix, and
    ``inverse_root_k``, its root if ``precondition_frequency`` is more than 1; or ``diagonal_k``, a
    vector. Those that a parameter does not need are ``None``.

    Differentiable in gradients, slots and ``eps``, to every order, in reverse and forward mode. A
    sum of few :math:`G G^\top` has the eigenvalue 0 many times; the derivative of the root is that
    of a function of the whole matrix, which is finite and exact there. It has no fused kernel.

    Raises:
        ValueError: If a number is out of bounds.
        TypeError: If a gradient is complex.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.scale_by_shampoo(eps=1e-8)
        >>> g = [torch.tensor([[3.0, 0.0], [0.0, -0.5]])]
        >>> updates, state = tx.update(g, tx.init(g))
        >>> updates[0].round(decimals=4)
        tensor([[ 1.,  0.],
                [ 0., -1.]])
        >>> state.preconditioner_0
        [tensor([[9.0000, 0.0000],
                [0.0000, 0.2500]])]

    Reference:
        Gupta, Koren and Singer, Shampoo: preconditioned stochastic tensor optimization, ICML 2018,
        algorithms 1 and 2, https://arxiv.org/abs/1802.09568.
    """
    return ScaleByShampoo(eps, precondition_frequency, max_preconditioner_dim, precondition_1d)


def shampoo(
    lr: Hyperparameter = 0.1,
    momentum: Hyperparameter = 0.0,
    weight_decay: Hyperparameter = 0.0,
    eps: Hyperparameter = 1e-4,
    precondition_frequency: int = 1,
    max_preconditioner_dim: int = 1024,
    precondition_1d: bool = False,
    *,
    maximize: bool = False,
    use_accelerated_op: bool | None = None,
) -> GradientTransformation:
    r"""Shampoo: gradients multiplied by the inverse root of a matrix along each dimension.

    For a matrix:

    .. math::
        g_t = \nabla f(p_{t-1}) + \lambda p_{t-1}, \qquad
        L_t = L_{t-1} + g_t g_t^\top, \qquad R_t = R_{t-1} + g_t^\top g_t, \\
        u_t = (L_t + \epsilon I)^{-1/4}\, g_t\, (R_t + \epsilon I)^{-1/4}, \qquad
        b_t = \mu b_{t-1} + u_t, \qquad p_t = p_{t-1} - \eta\, b_t

    :math:`u_t` is :func:`torchopt.scale_by_shampoo`, which also gives the rule for vectors and for
    tensors of more dimensions.

    Args:
        lr: Learning rate :math:`\eta \ge 0`.
        momentum: :math:`\mu \ge 0`, of preconditioned gradients. The Python number 0 keeps no
            buffer.
        weight_decay: :math:`\lambda \ge 0`; needs ``params`` in ``update``.
        eps: :math:`\epsilon > 0`, added to the diagonal of every matrix.
        precondition_frequency: After how many steps roots are computed again, >= 1.
        max_preconditioner_dim: The greatest size of a dimension that has a matrix, >= 1.
        precondition_1d: Give vectors a matrix, too.
        maximize: Ascend instead of descend.
        use_accelerated_op: Fused kernels: ``None`` if available, ``True`` required,
            ``False`` never. The root of a matrix has none.

    It is the algorithm of the paper. Later versions differ: they average gradients instead of
    summing them up, begin with another optimizer, and take its step size (grafting).

    Slots: ``preconditioner_k``, ``inverse_root_k`` and ``diagonal_k`` of each dimension, as for
    :func:`torchopt.scale_by_shampoo`, and ``momentum_buffer``. Differentiable in gradients,
    parameters, slots and every number.

    **What a meta-gradient reaches.** Everything, also where preconditioners have equal eigenvalues;
    between two computations of the roots, gradients only by themselves.

    Raises:
        ValueError: If a number is out of bounds, or ``update`` is called without ``params`` where
            there is weight decay.
        TypeError: If a gradient is complex.
        RuntimeError: If ``use_accelerated_op=True``.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.shampoo(lr=0.1, eps=1e-8)
        >>> params = {"w": torch.tensor([[1.0, 0.0], [0.0, 1.0]])}
        >>> grads = {"w": torch.tensor([[3.0, 0.0], [0.0, -0.5]])}
        >>> updates, state = tx.update(grads, tx.init(params), params)
        >>> torchopt.apply_updates(params, updates)
        {'w': tensor([[0.9000, 0.0000],
                [0.0000, 1.1000]])}

    Reference:
        Gupta, Koren and Singer, ICML 2018, https://arxiv.org/abs/1802.09568.
    """
    tx = chain(
        flip_sign(maximize),
        add_decayed_weights(weight_decay),
        scale_by_shampoo(eps, precondition_frequency, max_preconditioner_dim, precondition_1d),
        trace(momentum),
        scale_by_learning_rate(lr),
    )
    return accelerated(tx, use_accelerated_op)


class Shampoo(Optimizer):
    """:func:`torchopt.shampoo` as a ``torch.optim.Optimizer``."""

    @from_recipe(shampoo)
    def __init__(self, params: Any) -> None:
        """Take the parameters, then the arguments of :func:`torchopt.shampoo`."""


class MetaShampoo(MetaOptimizer):
    """:func:`torchopt.shampoo` as a differentiable optimizer of a network."""

    @meta_from_recipe(shampoo)
    def __init__(self, module: Any) -> None:
        """Take the network, then the arguments of :func:`torchopt.shampoo`."""
