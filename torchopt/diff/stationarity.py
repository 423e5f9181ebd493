"""The gradient of an objective as a condition of its solutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchopt.base import misuse, tree
from torchopt.base.levels import any_level
from torchopt.base.misuse.given import given
from torchopt.diff.pullback import Tensors, alias
from torchopt.typing import PyTree, TensorTree


def stationarity(fn: Callable[..., Tensor], title: str = "fn") -> Callable[..., TensorTree]:
    """Return the gradient of a scalar function by its first argument, a tree."""

    def gradient(params: TensorTree, *args: PyTree, **kwargs: PyTree) -> TensorTree:
        leaves, spec = tree.flatten(params)
        places = [k for k, x in enumerate(leaves) if x is not None]

        def value(*present: Tensor) -> Tensor:
            everything = list(leaves)
            for k, x in zip(places, present):
                everything[k] = x
            return scalar(fn(tree.unflatten(spec, everything), *args, **kwargs), title)

        result = list(leaves)
        for k, g in zip(places, gradient_of(value, [leaves[k] for k in places])):
            result[k] = g
        return tree.unflatten(spec, result)

    return gradient


def gradient_of(value: Callable[..., Tensor], tensors: Sequence[Tensor]) -> Tensors:
    """Return the gradient of a scalar function, differentiable where grad mode is on.

    By plain autograd where no level of ``torch.func`` is open: it knows checkpoints and hooks.
    """
    if any_level():
        return torch.func.grad(value, tuple(range(len(tensors))))(*tensors)
    inputs = [alias(x) for x in tensors]
    with torch.enable_grad():
        result = value(*inputs)
    if not result.requires_grad:
        return tuple(torch.zeros_like(x) for x in inputs)
    found = torch.autograd.grad(
        result, inputs, create_graph=torch.is_grad_enabled(), allow_unused=True
    )
    # not by materialize_grads: those zeros require grad, as if they came from a hidden tensor
    return tuple(torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found))


def scalar(value: Any, title: str) -> Tensor:
    """Return a real number of a function as a 0-d tensor.

    Raises:
        TypeError: If it is no tensor.
        ValueError: If it has several entries or is complex.
    """
    if not isinstance(value, Tensor):
        advice = " Does it return the value?" if value is None else ""
        raise TypeError(f"{title} must return a scalar tensor, got {given(value)}.{advice}")
    if value.numel() != 1 or value.is_complex():
        raise ValueError(
            f"{title} must return one real number, got {misuse.short(value)}. Take its mean(), "
            "sum(), abs() or real."
        )
    return value.reshape(())
