"""Gradients at other parameters than those of the step: the extra value ``grad_fn`` of a call."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from torchopt.base import tree
from torchopt.core.apply import refuse_unwritable
from torchopt.core.engine import Call
from torchopt.diff.gradient import differentiate
from torchopt.nn import marks
from torchopt.nn.buffers import keep_buffers
from torchopt.nn.parameters import place_each
from torchopt.optim.steady import Entry
from torchopt.typing import PyTree


def extra_of_step(
    params: Sequence[Tensor], loss: Any, closure: Callable[[], Any] | None
) -> dict[str, Any]:
    """Return what rules may read of a step of parameters that are changed in place."""
    extra = {} if loss is None else {"value": loss}
    if closure is not None:
        extra["grad_fn"] = lambda values: gradients_in_place(closure, params, values)
    return extra


def evaluated(loss: Any, *args: Any) -> tuple[Any, Callable[..., Tensor] | None]:
    """Return the loss, and the function that computed it if one was given."""
    if isinstance(loss, Tensor) or not callable(loss):
        return loss, None
    closure: Any = loss
    with torch.enable_grad():
        return closure(*args), closure


def gradients_in_place(
    closure: Callable[[], Any], params: Sequence[Tensor], values: Sequence[Tensor]
) -> list[Tensor | None]:
    """Let parameters have other values while a closure computes their gradients; return those.

    Raises:
        RuntimeError: For a parameter that cannot be changed by itself, before any has changed; and
            if the closure adds to the gradients that there are.
    """
    changed = [k for k, (p, value) in enumerate(zip(params, values)) if value is not p]
    refuse_unwritable([params[k] for k in changed], lambda k: f"params[{changed[k]}]")
    with torch.no_grad():
        before = [params[k].detach().clone() for k in changed]
        try:
            for k in changed:
                params[k].copy_(values[k])
            with _marked(params), torch.enable_grad():
                closure()
            # the gradients themselves may be written to again, as when the next ones are added
            return [None if p.grad is None else p.grad.detach().clone() for p in params]
        finally:
            for k, value in zip(changed, before):
                params[k].copy_(value)


@contextmanager
def _marked(params: Sequence[Tensor]) -> Iterator[None]:
    """Refuse what is added to the gradients of parameters instead of taking their place.

    Meanwhile they are infinite: an infinite one to which something finite was added still is.

    Raises:
        RuntimeError: With the gradients as they were.
    """
    before: list[tuple[Tensor, Tensor, Tensor]] = []
    for p in params:
        if p.grad is not None and p.grad.layout == torch.strided:
            before.append((p, p.grad, torch.full_like(p.grad, math.inf)))
            p.grad = before[-1][2]
    try:
        yield
        kept = [(p, g, mark) for p, g, mark in before if p.grad is mark]
        if kept and all(bool((mark == math.inf).all()) for *_, mark in kept):
            raise RuntimeError(
                "The closure added the second gradient to the first one. Let it call "
                "optimizer.zero_grad() each time before backward(). Where the gradients of several "
                "batches are added up for one step, call first_step() and second_step() of a "
                "torchopt.SAM behind the backward passes of all of them."
            )
    except BaseException:
        for p, g, _ in before:
            p.grad = g
        raise
    for p, g, mark in kept:  # set to zero in place: who holds the tensor still does
        p.grad = g.copy_(mark)


def gradients_in_network(
    closure: Callable[[], Tensor],
    modules: Sequence[nn.Module],
    entries: Sequence[Entry],
    call: Call,
    create_graph: bool,
) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor | None]]:
    """Return a function of other weights, by name, that returns the gradients of the loss there.

    For it the networks hold these weights, and work on copies of their buffers.
    """
    params, names = list(call.p), list(call.names())

    def grad_fn(values: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
        there = [_to_differentiate(p, values[n], create_graph) for p, n in zip(params, names)]
        marked = marks.any_marked(params)
        for old, new in zip(params, there) if marked else ():
            if new is not old:
                marks.carry(old, new)
        sites = [entry.site for entry in entries]
        try:
            place_each(sites, there)
            with torch.enable_grad(), keep_buffers(*modules):
                grads = list(differentiate(closure(), there, create_graph))
        finally:
            place_each(sites, params)
        if marked:
            grads = marks.filtered(there, grads, create_graph)
        return dict(zip(names, grads))

    return grad_fn


def _to_differentiate(p: Tensor, value: Tensor, create_graph: bool) -> Tensor:
    """Return a value as a weight of the network: connected to what it is made of, or a leaf."""
    if value is p or (create_graph and value.requires_grad):
        return value
    return _leaf(value)


def _leaf(value: Tensor) -> Tensor:
    return value.detach().requires_grad_(True)


def gradients_of_function(
    function: Callable[[PyTree], Tensor], params: PyTree, create_graph: bool
) -> Callable[[PyTree], PyTree]:
    """Return a function of trees like ``params`` that returns the gradients of a loss there."""
    trained = [isinstance(x, Tensor) and x.requires_grad for x in tree.flatten(params)[0]]

    def grad_fn(values: PyTree) -> PyTree:
        leaves, spec = tree.flatten(values)
        there = [
            x if not own else x if create_graph and x.requires_grad else _leaf(x)
            for x, own in zip(leaves, trained)
        ]
        with torch.enable_grad():
            loss = function(tree.unflatten(spec, there))
        wanted = [x for x, own in zip(there, trained) if own]
        found = iter(differentiate(loss, wanted, create_graph))
        return tree.unflatten(spec, [next(found) if own else None for own in trained])

    return grad_fn
