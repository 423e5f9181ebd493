"""SOAP: Adam in the eigenbasis of Shampoo's preconditioners."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchopt.base import misuse
from torchopt.base.numerics import (
    is_zero,
    moving_average,
    moving_average_of_square,
    over_root,
    power,
)
from torchopt.base.spectral import eigenbasis, power_iterated
from torchopt.core.accelerated_op import accelerated
from torchopt.core.chaining import chain
from torchopt.core.hyper import flag, hyper
from torchopt.core.rules import ElementwiseTransformation, TensorTransformation
from torchopt.core.slots import Slot
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
from torchopt.transforms.basic import flip_sign, scale_by_learning_rate
from torchopt.transforms.wrap import masked
from torchopt.typing import Hyperparameter, Step


def _has_basis(
    size: int,
    among: tuple[int, ...],
    *,
    max_preconditioner_dim: int,
    precondition_1d: bool,
    **_: Any,
) -> bool:
    return (len(among) > 1 or precondition_1d) and 1 < size <= max_preconditioner_dim


@transformation
class ScaleBySoap(TensorTransformation):
    """Take Adam's direction in another basis; see :func:`scale_by_soap`."""

    betas: tuple[Hyperparameter, Hyperparameter] = hyper(
        (0.95, 0.95), ge=0, lt=1, length=2, scalar=True
    )
    eps: Hyperparameter = hyper(1e-8, ge=0, scalar=True)
    shampoo_beta: Hyperparameter | None = hyper(None, ge=0, lt=1, optional=True, scalar=True)
    precondition_frequency: int = hyper(10, ge=1, integer=True)
    max_preconditioner_dim: int = hyper(10000, ge=1, integer=True)
    precondition_1d: bool = flag(False)

    slots = (
        Slot("exp_avg"),
        Slot("exp_avg_sq"),
        *for_dimensions("preconditioner", _has_basis),
        *for_dimensions("basis", _has_basis, identity),
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
        betas: tuple[Any, Any],
        eps: Any,
        shampoo_beta: Any,
        precondition_frequency: int,
        **_: Any,
    ) -> tuple[Tensor, tuple]:
        """Return Adam's direction turned back; at the first step nothing, but a first basis."""
        if g.numel() == 0:
            return g, slots
        sizes = sizes_of(g.shape)
        m, v, *rest = slots
        matrices = by_dimension(tuple(rest))
        bases = [q for _, q in matrices]
        first, tensor = t == 1, g.reshape(sizes)
        if isinstance(first, Tensor) or not first:
            u, m_moved, v_moved = _direction(tensor, m, v, bases, betas, eps, t)
            m, v, u = (
                torch.where(first, old, new) if isinstance(first, Tensor) else new
                for old, new in ((m, m_moved), (v, v_moved), (0.0, u))
            )
        else:
            # in the graph, so that no step looks as if it had been detached
            u = nothing = g * 0.0
            m, v = m + nothing, v + nothing
        decay = betas[1] if shampoo_beta is None else shampoo_beta
        due = is_due(t, precondition_frequency)
        new, v = _turned(tensor, v.reshape(sizes), matrices, decay, first, due)
        matrices = [x for column in zip(*new) for x in column]
        return u.reshape(g.shape), (m, v.reshape(g.shape), *matrices)


def _direction(
    g: Tensor, m: Tensor, v: Tensor, bases: list[Any], betas: tuple[Any, Any], eps: Any, t: Step
) -> tuple[Tensor, Tensor, Tensor]:
    """Return Adam's direction and its two moments, of which the second is in the basis."""
    b1, b2 = betas
    shape, sizes = m.shape, g.shape
    m = moving_average(m, g.reshape(shape), b1)
    v = moving_average_of_square(v, _into(g, bases).reshape(shape), b2)
    count = t - 1  # the first step has moved nothing; it is left out where it gets here
    count = torch.clamp(count, min=1) if isinstance(count, Tensor) else count
    scale = (1 - power(b1, count)) / (1 - power(b2, count)) ** 0.5
    turned = _into(m.reshape(sizes), bases)
    u = over_root(turned, v.reshape(sizes), scale, scale * eps)
    return _out_of(u, bases).reshape(shape), m, v


def _into(g: Tensor, bases: list[Any]) -> Tensor:
    """Return a tensor in the coordinates of the bases of its dimensions."""
    for k, q in enumerate(bases):
        g = g if q is None else times(g, q.mT, k)
    return g


def _out_of(g: Tensor, bases: list[Any]) -> Tensor:
    """Undo :func:`_into`."""
    for k, q in enumerate(bases):
        g = g if q is None else times(g, q, k)
    return g


def _turned(
    g: Tensor, v: Tensor, matrices: list[tuple[Any, Any]], decay: Any, first: Any, due: Any
) -> tuple[list[tuple[Any, Any]], Tensor]:
    """Return preconditioners and bases after a gradient, and the second moment in their order."""
    new = []
    for k, (h, q) in enumerate(matrices):
        if q is None:
            new.append((h, q))
            continue
        h = moving_average(h, gram(g, k), decay)
        if isinstance(first, Tensor):
            turned, order = power_iterated(h, q)
            moved = _permuted(v, order, k)
            v = torch.where(due & ~first, moved, v)
            q = torch.where(first, eigenbasis(h), torch.where(due, turned, q))
        elif first:
            q = eigenbasis(h)
        elif due:
            q, order = power_iterated(h, q)
            v = _permuted(v, order, k)
        else:
            q = q.clone()  # no two states share a tensor
        new.append((h, q))
    return new, v


def _permuted(v: Tensor, order: Tensor, k: int) -> Tensor:
    """Return a tensor with the slices along a dimension in another order."""
    shape = [-1 if j == k else 1 for j in range(v.dim())]
    return v.take_along_dim(order.reshape(shape), dim=k)


@transformation
class DecayAfterStep(ElementwiseTransformation):
    """Shrink parameters after they have moved, but for the first step; see :func:`soap`."""

    lr: Hyperparameter = hyper(ge=0, shared=True)
    weight_decay: Hyperparameter = hyper(0.0, ge=0)

    uses_step = True

    def rule(
        self, g: Tensor, p: Any, t: Step, slots: tuple, *, lr: Any, weight_decay: Any
    ) -> tuple[Tensor, tuple]:
        """Return ``g - lr * weight_decay * (p + g)``, or ``g``."""
        if is_zero(weight_decay):
            return g, slots
        p, first = misuse.given_params("Weight decay", p), t == 1
        if not isinstance(first, Tensor) and first:
            return g, slots
        u = g - (p + g) * (lr * weight_decay)
        return (torch.where(first, g, u) if isinstance(first, Tensor) else u), slots


def scale_by_soap(
    betas: tuple[Hyperparameter, Hyperparameter] = (0.95, 0.95),
    eps: Hyperparameter = 1e-8,
    shampoo_beta: Hyperparameter | None = None,
    precondition_frequency: int = 10,
    max_preconditioner_dim: int = 10000,
    precondition_1d: bool = False,
) -> GradientTransformation:
    r"""Take Adam's direction in the eigenbasis of Shampoo's preconditioners.

    For a matrix :math:`G_t`, with :math:`n = t - 1`:

    .. math::
        G'_t = Q_L^\top G_t Q_R, \qquad
        M_t = \beta_1 M_{t-1} + (1 - \beta_1) G_t, \qquad
        V_t = \beta_2 V_{t-1} + (1 - \beta_2) G'_t \odot G'_t, \\
        U_t = \frac{\sqrt{1 - \beta_2^n}}{1 - \beta_1^n}\;
            Q_L\, \frac{Q_L^\top M_t Q_R}{\sqrt{V_t} + \epsilon}\, Q_R^\top, \\
        L_t = \beta_s L_{t-1} + (1 - \beta_s)\, G_t G_t^\top, \qquad
        R_t = \beta_s R_{t-1} + (1 - \beta_s)\, G_t^\top G_t

    and for a tensor of more dimensions the same along each of them. After the first update
    :math:`Q_L` and :math:`Q_R` are the eigenvectors of :math:`L_1` and :math:`R_1`, the greatest
    eigenvalue first; **that update moves nothing** and is not counted by the bias correction, as in
    the authors' code. When :math:`n` is a multiple of ``precondition_frequency`` the bases are
    brought up to date by one step of orthogonal iteration, :math:`Q_L` becoming that of
    :math:`L_t Q_L = QR` with columns sorted by :math:`q^\top L_t q`, and :math:`V` with them.

    A dimension that is longer than ``max_preconditioner_dim`` is not turned, and neither are
    vectors, which have Adam's rule from the second update on. Of more than four dimensions the last
    ones are taken as one.

    Args:
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1).
        eps: :math:`\epsilon \ge 0`, added to the root before the bias correction.
        shampoo_beta: :math:`\beta_s` in [0, 1); ``None`` for :math:`\beta_2`. (The authors' code
            has -1 for that.)
        precondition_frequency: After how many steps the bases are brought up to date.
        max_preconditioner_dim: The greatest size of a dimension that has a basis.
        precondition_1d: Give vectors a basis, too.

    Slots: ``exp_avg``, which is not turned (the authors' code keeps it in the basis), and
    ``exp_avg_sq``, in the basis; for each dimension :math:`k` from 0 that has one
    ``preconditioner_k`` and ``basis_k``, square matrices, ``None`` for the others.

    Differentiable in gradients, slots and every number, to every order, in reverse and forward
    mode.

    **What a meta-gradient reaches.** Everything, the bases included: they turn with the gradients
    that they are made of. Where these leave a basis open, as do fewer gradients than a matrix has
    rows, algorithms for eigenvectors return what chance has it, with derivatives of any size;
    here such a basis is completed from unit vectors or, later on, from the basis before, which has
    exact derivatives. Eigenvalues other than zero that are equal, to rounding, are a corner: within
    their space the basis counts as fixed. So does the order of columns. Take float64 for it, or a
    large ``eps``: where gradients have a lower rank than their matrix, as those of a few examples
    have, what rounding leaves beside them is divided by its own size, as in Adam, and eigenvectors
    of small eigenvalues carry few digits in float32. (Shampoo's roots carry them all.)

    Raises:
        ValueError: If a number is out of bounds.
        TypeError: If a gradient is complex.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.scale_by_soap()
        >>> g = [torch.tensor([[2.0, 0.0], [0.0, -0.5]])]
        >>> updates, state = tx.update(g, tx.init(g), inplace=False)
        >>> updates[0].abs().max(), state.basis_0[0].abs()
        (tensor(0.), tensor([[1., 0.],
                [0., 1.]]))
        >>> tx.update(g, state)[0][0].round(decimals=4)
        tensor([[ 1.,  0.],
                [ 0., -1.]])

    Reference:
        Vyas et al., SOAP: improving and stabilizing Shampoo using Adam, ICLR 2025, algorithms 3 and
        4, https://arxiv.org/abs/2409.11321; https://github.com/nikhilvyas/SOAP.
    """
    return ScaleBySoap(
        betas, eps, shampoo_beta, precondition_frequency, max_preconditioner_dim, precondition_1d
    )


def soap(
    lr: Hyperparameter = 3e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.95, 0.95),
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0.01,
    shampoo_beta: Hyperparameter | None = None,
    precondition_frequency: int = 10,
    max_preconditioner_dim: int = 10000,
    precondition_1d: bool = False,
    *,
    mask: Any = None,
    maximize: bool = False,
    use_accelerated_op: bool | None = None,
) -> GradientTransformation:
    r"""SOAP: Adam in the eigenbasis of Shampoo's preconditioners.

    For a matrix, with :math:`n = t - 1` and the eigenvectors :math:`Q_L` and :math:`Q_R` of
    :math:`L` and :math:`R`:

    .. math::
        L_t = \beta_s L_{t-1} + (1 - \beta_s)\, g_t g_t^\top, \qquad
        R_t = \beta_s R_{t-1} + (1 - \beta_s)\, g_t^\top g_t, \\
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) (Q_L^\top g_t Q_R)^2, \\
        u_t = \frac{\sqrt{1 - \beta_2^n}}{1 - \beta_1^n}\;
            Q_L\, \frac{Q_L^\top m_t Q_R}{\sqrt{v_t} + \epsilon}\, Q_R^\top, \qquad
        p_t = (1 - \eta \lambda)\, (p_{t-1} - \eta\, u_t)

    The first step moves nothing. :math:`u_t` is :func:`torchopt.scale_by_soap`, which also says
    when the eigenvectors are updated.

    Args:
        lr: Learning rate :math:`\eta \ge 0`.
        betas: Decay rates :math:`(\beta_1, \beta_2)` of the two moments, each in [0, 1).
        eps: :math:`\epsilon \ge 0`, added to the root of the second moment.
        weight_decay: :math:`\lambda \ge 0`, decoupled; needs ``params`` in ``update``.
        shampoo_beta: Decay rate :math:`\beta_s` of the preconditioners, in [0, 1); ``None`` for
            that of the second moment.
        precondition_frequency: After how many steps the bases are brought up to date, >= 1.
        max_preconditioner_dim: The greatest size of a dimension that has a basis, >= 1. The
            authors' ``max_precond_dim``.
        precondition_1d: Give vectors a basis, too.
        mask: Which parameters decay; see :func:`torchopt.masked`. ``None`` means all.
        maximize: Ascend instead of descend.
        use_accelerated_op: Fused kernels: ``None`` if available, ``True`` required,
            ``False`` never. A change of basis has none.

    It is the authors' code of December 2024, defaults included, without ``normalize_grads``,
    ``merge_dims`` and ``correct_bias=False``. As there, and unlike AdamW's, weights shrink after
    they have moved.

    Slots: ``exp_avg``, ``exp_avg_sq``, ``preconditioner_k`` and ``basis_k`` of each dimension, as
    for :func:`torchopt.scale_by_soap`. Differentiable in gradients, parameters, slots and every
    number.

    **What a meta-gradient reaches.** Everything, also the bases; see
    :func:`torchopt.scale_by_soap`. Of the gradient of the first step only they and later bases
    know.

    Raises:
        ValueError: If a number is out of bounds, or ``update`` is called without ``params`` where
            there is weight decay.
        TypeError: If a gradient is complex.
        RuntimeError: If ``use_accelerated_op=True``.

    Example:
        >>> import torch, torchopt
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        >>> optimizer = torchopt.SOAP(net.parameters(), lr=0.01)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     net(torch.ones(2, 4)).square().mean().backward()
        ...     optimizer.step()
        >>> optimizer.state[net[0].weight]["basis_0"].shape
        torch.Size([8, 8])

    Reference:
        Vyas et al., SOAP: improving and stabilizing Shampoo using Adam, ICLR 2025,
        https://arxiv.org/abs/2409.11321.
    """
    decay = DecayAfterStep(lr, weight_decay)
    tx = chain(
        flip_sign(maximize),
        scale_by_soap(
            betas,
            eps,
            shampoo_beta,
            precondition_frequency,
            max_preconditioner_dim,
            precondition_1d,
        ),
        scale_by_learning_rate(lr),
        decay if mask is None else masked(decay, mask),
    )
    return accelerated(tx, use_accelerated_op)


class SOAP(Optimizer):
    """:func:`torchopt.soap` as a ``torch.optim.Optimizer``."""

    @from_recipe(soap)
    def __init__(self, params: Any) -> None:
        """Take the parameters, then the arguments of :func:`torchopt.soap`."""


class MetaSOAP(MetaOptimizer):
    """:func:`torchopt.soap` as a differentiable optimizer of a network."""

    @meta_from_recipe(soap)
    def __init__(self, module: Any) -> None:
        """Take the network, then the arguments of :func:`torchopt.soap`."""
