"""Adan: Xie et al., Adaptive Nesterov momentum algorithm, algorithm 1, and the authors' code.

The paper's ``beta`` is ``1 - beta`` here; its ``v`` is ``d``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def adan(
    k: dict[str, Any], p: Tensor, grads: Sequence[Tensor]
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Take moments of gradients and of their differences."""
    (b1, b2, b3), lr, decay = k["betas"], k["lr"], k["weight_decay"]
    m, d, n, before = (torch.zeros_like(p) for _ in range(4))
    for t, g in enumerate(grads, start=1):
        difference = torch.zeros_like(g) if t == 1 else g - before
        m = b1 * m + (1 - b1) * g
        d = b2 * d + (1 - b2) * difference
        n = b3 * n + (1 - b3) * (g + b2 * difference) ** 2
        direction = m / (1 - b1**t) + b2 * d / (1 - b2**t)
        step = lr * direction / ((n / (1 - b3**t)).sqrt() + k["eps"])
        p = p * (1 - lr * decay) - step if k["no_prox"] else (p - step) / (1 + lr * decay)
        before = g
        yield p, {"exp_avg": m, "exp_avg_diff": d, "exp_avg_sq": n, "neg_pre_grad": -g}
