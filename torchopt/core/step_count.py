"""Step counts and other counters: leaves of a state to whoever looks, numbers to the rules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchopt.base import tree
from torchopt.base.torch_internals import (
    DisableFuncTorch,
    get_tracing_state,
    get_unwrapped,
    in_forward_mode,
    is_functorch_wrapped_tensor,
    len_torch_dispatch_stack,
)
from torchopt.typing import PyTree


def as_tensor(step: PyTree) -> PyTree:
    """Return a count, or a tree of counts, with every number as a 0-d tensor."""
    if isinstance(step, Tensor):
        return step
    if type(step) in (int, float):
        return _tensor(step)
    return tree.tree_map(lambda n: _tensor(n) if type(n) in (int, float) else n, step)


def _tensor(count: float) -> Tensor:
    dtype = torch.int64 if isinstance(count, int) else torch.float64  # numbers are exact
    if torch.compiler.is_compiling():
        return torch.tensor(count, dtype=dtype)
    with DisableFuncTorch():  # no level of torch.func may own it: the state outlives it
        return torch.tensor(count, dtype=dtype, device="cpu")


def read(step: Any) -> Any:
    """Return a count as an ``int`` where that can be known here and now, else as it is.

    Raises:
        ValueError: If a tensor is not 0-d, or holds no whole number.
    """
    if isinstance(step, Tensor) and step.dim():
        raise ValueError(
            f"The step count of a state must be a 0-d tensor, got shape {tuple(step.shape)}. The "
            "state of a batch goes through torch.func.vmap(...)."
        )
    number = read_number(step)
    if isinstance(number, float):
        if not number.is_integer():
            raise ValueError(f"The step count of a state must be a whole number, got {number}.")
        return int(number)
    return number


def read_number(step: Any) -> Any:
    """Return a counter as a number where that can be known here and now, else as it is.

    A tensor on the CPU is read. Under ``vmap`` counts of a batch are read if all are the same. One
    on another device is left alone, for reading it would wait for the device; so is that of a
    tracer, for which the number would be a constant, and one with a derivative.

    A hyperparameter with a value for each entry makes it a tensor with one for each.
    """
    if not isinstance(step, Tensor) or step.requires_grad or step.dim():
        return step
    if step.is_floating_point() and in_forward_mode():
        return step  # of its tangents at the levels of torch.func no more can be known
    if torch.compiler.is_compiling() or len_torch_dispatch_stack() > 0:
        return step
    if not step.is_cpu or get_tracing_state() is not None:
        return step
    value = step
    while is_functorch_wrapped_tensor(value):
        value = get_unwrapped(value)
        if value.requires_grad:
            return step
    with DisableFuncTorch():
        counts = value.detach().reshape(-1).tolist()
    if value is not step and len(set(counts)) != 1:
        return step  # a batch of states that have come to different counts
    return counts[0]
