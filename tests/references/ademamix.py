"""AdEMAMix: Pagliardini et al., The AdEMAMix optimizer, algorithm 1 and its two schedulers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def ademamix(
    k: dict[str, Any], p: Tensor, grads: Sequence[Tensor]
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Mix a fast momentum with a slow one."""
    (b1, b2, b3), lr = (torch.as_tensor(b, dtype=p.dtype) for b in k["betas"]), k["lr"]
    m1, m2, v = (torch.zeros_like(p) for _ in range(3))
    for t, g in enumerate(grads, start=1):
        alpha, slow = k["alpha"], b3
        if t < k["alpha_warmup"]:
            alpha = alpha * t / k["alpha_warmup"]
        if t < k["beta3_warmup"]:
            done = t / k["beta3_warmup"]
            low, high = b1.log(), b3.log()
            slow = (low * high / ((1 - done) * high + done * low)).exp()
        m1 = b1 * m1 + (1 - b1) * g
        m2 = slow * m2 + (1 - slow) * g
        v = b2 * v + (1 - b2) * g * g
        corrected = m1 / (1 - b1**t)
        u = (corrected + alpha * m2) / ((v / (1 - b2**t)).sqrt() + k["eps"])
        p = p - lr * (u + k["weight_decay"] * p)
        yield p, {"exp_avg_fast": m1, "exp_avg_slow": m2, "exp_avg_sq": v}
