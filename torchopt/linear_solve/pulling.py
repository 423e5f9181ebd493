"""Derivatives of functions of tensors, on all levels of ``torch.func``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torchopt.base.levels import any_level


def copies_of(values: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors without their history.

    They are leaves that require grad where the tensors do: a function may ask autograd for the
    gradient in one of them.
    """
    plain = not any_level()
    return [
        x.detach().requires_grad_() if plain and x.requires_grad else x.detach() for x in values
    ]


def pull_back(
    function: Callable[..., Tensor], primals: Sequence[Tensor]
) -> Callable[[Tensor], list[Tensor]]:
    """Return the map from a cotangent of a function's value to those of its arguments.

    Where no transform of torch.func is at work it is autograd's own, under which functions may
    call ``torch.autograd.grad`` themselves. It is recorded where gradients are when it is called.
    """
    if any_level():
        pull = torch.func.vjp(function, *primals)[1]
        return lambda u: list(pull(u))
    with torch.enable_grad():
        # a name of its own for each: one may have been computed from another
        inputs = [x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in primals]
        value = function(*inputs)

    def pull_plain(u: Tensor) -> list[Tensor]:
        if not value.requires_grad:
            return [torch.zeros_like(x) for x in inputs]
        grads = torch.autograd.grad(
            value,
            inputs,
            u,
            retain_graph=True,
            create_graph=torch.is_grad_enabled(),
            allow_unused=True,
        )
        return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads)]

    return pull_plain
