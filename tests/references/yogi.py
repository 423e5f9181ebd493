"""Yogi: Zaheer et al., Adaptive methods for nonconvex optimization, algorithm 2.

With the start and the bias corrections that Optax and the authors' code have.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def yogi(
    k: dict[str, Any], p: Tensor, grads: Sequence[Tensor]
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Let the second moment change by no more than the square of a gradient."""
    b1, b2 = k["betas"]
    m = v = torch.full_like(p, k["initial_accumulator_value"])
    for t, g in enumerate(grads, 1):
        g = g + k["weight_decay"] * p
        m = b1 * m + (1 - b1) * g
        # of numbers that are not equal either is larger: the sign is 1 or -1
        v = torch.where(v > g**2, v - (1 - b2) * g**2, v + (1 - b2) * g**2)
        m_hat, v_hat = m / (1 - b1**t), v / (1 - b2**t)
        p = p - k["lr"] * m_hat / (torch.sqrt(v_hat) + k["eps"])
        yield p, {"exp_avg": m, "exp_avg_sq": v}
