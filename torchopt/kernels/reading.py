"""Read a hyperparameter that is a tensor, where that does not wait for a device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch  # pyright: ignore[reportAttributeAccessIssue]

from torchopt.kernels.learned import ENTRIES, SINGLE
from torchopt.module_state import FastWeight


#: Tensors that are what they seem. Others (DTensor, FakeTensor, a user's subclass) may have no
#: address, and are computed by the rules.
PLAIN = {Tensor, torch.nn.Parameter, FastWeight, torch.nn.Buffer}


def read_tensor(value: Any) -> tuple[float, str, str]:
    """Return the number in a hyperparameter, its kind, and why no kernel takes it."""
    if type(value) not in PLAIN:
        return 0.0, "", "a tensor" if isinstance(value, Tensor) else "no number"
    if functorch.peek_interpreter_stack() is not None:
        value = _bottom(value)
        if value is None:
            return 0.0, "", "a tensor with a batch of values"
    if not value.is_cpu:
        return 0.0, "", "a tensor on a GPU" if value.is_cuda else f"a tensor on {value.device}"
    if value.layout != torch.strided:
        return 0.0, "", f"a tensor of layout {value.layout}"
    if value.numel() != 1:
        return float("nan"), ENTRIES, ""
    return float(value.item()), SINGLE, ""


def _bottom(value: Tensor) -> Tensor | None:
    """Return the tensor under the levels of torch.func; ``None`` if one is a batch."""
    while functorch.is_functorch_wrapped_tensor(value):
        if functorch.is_batchedtensor(value):
            return None
        value = functorch.get_unwrapped(value)
    return value
