"""The few pieces of arithmetic that several update rules share."""

from __future__ import annotations

import math
from typing import Any, Union, cast

import torch
from torch import Tensor

from torchopt.base.torch_internals import in_forward_mode, peek_interpreter_stack


Scalar = Union[float, Tensor]
HALF = (torch.float16, torch.bfloat16)


def to_compute_dtype(x: Tensor) -> Tensor:
    """Return a tensor in the dtype of computation: half precision in float32, as its slots are.

    In float16 the default eps and small squared gradients are zero, and in bfloat16 a beta of
    0.999 is 1, so rules evaluated in these dtypes give infinite or frozen updates.
    """
    return x.float() if x.dtype in HALF else x


def as_pairs(x: Tensor) -> Tensor:
    """Return complex numbers as pairs of reals, in one more dimension; a copy.

    Not ``view_as_real``, whose derivative refuses what begins at an odd place, as a piece of a
    vector may that holds real numbers, too.
    """
    return torch.stack([x.real, x.imag], -1)


def from_pairs(pairs: Tensor) -> Tensor:
    """Return pairs of reals as complex numbers; a copy, wherever they begin."""
    return torch.complex(pairs[..., 0], pairs[..., 1])


def is_zero(value: object) -> bool:
    """Whether a hyperparameter is the Python number 0, so that its term can be left out.

    A tensor never is: finding out would synchronise its device, and its gradient may be wanted.
    """
    return isinstance(value, (int, float)) and value == 0


def exact(count: Tensor) -> Tensor:
    """Return a count in float64: ``0.999 ** count`` and ``count / n`` are float32 for integers."""
    return count.to(torch.float32 if count.device.type == "mps" else torch.float64)


def power(base: Any, exponent: Any) -> Any:
    """Return ``base ** exponent``, where either may be a number or a tensor.

    While compiling, numbers that change from call to call (step counts) are symbols, and the
    derivative of a power of a tensor and a symbol cannot be compiled; that of two tensors can.
    """
    learned = isinstance(base, Tensor)
    if learned is not isinstance(exponent, Tensor) and torch.compiler.is_compiling():
        if learned:
            exponent = torch.ones_like(base) * exponent
        else:
            base = torch.ones_like(exponent) * base
    return base**exponent


def logarithm(x: Any) -> Any:
    """Return the natural logarithm of a number or a tensor; also where a rule is traced."""
    return math.log(x) if type(x) in (int, float) else x.log()


def derivatives_recorded() -> bool:
    """Whether reverse- or forward-mode differentiation may be looking at what is computed now."""
    return torch.is_grad_enabled() or in_forward_mode()


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


def over_root(m: Tensor, v: Tensor, scale: Scalar, shift: Scalar) -> Tensor:
    r"""Return :math:`m / (s \sqrt{v} + c)`, with :func:`root` for the square root.

    Where plain reverse-mode differentiation is recorded, it is one node of the graph instead of
    eight: on large parameters its derivative costs a third of the passes over memory.
    """
    if (
        isinstance(scale, float)
        and isinstance(shift, float)
        and torch.is_grad_enabled()
        and (m.requires_grad or v.requires_grad)
        and not in_forward_mode()
        and not torch.compiler.is_compiling()
        and peek_interpreter_stack() is None
    ):
        return cast(Tensor, _OverRoot.apply(m, v, scale, shift))
    return m / (root(v) * scale + shift)


class _OverRoot(torch.autograd.Function):
    r"""The quotient of :func:`over_root` and its first derivative.

    With :math:`r = \sqrt{v}`, :math:`d = s r + c`, :math:`u = m / d` and the incoming gradient
    :math:`\bar u`:

    .. math::
        \bar m = \bar u \frac{\partial u}{\partial m} = \frac{\bar u}{d}, \qquad
        \bar v = \bar u \frac{\partial u}{\partial d} \frac{\partial d}{\partial r}
                 \frac{\partial r}{\partial v}
               = \bar u \cdot \Big(-\frac{u}{d}\Big) \cdot s \cdot \frac{1}{2 r}
               = -\frac{s}{2} \cdot \frac{\bar m\, u}{r}

    and :math:`\bar v = 0` where :math:`r = 0`: there ``threshold`` makes the divisor infinite.
    If backward is itself being differentiated, ``r`` and ``d`` are computed again from ``v`` by
    differentiable operations, so every higher order is that of the plain expression.
    """

    @staticmethod
    def forward(ctx: Any, m: Tensor, v: Tensor, scale: float, shift: float) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        r = v.sqrt()
        d = torch.mul(r, scale).add_(shift)
        u = m / d
        # a result that nothing depends on has no gradient, and not zero: zero times nan is nan
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(m, v, u, r, d)
        ctx.scale, ctx.shift = scale, shift
        return u

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if grad is None:
            return None, None, None, None
        m, v, u, r, d = ctx.saved_tensors
        if torch.is_grad_enabled():
            r = root(v)
            d = r * ctx.scale + ctx.shift
            grad_m = grad / d
            slope = (-0.5 * ctx.scale) / torch.threshold(r, 0.0, math.inf)
            return grad_m, grad_m * (m / d) * slope, None, None
        grad_m = grad / d
        grad_v = None
        if ctx.needs_input_grad[1]:
            half = (grad_m * u).mul_(-0.5 * ctx.scale)
            grad_v = half.div_(torch.threshold(r, 0.0, math.inf))
        return grad_m, grad_v, None, None


def moving_average(old: Tensor, new: Tensor, decay: Scalar) -> Tensor:
    """Return ``decay * old + (1 - decay) * new``."""
    if isinstance(decay, Tensor):
        return decay * old + (1 - decay) * new
    return torch.lerp(old, new, 1 - decay)


def as_wide(old: Tensor, new: Tensor) -> Tensor:
    """Return ``old`` in the dtype of ``new`` if that is the wider one, for ``torch.lerp``.

    A hyperparameter that is a tensor for each entry may bring it along. A state of another kind or
    wider than what comes in belongs to another parameter, and is left to be refused.
    """
    if (
        not isinstance(new, Tensor)
        or new.dtype == old.dtype
        or not (old.is_floating_point() or old.is_complex())
    ):
        return old
    wide = torch.promote_types(old.dtype, new.dtype) == new.dtype
    return old.to(new.dtype) if wide else old


def moving_average_of_square(old: Tensor, new: Tensor, decay: Scalar) -> Tensor:
    """Return ``decay * old + (1 - decay) * new ** 2``."""
    if isinstance(decay, Tensor):
        return decay * old + (1 - decay) * new * new
    return torch.addcmul(old * decay, new, new, value=1 - decay)


def add_scaled(x: Tensor, y: Tensor, factor: Scalar) -> Tensor:
    """Return ``x + factor * y``."""
    if isinstance(factor, Tensor):
        return x + factor * y
    return torch.add(x, y, alpha=factor)
