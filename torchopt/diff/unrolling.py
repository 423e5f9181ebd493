"""The loop over steps, as a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torchopt.base.misuse.given import given
from torchopt.diff.adjoints.base import Adjoint
from torchopt.diff.adjoints.unrolled import Unrolled
from torchopt.diff.replay.loop import Loop
from torchopt.typing import PyTree


T = TypeVar("T")


def unroll(
    step: Callable[[T, Any], tuple[T, Any]],
    carry: T,
    xs: PyTree = None,
    *,
    length: int | None = None,
    adjoint: Adjoint = Unrolled(),  # noqa: B008 - frozen
) -> tuple[T, PyTree]:
    r"""Take steps in a row, and say how to differentiate them; the signature of ``jax.lax.scan``.

    .. math::
        c_{t+1},\, y_t = \mathrm{step}(c_t,\, x_t), \qquad t = 0, \dots, T - 1

    Args:
        step: Called as ``step(carry, x)``; returns the next carry and ``y``. It may close over
            tensors, which are differentiated. With another adjoint than :class:`Unrolled` it is
            called more often than :math:`T` times.
        carry: :math:`c_0`, any tree: weights, an :class:`torchopt.OptState`, numbers, ``None``. It
            keeps its structure, and its tensors shape, dtype and device.
        xs: The inputs of all steps: any tree of tensors of shape ``(T, ...)``.
        length: :math:`T`, where ``xs`` does not say it.
        adjoint: How to differentiate: :class:`Unrolled` records all steps, :class:`Checkpointed`
            keeps few carries, :class:`Forward` is for few meta-parameters, :class:`Truncated` and
            :class:`FirstOrder` are approximations, :class:`Offloaded` keeps what is saved on the
            CPU, and :class:`Auto` chooses by the memory that there is.

    Returns:
        The last carry, and the tree of ``y`` with all steps stacked, of shape ``(T, ...)``;
        numbers become tensors, and ``None`` stays.

    Raises:
        TypeError: If ``step`` is no function, returns no pair, or changes the kind of a leaf; if a
            leaf of ``xs`` is no tensor, or one of ``y`` cannot be stacked.
        ValueError: If there are no steps, or lengths differ or are missing; if ``step`` changes
            structure, shapes, dtypes or devices of the carry or of ``y``, naming the leaf.

    Example:
        >>> import torch, torchopt
        >>> from torchopt.diff import Checkpointed, unroll
        >>> tx = torchopt.adam(0.1)
        >>> decay = torch.tensor(0.01, requires_grad=True)
        >>> def loss_fn(w, x):
        ...     return (w - x).square().sum() + decay * w.square().sum()
        >>> def step(carry, x):
        ...     w, state = carry
        ...     grads, loss = torch.func.grad_and_value(loss_fn)(w, x)
        ...     updates, state = tx.update(grads, state, w, inplace=False)
        ...     return (torchopt.apply_updates(w, updates, inplace=False), state), loss
        >>> w = torch.zeros(2)
        >>> data = torch.randn(20, 2)
        >>> (w, _), losses = unroll(step, (w, tx.init(w)), data, adjoint=Checkpointed("sqrt"))
        >>> losses.shape, torch.autograd.grad(w.sum(), decay)[0].shape
        (torch.Size([20]), torch.Size([]))
    """
    if not callable(getattr(adjoint, "run", None)) or isinstance(adjoint, type):
        raise TypeError(
            f"adjoint must be an object such as torchopt.diff.Checkpointed(), got {given(adjoint)}."
        )
    loop = Loop(step, carry, xs, length)
    leaves, ys = adjoint.run(loop)
    return loop.result(leaves, ys)
