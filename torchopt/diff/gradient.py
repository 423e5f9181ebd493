"""The gradient of an inner loss, with errors that say what is wrong with the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function

from torchopt.base import misuse
from torchopt.base.torch_internals import engine_run_backward


def differentiate(
    loss: Any, tensors: Sequence[Tensor], create_graph: bool, retain_graph: bool | None = None
) -> tuple[Tensor | None, ...]:
    """Return the gradients of a scalar loss; ``None`` where it does not depend on a tensor.

    Raises:
        TypeError: If ``loss`` is no tensor.
        ValueError: If it is not scalar, has no graph, or depends on none of the tensors.
        RuntimeError: If its graph has been freed.
    """
    if not isinstance(loss, Tensor):
        raise TypeError(misuse.not_a_loss(loss))
    if loss.numel() != 1:
        raise ValueError(
            f"step expects a scalar loss, got shape {tuple(loss.shape)}; take its mean() or sum()."
        )
    if loss.is_complex():
        raise ValueError(f"step expects a real loss, got {loss.dtype}; take its abs() or real.")
    if not tensors:
        raise ValueError(
            "No parameter requires grad: all are frozen. Call requires_grad_(True) on those to be "
            "trained, before the loss is computed."
        )
    if not loss.requires_grad:
        raise ValueError(
            "The loss has no graph: it was computed under torch.no_grad(), detached (detach, "
            "item, numpy), or does not depend on any parameter that requires grad. Compute it "
            "from the network's outputs, with torch.enable_grad()."
        )
    try:
        grads = vjp((loss,), (torch.ones_like(loss),), tensors, create_graph, retain_graph)
    except RuntimeError as error:
        if "backward through the graph a second time" not in str(error):
            raise
        raise RuntimeError(
            "The graph of this loss has been freed by an earlier backward pass. Compute the "
            "loss again, pass "
            "retain_graph=True to that pass, or call torchopt.stop_gradient on the network "
            "and its optimizer "
            "after each outer step if the inner optimization goes on from where it is."
        ) from error
    if all(grad is None for grad in grads):
        raise ValueError(misuse.unrelated_loss(loss, tensors))
    return grads


def vjp(
    outputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    tensors: Sequence[Tensor],
    create_graph: bool,
    retain_graph: bool | None = None,
) -> tuple[Tensor | None, ...]:
    """Do what ``torch.autograd.grad`` does, of outputs and cotangents of the same shapes.

    What that looks into first, for any number of outputs of any kind, takes longer than the engine
    needs for a small layer.
    """
    run: Any = engine_run_backward
    if (
        run is None
        or torch.compiler.is_compiling()
        or any(y.is_nested for y in outputs)
        or has_torch_function((*outputs, *tensors))
    ):
        return torch.autograd.grad(
            outputs,
            tensors,
            cotangents,
            create_graph=create_graph,
            retain_graph=retain_graph,
            allow_unused=True,
        )
    retain = create_graph if retain_graph is None else retain_graph
    outputs, cotangents, tensors = tuple(outputs), tuple(cotangents), tuple(tensors)
    return run(outputs, cotangents, retain, create_graph, tensors, True, accumulate_grad=False)
