"""NovoGrad: Ginsburg et al., 2019, algorithm 1."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def novograd(
    k: dict[str, Any], p: Tensor, grads: Sequence[Tensor]
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Divide gradients by a running norm of their layer before they are accumulated."""
    (b1, b2), decay, eps = k["betas"], k["weight_decay"], k["eps"]
    v = (grads[0] ** 2).sum()
    m = grads[0] / (torch.sqrt(v) + eps) + decay * p
    p = p - k["lr"] * m
    yield p, {"exp_avg": m, "exp_avg_sq": v}
    for g in grads[1:]:
        v = b2 * v + (1 - b2) * (g**2).sum()
        m = b1 * m + (g / (torch.sqrt(v) + eps) + decay * p)
        p = p - k["lr"] * m
        yield p, {"exp_avg": m, "exp_avg_sq": v}
