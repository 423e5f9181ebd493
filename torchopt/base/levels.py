"""What is being recorded through a tensor, by whichever levels of ``torch.func`` are open."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import forward_ad

from torchopt.base.torch_internals import (
    TransformType,
    add_batch_dim,
    current_interpreter,
    in_forward_mode,
    is_functorch_wrapped_tensor,
    peek_interpreter_stack,
    unwrap_batched,
    unwrap_for_grad,
)


def any_level() -> bool:
    """Whether a level of ``torch.func`` is open (``grad``, ``vmap``, ``jvp``)."""
    return peek_interpreter_stack() is not None


def is_wrapped(x: Tensor) -> bool:
    """Whether a level of ``torch.func`` has wrapped a tensor."""
    return is_functorch_wrapped_tensor(x)


def is_tracked(x: Any) -> bool:
    """Whether a derivative is recorded through a tensor, in any mode and on any level."""
    if not isinstance(x, Tensor) or not (x.is_floating_point() or x.is_complex()):
        return False
    if not any_level():
        return x.requires_grad or has_tangent(x)
    level: Any = current_interpreter()
    if level.key() == TransformType.Vmap:
        inside = unwrap_batched(x, level.level())[0]
    else:
        if x.requires_grad or (level.key() == TransformType.Jvp and has_tangent(x)):
            return True
        inside = unwrap_for_grad(x, level.level())
    with level.lower():
        return is_tracked(inside)


def has_tangent(x: Tensor) -> bool:
    """Whether a tensor of the innermost level is a dual number."""
    return in_forward_mode() and forward_ad.unpack_dual(x).tangent is not None


def primal(x: Tensor) -> Tensor:
    """Return a tensor without the tangent of the innermost level of forward mode.

    That level may lie below some of ``vmap``, which have no rule for taking dual numbers apart.
    """
    if any_level() and peek_interpreter_stack().key() == TransformType.Vmap:
        level: Any = current_interpreter()
        inside, dim = unwrap_batched(x, level.level())
        with level.lower():
            inside = primal(inside)
        return inside if dim is None else add_batch_dim(inside, dim, level.level())
    return forward_ad.unpack_dual(x).primal


def physical(x: Tensor) -> Tensor:
    """Return what is inside of all levels: no history, and all members of a batch."""
    if not any_level():
        return x.detach()
    level: Any = current_interpreter()
    batched = level.key() == TransformType.Vmap
    inside = unwrap_batched(x, level.level())[0] if batched else unwrap_for_grad(x, level.level())
    with level.lower():
        return physical(inside)
