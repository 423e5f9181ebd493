"""Clipping by the norm over all parameters and by value."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torchopt.base.distributed import greatest
from torchopt.base.distributed import whole as whole_number
from torchopt.base.numerics import root
from torchopt.base.torch_internals import peek_interpreter_stack
from torchopt.core.engine import Leaves
from torchopt.core.hyper import check_number, hyper
from torchopt.core.rules import ElementwiseTransformation
from torchopt.core.transform import GradientTransformation, transformation
from torchopt.typing import Hyperparameter, Step


@transformation
class ClipGradNorm(GradientTransformation):
    """Scale all gradients down to a common norm; see :func:`clip_grad_norm`."""

    max_norm: Hyperparameter = hyper(ge=0)
    norm_type: float = 2.0
    error_if_nonfinite: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("norm_type", self.norm_type)
        if not self.norm_type > 0:
            raise ValueError(
                f"norm_type must be > 0 (inf for the maximum), got {self.norm_type!r}."
            )

    def step(self, leaves: Leaves) -> tuple[list[Tensor], list[tuple]]:
        """Multiply all gradients by ``min(1, max_norm / (norm + 1e-6))``."""
        norm = global_norm(_magnitudes(leaves), self.norm_type)
        if self.error_if_nonfinite and not torch.isfinite(norm):
            raise RuntimeError(
                f"The total norm of order {self.norm_type} of the gradients is not finite, so they "
                "cannot be clipped. Pass error_if_nonfinite=False to scale them by it anyway."
            )
        updates = []
        for g, h in zip(leaves.g, leaves.hyper):
            # 1e-6 as in torch.nn.utils.clip_grad_norm_, so that the two agree.
            factor = torch.clamp(h["max_norm"] / (norm + 1e-6), max=1.0)
            updates.append(g * factor.to(device=g.device, dtype=g.dtype))
        return updates, leaves.slots


@transformation
class ClipByGlobalNorm(GradientTransformation):
    """Scale all gradients down to a common norm, exactly; see :func:`clip_by_global_norm`."""

    max_norm: Hyperparameter = hyper(ge=0)

    def step(self, leaves: Leaves) -> tuple[list[Tensor], list[tuple]]:
        """Divide all gradients by their norm if it is at least ``max_norm``, times that."""
        norm = global_norm(_magnitudes(leaves))
        updates = []
        for g, h in zip(leaves.g, leaves.hyper):
            keep = (norm < h["max_norm"]) | (norm == 0)
            divisor = torch.where(keep, 1.0, norm).to(device=g.device, dtype=g.dtype)
            factor = torch.where(keep, torch.ones_like(norm), h["max_norm"])
            updates.append(g / divisor * factor.to(device=g.device, dtype=g.dtype))
        return updates, leaves.slots


def _magnitudes(leaves: Leaves) -> list[Tensor]:
    """Return the gradients; complex ones, seen as pairs of reals, as their moduli."""
    return [
        root(g.square().sum(-1)) if leaves.call.g[i].is_complex() else g
        for g, i in zip(leaves.g, leaves.index)
    ]


def global_norm(tensors: list[Tensor], order: float = 2.0) -> Tensor:
    """Return the norm of all tensors taken as one vector, with derivative zero at zero.

    The norm of a distributed tensor is that of the whole, on every process.

    The derivative is zero at zero in every order: a squared sum goes through
    :func:`torchopt.base.numerics.root` and not through ``Tensor.norm``, whose second derivative is
    ``nan`` there.
    """
    first = tensors[0]
    if order == math.inf:
        parts = [greatest(g).to(device=first.device) for g in tensors if g.numel()]
        return torch.stack(parts or [whole_number(first.new_zeros(()))]).max()
    if order == 2.0:
        return root(square_sum(tensors))
    if order == 1.0:
        parts = [g.abs().sum() for g in tensors]
    else:
        parts = [_safe_power(g.abs(), order).sum() for g in tensors]
    total = sum_of_parts(parts)
    return total if order == 1.0 else _safe_power(total, 1.0 / order)


def all_zero(tensors: list[Tensor]) -> bool:
    """Whether there is no gradient anywhere: then a step needs no loss, and no second gradient.

    What makes the state of an optimizer before there is one (``torch.distributed.checkpoint``)
    takes a step from gradients that are zero, and has no closure. The entries are read, which waits
    for the device; where they cannot be (a compiler, ``torch.func``), the answer is no.
    """
    if torch.compiler.is_compiling() or peek_interpreter_stack() is not None:
        return False
    if any(g.layout != torch.strided for g in tensors):
        return False
    return not global_norm([g.detach() for g in tensors], math.inf).item()


def square_sum(tensors: list[Tensor]) -> Tensor:
    """Return the squared norm of all tensors taken as one vector; see :func:`global_norm`."""
    return sum_of_parts([g.square().sum() for g in tensors])


def sum_of_parts(parts: list[Tensor]) -> Tensor:
    """Return the sum of 0-d tensors that may be on several devices, or distributed."""
    device = parts[0].device
    return torch.stack([whole_number(part).to(device=device) for part in parts]).sum()


def _safe_power(x: Tensor, exponent: float) -> Tensor:
    """Return ``x ** exponent`` for ``x >= 0``, with derivative zero at zero."""
    zero = x == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, x).pow(exponent))


def clip_grad_norm(
    max_norm: Hyperparameter, norm_type: float = 2.0, error_if_nonfinite: bool = False
) -> GradientTransformation:
    r"""Scale down all gradients if their common norm is too large (Pascanu et al., 2013).

    .. math::
        u = g \cdot \min\!\left(1, \frac{c}{\lVert g \rVert + 10^{-6}}\right)

    The norm is over all parameters taken as one vector, in the object-oriented API over all
    parameter groups. It is differentiated, not treated as a constant. As
    ``torch.nn.utils.clip_grad_norm_`` does it, and not quite as Optax
    (:func:`clip_by_global_norm`).

    Args:
        max_norm: :math:`c \ge 0`.
        norm_type: Order of the norm; ``float("inf")`` for the largest absolute value.
        error_if_nonfinite: Raise if the norm is infinite or ``nan``. Reads the norm, hence waits
            for the device.

    Raises:
        ValueError: If ``max_norm`` is negative or ``norm_type`` is not positive.
        RuntimeError: For a norm that is not finite, if ``error_if_nonfinite``.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.clip_grad_norm(1.0)
        >>> g = [torch.tensor([3.0]), torch.tensor([4.0])]
        >>> tx.update(g, tx.init(g))[0]
        [tensor([0.6000]), tensor([0.8000])]
    """
    return ClipGradNorm(max_norm, norm_type, error_if_nonfinite)


def clip_by_global_norm(max_norm: Hyperparameter) -> GradientTransformation:
    r"""Scale down all gradients if their common norm is too large, as Optax does.

    .. math::
        u = \begin{cases} g & \lVert g \rVert < c \\
            g / \lVert g \rVert \cdot c & \text{otherwise} \end{cases}

    The norm is the Euclidean one over all parameters taken as one vector, and is differentiated.
    :func:`clip_grad_norm` adds 1e-6 to it, as torch does, and takes norms of other orders.

    Args:
        max_norm: :math:`c \ge 0`.

    Raises:
        ValueError: If ``max_norm`` is negative.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.clip_by_global_norm(1.0)
        >>> g = [torch.tensor([3.0]), torch.tensor([4.0])]
        >>> tx.update(g, tx.init(g))[0]
        [tensor([0.6000]), tensor([0.8000])]

    Reference:
        Pascanu, Mikolov and Bengio, On the difficulty of training recurrent neural networks, ICML
        2013, https://arxiv.org/abs/1211.5063; ``optax.clip_by_global_norm``.
    """
    return ClipByGlobalNorm(max_norm)


@transformation
class ClipGradValue(ElementwiseTransformation):
    """Clamp every entry; see :func:`clip_grad_value`."""

    clip_value: Hyperparameter = hyper(ge=0)

    def rule(
        self, g: Tensor, p: Any, t: Step, slots: tuple, *, clip_value: Any
    ) -> tuple[Tensor, tuple]:
        """Return ``g`` clamped to ``[-clip_value, clip_value]``."""
        return torch.clamp(g, -clip_value, clip_value), slots


def clip_grad_value(clip_value: Hyperparameter) -> GradientTransformation:
    r"""Clamp every entry of every gradient: :math:`u = \min(\max(g, -c), c)`.

    Args:
        clip_value: :math:`c \ge 0`.

    Raises:
        ValueError: If ``clip_value`` is negative.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.clip_grad_value(1.0)
        >>> tx.update([torch.tensor([-3.0, 0.5])], tx.init([torch.ones(2)]))[0]
        [tensor([-1.0000,  0.5000])]
    """
    return ClipGradValue(clip_value)
