"""LARS: You, Gitman and Ginsburg, algorithm 1, with Optax's norm of gradient and decay together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def lars(
    k: dict[str, Any], p: Tensor, grads: Sequence[Tensor]
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Give each layer a learning rate of its own, inside of the momentum."""
    v = torch.zeros_like(p)
    for t, g in enumerate(grads):
        g = g + k["weight_decay"] * p
        local = k["trust_coefficient"] * torch.sqrt((p**2).sum())
        local = local / (torch.sqrt((g**2).sum()) + k["eps"])
        new = k["lr"] * local * g
        v = k["momentum"] * v + (new if t == 0 else (1 - k["dampening"]) * new)
        p = p - (new + k["momentum"] * v if k["nesterov"] else v)
        yield p, {"momentum_buffer": -v}
