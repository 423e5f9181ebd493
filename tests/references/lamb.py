"""LAMB: You et al., Large batch optimization for deep learning, algorithm 2."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def lamb(
    k: dict[str, Any], p: Tensor, grads: Sequence[Tensor]
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Scale the steps of AdamW by a ratio of norms."""
    (b1, b2), m, v = k["betas"], torch.zeros_like(p), torch.zeros_like(p)
    largest = torch.zeros_like(p)
    for t, g in enumerate(grads, 1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        largest = torch.maximum(largest, v)
        second = (largest if k["amsgrad"] else v) / (1 - b2**t)
        r = (m / (1 - b1**t)) / (torch.sqrt(second + k["eps_root"]) + k["eps"])
        step = r + k["weight_decay"] * p
        ratio = torch.sqrt((p**2).sum()) / torch.sqrt((step**2).sum())
        p = p - k["lr"] * ratio * step
        yield p, {"exp_avg": m, "exp_avg_sq": v}
