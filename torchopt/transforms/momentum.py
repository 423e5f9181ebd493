"""Momentum, a decaying sum of gradients, and their moving average."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchopt.base.numerics import add_scaled, is_zero, moving_average, power
from torchopt.core.engine import Leaves
from torchopt.core.hyper import flag, hyper, numbers_in
from torchopt.core.recipe import ignoring_moment_requires_grad
from torchopt.core.rules import ElementwiseTransformation
from torchopt.core.slots import Slot
from torchopt.core.transform import GradientTransformation, transformation
from torchopt.typing import Hyperparameter, Step


@transformation
class Trace(ElementwiseTransformation):
    """Accumulate gradients with decay; see :func:`trace`."""

    momentum: Hyperparameter = hyper(0.9, ge=0)
    dampening: Hyperparameter = hyper(0.0)
    nesterov: bool = flag(False)

    slots = (Slot("momentum_buffer", when="momentum"),)

    def __post_init__(self) -> None:
        super().__post_init__()
        # what is no number cannot be compared: a tensor's entry may be on a device, or learned
        without = any(map(is_zero, numbers_in(self.momentum)))
        damped = not all(map(is_zero, numbers_in(self.dampening)))
        if self.nesterov and (without or damped):
            raise ValueError(
                "Nesterov momentum needs momentum > 0 and dampening = 0, got "
                f"momentum={self.momentum!r}, dampening={self.dampening!r}."
            )

    def step(self, leaves: Leaves) -> tuple[list[Tensor], list[tuple[Tensor | None, ...]]]:
        """Apply :meth:`rule` to every parameter, sparse ones in forms that can be added."""
        g, slots = list(leaves.g), list(leaves.slots)
        for k, (x, (b,)) in enumerate(zip(leaves.g, leaves.slots)):
            sparse = x.layout != torch.strided or (b is not None and b.layout != torch.strided)
            if sparse and not is_zero(leaves.hyper[k]["momentum"]):
                g[k], b = _added_alike(x, b, leaves.t[k])
                slots[k] = (b,)
        t, rows, index, call = leaves.t, leaves.hyper, leaves.index, leaves.call
        return super().step(Leaves(g, leaves.p, t, slots, rows, index, call))

    def rule(
        self,
        g: Tensor,
        p: Any,
        t: Step,
        slots: tuple,
        *,
        momentum: Any,
        dampening: Any,
        nesterov: bool,
    ) -> tuple[Tensor, tuple]:
        """Return the new buffer, or the gradient plus the decayed new buffer for Nesterov."""
        (b,) = slots
        if is_zero(momentum):
            return g, slots
        if b is None:
            b = g.clone()  # a gradient buffer that is reused later must not change the state
        else:
            b = _decayed_sum(momentum * b, g, dampening, t)
        return (add_scaled(g, b, momentum) if nesterov else b), (b,)

    def takes_sparse(self, *, momentum: Any, **_: Any) -> bool:
        """Yes: the buffer is sparse too, with the entries of all gradients so far."""
        return True


def _added_alike(g: Tensor, b: Tensor | None, t: Step) -> tuple[Tensor, Tensor | None]:
    """Return gradient and buffer in forms that can be added; sparse ones without duplicates.

    A buffer that was dense stays dense, but for the zeros of a new one. One that is sparse becomes
    dense with the first gradient that is, and where the step count is a tensor, which ``where``
    compares.
    """
    dense = isinstance(t, Tensor) or g.layout == torch.strided
    if not dense and b is not None and b.layout == torch.strided:
        if t == 1 and not b.any():
            b = None  # the rule makes one of the gradient's layout
        dense = b is not None
    return _merged(g, dense), None if b is None else _merged(b, dense)


def _merged(x: Tensor, dense: bool) -> Tensor:
    if x.layout != torch.strided and dense:
        return x.to_dense()
    return x.coalesce() if x.layout == torch.sparse_coo else x


def _decayed_sum(b: Tensor, g: Tensor, dampening: Any, t: Step) -> Tensor:
    """Return ``b + (1 - dampening) * g``, at the first step ``b + g``.

    A new buffer is zero, so that the first one is the gradient as in ``torch.optim``; one that was
    given is used.
    """
    if is_zero(dampening):
        return add_scaled(b, g, 1 - dampening)
    if isinstance(t, Tensor):
        return torch.where(t == 1, b + g, b + (1 - dampening) * g)
    if t == 1:
        # a number stays an expression of dampening, for which there is one kernel
        dampening = 0.0 if isinstance(dampening, Tensor) else dampening * 0.0
    return add_scaled(b, g, 1 - dampening)


@ignoring_moment_requires_grad
def trace(
    momentum: Hyperparameter = 0.9, dampening: Hyperparameter = 0.0, nesterov: bool = False
) -> GradientTransformation:
    r"""Accumulate gradients with decay, as ``torch.optim.SGD`` does.

    .. math::
        b_1 = \mu\, b_0 + g_1, \qquad b_t = \mu\, b_{t-1} + (1 - \tau)\, g_t, \qquad
        u_t = b_t \;\text{ or, for Nesterov, }\; g_t + \mu\, b_t

    A fresh buffer :math:`b_0` is zero, so :math:`b_1` is the gradient.

    Args:
        momentum: :math:`\mu \ge 0`. The Python number 0 keeps no buffer.
        dampening: :math:`\tau`; not applied at the first step.
        nesterov: Look ahead (Sutskever et al., 2013).

    Slots: ``momentum_buffer``. Differentiable in gradients, buffer, momentum and dampening.

    Raises:
        ValueError: If ``momentum`` is negative, or ``nesterov`` without momentum or with dampening.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.trace(0.5)
        >>> g, state = [torch.ones(1)], tx.init([torch.ones(1)])
        >>> _, state = tx.update(g, state)
        >>> tx.update(g, state)[0]
        [tensor([1.5000])]
    """
    return Trace(momentum, dampening, nesterov)


@transformation
class Ema(ElementwiseTransformation):
    """Average updates; see :func:`ema`."""

    decay: Hyperparameter = hyper(ge=0, lt=1)
    debias: bool = flag(True)

    slots = (Slot("ema"),)
    uses_step = True

    def rule(
        self, g: Tensor, p: Any, t: Step, slots: tuple, *, decay: Any, debias: bool
    ) -> tuple[Tensor, tuple]:
        """Return the new average, without the weight of the zero that it began with."""
        m = moving_average(slots[0], g, decay)
        return (m / (1 - power(decay, t)) if debias else m), (m,)


def ema(decay: Hyperparameter, debias: bool = True) -> GradientTransformation:
    r"""Replace updates by their exponential moving average.

    .. math::
        m_t = \beta\, m_{t-1} + (1 - \beta)\, g_t, \qquad u_t = m_t / (1 - \beta^t)

    It averages updates; an average of parameters is what schedule-free optimizers evaluate.

    Args:
        decay: :math:`0 \le \beta < 1`.
        debias: Divide by :math:`1 - \beta^t`, as Adam does; the average begins at zero.

    Slots: ``ema``. Differentiable in gradients, average and ``decay``.

    Raises:
        ValueError: If ``decay`` is a number out of bounds.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.ema(0.5)
        >>> state = tx.init([torch.ones(1)])
        >>> for g in (1.0, 4.0):
        ...     updates, state = tx.update([torch.tensor([g])], state)
        >>> updates
        [tensor([3.])]
    """
    return Ema(decay, debias)
