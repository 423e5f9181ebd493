"""Sign-SGD and Signum: Bernstein et al., signSGD, algorithms 1 and 2, with decoupled decay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def sign_sgd(
    k: dict[str, Any], p: Tensor, grads: Sequence[Tensor]
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Take the sign of the gradient."""
    for g in grads:
        p = p - k["lr"] * (torch.sign(g) + k["weight_decay"] * p)
        yield p, {}


def signum(
    k: dict[str, Any], p: Tensor, grads: Sequence[Tensor]
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Take the sign of the momentum."""
    m = torch.zeros_like(p)
    for g in grads:
        m = k["momentum"] * m + (1 - k["momentum"]) * g
        p = p - k["lr"] * (torch.sign(m) + k["weight_decay"] * p)
        yield p, {"momentum_buffer": m}
