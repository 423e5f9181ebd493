"""The few pieces of arithmetic that several update rules share."""

from __future__ import annotations

from typing import Union

import torch
from torch import Tensor
from torch.autograd import forward_ad


Scalar = Union[float, Tensor]


def is_zero(value: object) -> bool:
    """Whether a hyperparameter is the Python number 0, so that its term can be left out.

    A tensor never is: finding out would synchronise its device, and its gradient may be wanted.
    """
    return isinstance(value, (int, float)) and value == 0


def exact(count: Tensor) -> Tensor:
    """Return a count in float64: ``0.999 ** count`` and ``count / n`` are float32 for integers."""
    return count.to(torch.float32 if count.device.type == "mps" else torch.float64)


def derivatives_recorded() -> bool:
    """Whether reverse- or forward-mode differentiation may be looking at what is computed now."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0


def root(x: Tensor) -> Tensor:
    r"""Return :math:`\sqrt{x}` for :math:`x \ge 0`, with derivative zero at zero.

    A second moment that is exactly zero belongs to a gradient that has always been zero, so the
    true meta-gradient through it is zero, while autograd computes ``0 * inf = nan``. Both ``where``
    are needed: the inner one keeps the infinite slope out of every derivative, the outer one
    restores the value. One ``where`` alone, an epsilon and a backward hook each fail in some mode
    (second order, accuracy, forward mode).
    """
    if not derivatives_recorded():
        return x.sqrt()
    zero = x == 0  # and not x > 0, which would turn nan into zero
    return torch.where(zero, 0.0, torch.where(zero, 1.0, x).sqrt())


def moving_average(old: Tensor, new: Tensor, decay: Scalar) -> Tensor:
    """Return ``decay * old + (1 - decay) * new``."""
    if isinstance(decay, Tensor):
        return decay * old + (1 - decay) * new
    return torch.lerp(old, new, 1 - decay)


def moving_average_of_square(old: Tensor, new: Tensor, decay: Scalar) -> Tensor:
    """Return ``decay * old + (1 - decay) * new ** 2``."""
    if isinstance(decay, Tensor):
        return decay * old + (1 - decay) * new.square()
    return torch.addcmul(old * decay, new, new, value=1 - decay)


def add_scaled(x: Tensor, y: Tensor, factor: Scalar) -> Tensor:
    """Return ``x + factor * y``."""
    if isinstance(factor, Tensor):
        return x + factor * y
    return torch.add(x, y, alpha=factor)
