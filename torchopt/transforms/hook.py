"""Hooks for :func:`torchopt.register_hook`, and for :meth:`torch.Tensor.register_hook`."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from torchopt.transforms.basic import register_hook as register_hook


def zero_nan_hook(g: Tensor) -> Tensor:
    """Return a gradient with zeros in place of ``nan``, and of infinities the largest numbers.

    Example:
        >>> import torch, torchopt
        >>> torchopt.hook.zero_nan_hook(torch.tensor([float("nan"), 2.0]))
        tensor([0., 2.])
    """
    return g.nan_to_num(nan=0.0)


def nan_to_num_hook(
    nan: float = 0.0, posinf: float | None = None, neginf: float | None = None
) -> Callable[[Tensor], Tensor]:
    """Return a hook that replaces what is not finite, as :func:`torch.nan_to_num` does.

    Args:
        nan: Replacement of ``nan``.
        posinf: Replacement of plus infinity; ``None`` for the largest finite number.
        neginf: Replacement of minus infinity; ``None`` for the smallest finite number.

    Example:
        >>> import torch, torchopt
        >>> hook = torchopt.hook.nan_to_num_hook(0.0, posinf=1.0)
        >>> hook(torch.tensor([float("nan"), float("inf")]))
        tensor([0., 1.])
    """

    def hook(g: Tensor) -> Tensor:
        return g.nan_to_num(nan=nan, posinf=posinf, neginf=neginf)

    return hook
