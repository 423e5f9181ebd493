"""Products with the transposed Jacobian of a function of lists, in any mode and on any level."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from typing_extensions import TypeAlias

from torchopt.base.levels import any_level
from torchopt.base.torch_internals import in_forward_mode


Tensors: TypeAlias = tuple[Tensor, ...]
Flat: TypeAlias = Callable[[Tensors], Tensors]  #: A function of a tuple of tensors to another.


def inexact(tensors: Sequence[Tensor]) -> list[int]:
    """Return the places of tensors that can have a derivative."""
    return [k for k, x in enumerate(tensors) if x.is_floating_point() or x.is_complex()]


def pullback(function: Flat, primals: Sequence[Tensor]) -> tuple[Tensors, Flat]:
    """Return what a function is at ``primals``, and its product with the transposed Jacobian.

    The Jacobian is that by the :func:`inexact` ones. The product may be called often. It can be
    differentiated, in what it is given and in ``primals``, where grad mode is on when it is called.

    Where no level of ``torch.func`` is open this is done by plain autograd: it knows
    checkpoints, hooks of saved tensors and modules that change buffers, which ``torch.func.vjp``
    refuses.
    """
    places = inexact(primals)

    def called(xs: Sequence[Tensor]) -> Tensors:
        values = list(primals)
        for k, x in zip(places, xs):
            values[k] = x
        return tuple(function(tuple(values)))

    if any_level():
        value, product = torch.func.vjp(lambda *xs: called(xs), *(primals[k] for k in places))[:2]
        return value, lambda v: product(tuple(v))
    inputs = tuple(alias(primals[k]) for k in places)
    with torch.enable_grad():
        value = called(inputs)
    return value, lambda v: _autograd_product(value, inputs, v)


def alias(x: Tensor) -> Tensor:
    """Return the same entries as an input of a graph, which is connected where one is recorded."""
    if x.requires_grad and torch.is_grad_enabled():
        return x.view_as(x)
    alias = x.detach().requires_grad_()
    if in_forward_mode() and (tangent := forward_ad.unpack_dual(x).tangent) is not None:
        with torch.enable_grad():
            return forward_ad.make_dual(alias, tangent)
    return alias


def _autograd_product(value: Tensors, inputs: Tensors, v: Tensors) -> Tensors:
    pairs = [(y, u) for y, u in zip(value, v) if y.requires_grad]
    if not pairs:
        return tuple(torch.zeros_like(x) for x in inputs)
    outputs, cotangents = zip(*pairs)
    found = torch.autograd.grad(
        outputs,
        inputs,
        cotangents,
        retain_graph=True,
        create_graph=torch.is_grad_enabled(),
        allow_unused=True,
    )
    # What is zero is returned as zeros, so that the product is linear in any case. Not by
    # materialize_grads: those zeros require grad, as if they came from a tensor nobody was told of.
    return tuple(torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found))


def pushforward(function: Flat, primals: Sequence[Tensor]) -> Flat:
    """Return the product with the Jacobian of a function at ``primals``, by the inexact ones.

    It is the transpose of the transposed product, which asks for second derivatives in reverse
    mode only: more operations have those than have rules for forward mode.
    """
    value, transposed = pullback(function, primals)
    with torch.enable_grad():
        return pullback(transposed, tuple(torch.zeros_like(y) for y in value))[1]
