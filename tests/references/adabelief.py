"""AdaBelief: Zhuang et al., algorithm 2, with Optax's two epsilons and decoupled decay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def adabelief(
    k: dict[str, Any], p: Tensor, grads: Sequence[Tensor]
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Divide by the root of the variance around the momentum."""
    (b1, b2), m, s = k["betas"], torch.zeros_like(p), torch.zeros_like(p)
    for t, g in enumerate(grads, 1):
        m = b1 * m + (1 - b1) * g
        s = b2 * s + (1 - b2) * (g - m) ** 2 + k["eps_root"]
        m_hat, s_hat = m / (1 - b1**t), s / (1 - b2**t)
        p = p - k["lr"] * (m_hat / (torch.sqrt(s_hat) + k["eps"]) + k["weight_decay"] * p)
        yield p, {"exp_avg": m, "exp_avg_var": s}
