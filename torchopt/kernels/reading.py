"""Read a hyperparameter that is a tensor, where that does not wait for a device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchopt.base.torch_internals import (
    get_unwrapped,
    is_functorch_wrapped_tensor,
    peek_interpreter_stack,
)
from torchopt.kernels.generate.learned import ENTRIES, SINGLE
from torchopt.nn.parameters import FastWeight


#: Tensors that are what they seem. Others (DTensor, FakeTensor, a user's subclass) may have no
#: address, and are computed by the rules.
PLAIN = {Tensor, torch.nn.Parameter, FastWeight, torch.nn.Buffer}


def read_tensor(value: Any) -> tuple[float, str, str]:
    """Return the number in a hyperparameter, its kind, and why no kernel takes it.

    The number of a tensor with more than one entry, or with one for each of a batch, is ``nan``.
    """
    if type(value) not in PLAIN:
        return 0.0, "", f"a {type(value).__name__}, no plain tensor"
    one = value.numel() == 1
    if peek_interpreter_stack() is not None:
        value = _bottom(value)
    if value.layout != torch.strided:
        return 0.0, "", f"a tensor of layout {value.layout}"
    if not (one and value.is_cpu):  # reading it would wait for its device
        return float("nan"), ENTRIES, ""
    return float(value.item()) if value.numel() == 1 else float("nan"), SINGLE, ""


def _bottom(value: Tensor) -> Tensor:
    """Return the tensor under the levels of torch.func, which may be a batch of them."""
    while is_functorch_wrapped_tensor(value):
        value = get_unwrapped(value)
    return value
