"""Sophia: momentum over an estimate of the Hessian's diagonal, clipped entry by entry."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchopt.base.numerics import moving_average
from torchopt.core.accelerated_op import accelerated
from torchopt.core.chaining import chain
from torchopt.core.engine import Leaves
from torchopt.core.extra_values import tensors_of
from torchopt.core.hyper import hyper
from torchopt.core.rules import ElementwiseTransformation
from torchopt.core.slots import Slot
from torchopt.core.transform import GradientTransformation, transformation
from torchopt.optim.meta_optimizer import MetaOptimizer
from torchopt.optim.named import from_recipe, meta_from_recipe
from torchopt.optim.optimizer import Optimizer
from torchopt.transforms.basic import add_decayed_weights, flip_sign, scale_by_learning_rate
from torchopt.typing import Hyperparameter, Step


@transformation
class ScaleBySophia(ElementwiseTransformation):
    """Divide the momentum by the curvature, and clip; see :func:`scale_by_sophia`."""

    betas: tuple[Hyperparameter, Hyperparameter] = hyper((0.965, 0.99), ge=0, lt=1, length=2)
    eps: Hyperparameter = hyper(1e-12, ge=0)
    gamma: Hyperparameter = hyper(0.01, ge=0)
    clip_threshold: Hyperparameter = hyper(1.0, ge=0)

    slots = (Slot("exp_avg"), Slot("hessian"))
    reads = ("hessian",)
    accepts_complex = False

    def refreshed(self, leaves: Leaves) -> list[tuple[Tensor | None, ...]]:
        """Return the slots with the estimate of this step in their average."""
        estimates = tensors_of(leaves, "hessian")
        each = zip(leaves.slots, estimates, leaves.hyper)
        return [(m, _averaged(h, x, row["betas"][1])) for (m, h), x, row in each]

    def rule(
        self,
        g: Tensor,
        p: Any,
        t: Step,
        slots: tuple,
        *,
        betas: tuple[Any, Any],
        eps: Any,
        gamma: Any,
        clip_threshold: Any,
    ) -> tuple[Tensor, tuple]:
        """Return the clipped quotient of momentum and curvature, and the momentum."""
        m, h = slots
        m = moving_average(m, g, betas[0])
        d = (h * gamma).clamp(min=eps)
        # before the quotient, which may be infinite: so no derivative is 0 * inf
        clipped = m.abs() >= d * clip_threshold
        u = torch.where(clipped, m.sign() * clip_threshold, m / torch.where(clipped, 1.0, d))
        return u, (m, h)


def _averaged(h: Tensor, estimate: Tensor, decay: Any) -> Tensor:
    return moving_average(h, estimate, decay).to(h.dtype)


def scale_by_sophia(
    betas: tuple[Hyperparameter, Hyperparameter] = (0.965, 0.99),
    eps: Hyperparameter = 1e-12,
    gamma: Hyperparameter = 0.01,
    clip_threshold: Hyperparameter = 1.0,
) -> GradientTransformation:
    r"""Divide the momentum by a running estimate of the Hessian's diagonal, and clip each entry.

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
        h_t = \begin{cases} \beta_2 h_{t-1} + (1 - \beta_2)\, \hat h_t
            & \text{if an estimate } \hat h_t \text{ is given} \\
            h_{t-1} & \text{otherwise} \end{cases}, \qquad
        u_t = \operatorname{clip}\!\left(\frac{m_t}{\max(\gamma h_t, \epsilon)}, \rho\right)

    The estimate is given with the gradients of some steps, say every tenth: ``tx.update(grads,
    state, params, hessian=estimate)``, ``optimizer.step(hessian=estimate)`` or ``inner.step(loss,
    hessian=estimate)``, a tensor for each parameter, as :func:`torchopt.hutchinson_diagonal` and
    :func:`torchopt.gauss_newton_bartlett` return them (in the object-oriented API a list, or a
    dict by name if the optimizer is of ``named_parameters()``). Before the first one :math:`h` is 0
    and the update the sign of the momentum, times :math:`\rho`, as wherever the curvature is not
    positive.

    Args:
        betas: Decay rates :math:`(\beta_1, \beta_2)`, each in [0, 1); the second one counts
            estimates.
        eps: :math:`\epsilon \ge 0`, the least curvature.
        gamma: :math:`\gamma \ge 0`: the larger, the fewer entries are clipped.
        clip_threshold: :math:`\rho \ge 0`; 1 in the paper.

    Slots: ``exp_avg``, ``hessian``. Differentiable in gradients, slots, estimates and every number,
    where the quotient is not clipped; of a clipped entry only the derivative by
    ``clip_threshold`` is left, the sign of its momentum.

    Raises:
        ValueError: If a number is out of bounds, or an estimate does not fit its parameter.
        TypeError: If a gradient is complex or an estimate no tensor.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.scale_by_sophia(betas=(0.0, 0.0), gamma=1.0)
        >>> g, h = [torch.tensor([3.0, -8.0])], [torch.tensor([4.0, 4.0])]
        >>> tx.update(g, tx.init(g), hessian=h)[0]
        [tensor([ 0.7500, -1.0000])]

    Reference:
        Liu et al., Sophia: a scalable stochastic second-order optimizer for language model
        pre-training, ICLR 2024, algorithm 3, https://arxiv.org/abs/2305.14342.
    """
    return ScaleBySophia(betas, eps, gamma, clip_threshold)


def sophia(
    lr: Hyperparameter = 1e-4,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.965, 0.99),
    eps: Hyperparameter = 1e-12,
    weight_decay: Hyperparameter = 0.1,
    gamma: Hyperparameter = 0.01,
    clip_threshold: Hyperparameter = 1.0,
    *,
    mask: Any = None,
    maximize: bool = False,
    use_accelerated_op: bool | None = None,
) -> GradientTransformation:
    r"""Sophia: momentum over the curvature, clipped, with decoupled weight decay.

    With an estimate :math:`\hat h_t` of the Hessian's diagonal at some of the steps:

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
        h_t = \begin{cases} \beta_2 h_{t-1} + (1 - \beta_2)\, \hat h_t
            & \text{if an estimate is given} \\
            h_{t-1} & \text{otherwise} \end{cases}, \\
        p_t = p_{t-1} - \eta \left( \operatorname{clip}\!\left(
            \frac{m_t}{\max(\gamma h_t, \epsilon)}, \rho\right) + \lambda p_{t-1} \right)

    The clipped quotient is :func:`torchopt.scale_by_sophia`, which says how estimates are passed.
    You make them with :func:`torchopt.hutchinson_diagonal` (Sophia-H) or
    :func:`torchopt.gauss_newton_bartlett` (Sophia-G).

    Optax's ``sophia`` makes its estimate itself and uses it from the step after on, corrects the
    bias of the momentum, and has ``eps=1e-8`` and ``weight_decay=1e-4``; the authors' ``SophiaG``
    calls :math:`\gamma` ``rho`` (0.04).

    Args:
        lr: Learning rate :math:`\eta \ge 0`.
        betas: Decay rates :math:`(\beta_1, \beta_2)` of momentum and curvature, each in [0, 1).
        eps: :math:`\epsilon \ge 0`, the least curvature.
        weight_decay: :math:`\lambda \ge 0`; needs ``params`` in ``update``.
        gamma: Factor :math:`\gamma \ge 0` of the curvature; 0.01 in the paper for Hutchinson's
            estimate, 0.05 for the other.
        clip_threshold: :math:`\rho \ge 0`, the largest update of an entry.
        mask: Which parameters decay; see :func:`torchopt.masked`. ``None`` means all.
        maximize: Ascend instead of descend; the estimates are those of the negative loss then.
        use_accelerated_op: Fused kernels: ``None`` if available, ``True`` required,
            ``False`` never.

    Slots: ``exp_avg``, ``hessian``. Differentiable as :func:`torchopt.scale_by_sophia` is, and in
    parameters, ``lr`` and ``weight_decay``.

    **What a meta-gradient reaches.** Clipped entries move by a constant: through them only the
    learning rate, the threshold, the weight decay and the parameters are learned. An estimate that
    has been made with ``create_graph=True`` passes its derivative on, too.

    Raises:
        ValueError: If a number is out of bounds, or an estimate does not fit its parameter.
        TypeError: If a gradient is complex or an estimate no tensor.
        RuntimeError: If ``use_accelerated_op=True`` cannot be met.

    Example:
        >>> import torch, torchopt
        >>> from torch.func import functional_call
        >>> net, x = torch.nn.Linear(3, 1), torch.randn(8, 3)
        >>> named = dict(net.named_parameters())
        >>> optimizer = torchopt.Sophia(net.named_parameters(), lr=0.1)
        >>> def loss_fn(params):
        ...     return functional_call(net, params, x).square().mean()
        >>> for step in range(20):
        ...     optimizer.zero_grad()
        ...     loss_fn(named).backward()
        ...     if step % 10 == 0:
        ...         optimizer.step(hessian=torchopt.hutchinson_diagonal(loss_fn, named))
        ...     else:
        ...         optimizer.step()

    Reference:
        Liu et al., ICLR 2024, algorithm 3, https://arxiv.org/abs/2305.14342.
    """
    tx = chain(
        flip_sign(maximize),
        ScaleBySophia(betas, eps, gamma, clip_threshold),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(lr),
    )
    return accelerated(tx, use_accelerated_op)


class Sophia(Optimizer):
    """:func:`torchopt.sophia` as a ``torch.optim.Optimizer``."""

    @from_recipe(sophia)
    def __init__(self, params: Any) -> None:
        """Take the parameters, then the arguments of :func:`torchopt.sophia`."""


class MetaSophia(MetaOptimizer):
    """:func:`torchopt.sophia` as a differentiable optimizer of a network."""

    @meta_from_recipe(sophia)
    def __init__(self, module: Any) -> None:
        """Take the network, then the arguments of :func:`torchopt.sophia`."""
