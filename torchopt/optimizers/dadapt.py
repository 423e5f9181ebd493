"""D-Adaptation of SGD and Adagrad: rates that are estimates of the distance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchopt.base import misuse
from torchopt.base.numerics import over_root, root
from torchopt.core.accelerated_op import accelerated
from torchopt.core.chaining import chain
from torchopt.core.engine import Leaves
from torchopt.core.hyper import hyper
from torchopt.core.slots import PARAM, Slot, filled
from torchopt.core.transform import GradientTransformation, transformation
from torchopt.optim.meta_optimizer import MetaOptimizer
from torchopt.optim.named import from_recipe, meta_from_recipe
from torchopt.optim.optimizer import Optimizer
from torchopt.optimizers.distance import (
    ESTIMATE,
    DistanceEstimating,
    joined,
    of_number,
)
from torchopt.transforms.basic import add_decayed_weights, flip_sign
from torchopt.transforms.clip import global_norm, whole_number
from torchopt.typing import Hyperparameter, Step


def _over(a: Tensor, b: Tensor) -> Tensor:
    """Return a quotient of numbers; zero over zero, with derivative zero."""
    none = b == 0
    return torch.where(none, 0.0, a / torch.where(none, 1.0, b))


@transformation
class StepByDAdaptSGD(DistanceEstimating):
    """The whole step of SGD with D-Adaptation; see :func:`dadapt_sgd`."""

    lr: Hyperparameter = hyper(1.0, ge=0, scalar=True)
    momentum: Hyperparameter = hyper(0.0, ge=0, lt=1)
    estim_lr0: Hyperparameter = hyper(1e-6, gt=0, scalar=True)

    slots = (
        Slot("grad_sum"),
        Slot("params0", start=PARAM),
        Slot("numerator_weighted", shape=of_number),
        Slot("grad_norm0", shape=of_number),
        ESTIMATE,
    )

    def step(self, leaves: Leaves) -> tuple[list[Tensor], list[tuple[Tensor | None, ...]]]:
        """Take the norm of the first gradient that is not zero, for all parameters, then step."""
        norm = global_norm(leaves.g)
        known = joined([row[3] for row in leaves.slots], leaves.t)
        norms = [torch.where(x == 0, norm.to(device=x.device, dtype=x.dtype), x) for x in known]
        slots = [(*row[:3], x, row[4]) for row, x in zip(leaves.slots, norms)]
        return super().step(
            Leaves(leaves.g, leaves.p, leaves.t, slots, leaves.hyper, leaves.index, leaves.call)
        )

    def common(self, d: Tensor, t: Step, *, lr: Any, **_: Any) -> Tensor:
        """Return the rate for gradients whose first norm is 1."""
        return (d * lr).to(d.dtype)

    def look(
        self, g: Tensor, p: Any, slots: tuple, common: Any, **_: Any
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """Return the weighted sum of gradients, and how they agree with those before them."""
        s, p0, numerator, norm = slots
        rate = _over(common, norm)
        numerator = numerator + rate * whole_number((g * s).sum())
        s = s + g * rate
        return (s, p0, numerator, norm), numerator, whole_number(s.square().sum())

    def estimate(self, numerator: Tensor, denominator: Tensor) -> Tensor:
        """Return twice the numerator over the norm of the sum."""
        return 2 * super().estimate(numerator, root(denominator))

    def move(
        self,
        g: Tensor,
        p: Any,
        slots: tuple,
        common: Any,
        new: Tensor,
        *,
        momentum: Any,
        **_: Any,
    ) -> Tensor:
        """Return the way to the average of the weights that the sum leads to."""
        return (slots[1] - slots[0] - misuse.given_params("dadapt_sgd", p)) * (1 - momentum)


def _initial_sum(param: Tensor, *, initial_accumulator_value: Any, **_: Any) -> Tensor:
    return filled(param, initial_accumulator_value)


@transformation
class StepByDAdaptAdagrad(DistanceEstimating):
    """The whole step of Adagrad with D-Adaptation; see :func:`dadapt_adagrad`."""

    lr: Hyperparameter = hyper(1.0, ge=0, scalar=True)
    momentum: Hyperparameter = hyper(0.0, ge=0, lt=1)
    eps: Hyperparameter = hyper(1e-6, ge=0)
    estim_lr0: Hyperparameter = hyper(1e-6, gt=0, scalar=True)
    initial_accumulator_value: Hyperparameter = hyper(1e-6, ge=0)

    slots = (
        Slot("sum", start=_initial_sum),
        Slot("grad_sum"),
        Slot("params0", start=PARAM),
        Slot("grad_sq_weighted", shape=of_number),
        ESTIMATE,
    )

    def common(self, d: Tensor, t: Step, *, lr: Any, **_: Any) -> Tensor:
        """Return the rate."""
        return (d * lr).to(d.dtype)

    def look(
        self, g: Tensor, p: Any, slots: tuple, common: Any, *, eps: Any, **_: Any
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """Return the sums of squares and of gradients, and what the estimate is made of."""
        a, s, p0, squares = slots
        a = a + g * g
        squares = squares + common.square() * whole_number((g * over_root(g, a, 1.0, eps)).sum())
        s = s + g * common
        numerator = whole_number((s * over_root(s, a, 1.0, eps)).sum()) - squares
        return (a, s, p0, squares), numerator, whole_number(s.abs().sum())

    def move(
        self,
        g: Tensor,
        p: Any,
        slots: tuple,
        common: Any,
        new: Tensor,
        *,
        momentum: Any,
        eps: Any,
        **_: Any,
    ) -> Tensor:
        """Return the way to the average of the weights that the sum leads to."""
        a, s, p0, _squares = slots
        z = p0 - over_root(s, a, 1.0, eps)
        return (z - misuse.given_params("dadapt_adagrad", p)) * (1 - momentum)


def dadapt_sgd(
    lr: Hyperparameter = 1.0,
    momentum: Hyperparameter = 0.0,
    weight_decay: Hyperparameter = 0.0,
    estim_lr0: Hyperparameter = 1e-6,
    *,
    maximize: bool = False,
    use_accelerated_op: bool | None = None,
) -> GradientTransformation:
    r"""SGD with D-Adaptation, which finds its learning rate by an estimate of the distance.

    With norms and products over all parameters, and :math:`G` the norm of the first gradient that
    is not zero,

    .. math::
        g_t = \nabla f(p_{t-1}) + \lambda p_{t-1}, \qquad
        \eta_t = \frac{d_{t-1} \gamma}{G}, \qquad
        r_t = r_{t-1} + \eta_t \langle g_t, s_{t-1} \rangle, \qquad
        s_t = s_{t-1} + \eta_t g_t, \\
        d_t = \max\!\left(d_{t-1}, \frac{2 r_t}{\lVert s_t \rVert}\right), \qquad
        p_t = \mu\, p_{t-1} + (1 - \mu) (p_0 - s_t)

    Args:
        lr: :math:`\gamma \ge 0`, a factor of the rate: 1, or a schedule that ends at 0.
        momentum: :math:`\mu` in [0, 1).
        weight_decay: :math:`\lambda \ge 0`.
        estim_lr0: :math:`d_0 > 0`, the first estimate, well below the distance.
        maximize: Ascend instead of descend.
        use_accelerated_op: Fused kernels: ``None`` if available, ``True`` required,
            ``False`` never. Sums over all parameters have none.

    The estimate is one number for all parameters, as :func:`torchopt.prodigy` says. Where the
    gradient is zero for ever, nothing moves.

    Slots: ``grad_sum`` (:math:`s`), ``params0``, the first parameters, connected to them; and for
    each parameter the numbers ``numerator_weighted``, its part of :math:`r`, ``grad_norm0``
    (:math:`G`) and ``estim_lr``, the common :math:`d`. What a meta-gradient reaches: everything,
    the estimate too; in steps in which it does not grow it passes the old one alone.

    Raises:
        ValueError: If a number is out of bounds, or ``update`` is called without ``params``.

    Example:
        >>> import torch, torchopt
        >>> net = torch.nn.Linear(2, 1)
        >>> optimizer = torchopt.DAdaptSGD(net.parameters(), momentum=0.9)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     net(torch.ones(4, 2)).square().mean().backward()
        ...     optimizer.step()
        >>> bool(optimizer.state[net.weight]["estim_lr"] > 1e-6)
        True

    Reference:
        Defazio and Mishchenko, Learning-rate-free learning by D-Adaptation, ICML 2023,
        https://arxiv.org/abs/2301.07733, algorithm 4.
    """
    tx = chain(
        flip_sign(maximize),
        add_decayed_weights(weight_decay),
        StepByDAdaptSGD(lr, momentum, estim_lr0),
    )
    return accelerated(tx, use_accelerated_op)


def dadapt_adagrad(
    lr: Hyperparameter = 1.0,
    momentum: Hyperparameter = 0.0,
    weight_decay: Hyperparameter = 0.0,
    eps: Hyperparameter = 1e-6,
    estim_lr0: Hyperparameter = 1e-6,
    initial_accumulator_value: Hyperparameter = 1e-6,
    *,
    maximize: bool = False,
    use_accelerated_op: bool | None = None,
) -> GradientTransformation:
    r"""Adagrad with D-Adaptation, which finds its learning rate by an estimate of the distance.

    With :math:`\eta_t = d_{t-1} \gamma`, sums over all parameters, and
    :math:`\lVert x \rVert_t^2 = \langle x, x / (\sqrt{a_t} + \epsilon) \rangle`

    .. math::
        g_t = \nabla f(p_{t-1}) + \lambda p_{t-1}, \qquad
        a_t = a_{t-1} + g_t^2, \qquad s_t = s_{t-1} + \eta_t g_t, \qquad
        q_t = q_{t-1} + \eta_t^2 \lVert g_t \rVert_t^2, \\
        d_t = \max\!\left(d_{t-1},
            \frac{\lVert s_t \rVert_t^2 - q_t}{\lVert s_t \rVert_1}\right), \qquad
        p_t = \mu\, p_{t-1} + (1 - \mu) \left(p_0 - \frac{s_t}{\sqrt{a_t} + \epsilon}\right)

    Args:
        lr: :math:`\gamma \ge 0`, a factor of the rate: 1, or a schedule that ends at 0.
        momentum: :math:`\mu` in [0, 1).
        weight_decay: :math:`\lambda \ge 0`.
        eps: :math:`\epsilon \ge 0`.
        estim_lr0: :math:`d_0 > 0`, the first estimate, well below the distance.
        initial_accumulator_value: What :math:`a` is before the first step, >= 0.
        maximize: Ascend instead of descend.
        use_accelerated_op: Fused kernels: ``None`` if available, ``True`` required,
            ``False`` never. Sums over all parameters have none.

    The estimate is one number for all parameters, as :func:`torchopt.prodigy` says.

    Slots: ``sum`` (:math:`a`), ``grad_sum`` (:math:`s`), ``params0``, the first parameters,
    connected to them; and for each parameter the numbers ``grad_sq_weighted``, its part of
    :math:`q`, and ``estim_lr``, the common :math:`d`. What a meta-gradient reaches: everything, the
    estimate too; in steps in which it does not grow it passes the old one alone.

    Raises:
        ValueError: If a number is out of bounds, or ``update`` is called without ``params``.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.dadapt_adagrad()
        >>> params = {"w": torch.tensor([3.0, -1.0])}
        >>> state = tx.init(params)
        >>> for _ in range(300):
        ...     grads = {"w": 2 * params["w"]}
        ...     params, state = tx.apply_gradients(grads, state, params)
        >>> bool(params["w"].norm() < 1), bool(0.3 < state.estim_lr["w"] < 5)
        (True, True)

    Reference:
        Defazio and Mishchenko, ICML 2023, https://arxiv.org/abs/2301.07733, algorithm 2, as the
        authors' code has it.
    """
    tx = chain(
        flip_sign(maximize),
        add_decayed_weights(weight_decay),
        StepByDAdaptAdagrad(lr, momentum, eps, estim_lr0, initial_accumulator_value),
    )
    return accelerated(tx, use_accelerated_op)


class DAdaptSGD(Optimizer):
    """:func:`torchopt.dadapt_sgd` as a ``torch.optim.Optimizer``."""

    @from_recipe(dadapt_sgd)
    def __init__(self, params: Any) -> None:
        """Take the parameters, then the arguments of :func:`torchopt.dadapt_sgd`."""


class DAdaptAdagrad(Optimizer):
    """:func:`torchopt.dadapt_adagrad` as a ``torch.optim.Optimizer``."""

    @from_recipe(dadapt_adagrad)
    def __init__(self, params: Any) -> None:
        """Take the parameters, then the arguments of :func:`torchopt.dadapt_adagrad`."""


class MetaDAdaptSGD(MetaOptimizer):
    """:func:`torchopt.dadapt_sgd` as a differentiable optimizer of a network."""

    @meta_from_recipe(dadapt_sgd)
    def __init__(self, module: Any) -> None:
        """Take the network, then the arguments of :func:`torchopt.dadapt_sgd`."""


class MetaDAdaptAdagrad(MetaOptimizer):
    """:func:`torchopt.dadapt_adagrad` as a differentiable optimizer of a network."""

    @meta_from_recipe(dadapt_adagrad)
    def __init__(self, module: Any) -> None:
        """Take the network, then the arguments of :func:`torchopt.dadapt_adagrad`."""
