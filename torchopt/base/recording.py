"""Refuse to overwrite tensors through which a gradient is being recorded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torchopt.base.torch_internals import in_forward_mode, is_gradtrackingtensor


def is_recorded(value: Any, leaves_count: bool, forward_mode: bool) -> bool:
    """Whether a gradient is being recorded through a tensor, in reverse or forward mode.

    Args:
        value: Anything; only tensors can be recorded.
        leaves_count: Whether a tensor that requires grad but has no history counts. A parameter
            does not: optimizers overwrite it by design. Under ``torch.func.grad`` it does, since
            there the input of the function is such a leaf.
        forward_mode: Whether a level of forward mode is open.
    """
    if not isinstance(value, Tensor):
        return False
    if value.requires_grad and torch.is_grad_enabled():
        if leaves_count or value.grad_fn is not None:
            return True
        if not torch.compiler.is_compiling() and is_gradtrackingtensor(value):
            return True
    if forward_mode:
        return forward_ad.unpack_dual(value).tangent is not None
    return False


def refuse_recorded(
    what: str,
    inputs: Mapping[str, Iterable[Any]],
    params: Mapping[str, Iterable[Any]],
) -> None:
    """Refuse ``inplace=True`` where it would cut a graph.

    Raises:
        RuntimeError: Naming the first argument that carries a graph, and the cure.
    """
    forward_mode = in_forward_mode()
    for leaves_count, group in ((True, inputs), (False, params)):
        for name, tensors in group.items():
            if any(is_recorded(tensor, leaves_count, forward_mode) for tensor in tensors):
                raise RuntimeError(
                    f"{what}(..., inplace=True) may overwrite its inputs, but a gradient is being "
                    f"recorded through {name}. Pass inplace=False to differentiate through the "
                    "update, or run under torch.no_grad() (or detach the tensors) if you do not "
                    "want its derivative."
                )
