"""Lion: Chen et al., Symbolic discovery of optimization algorithms, algorithm 2."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def lion(
    k: dict[str, Any], p: Tensor, grads: Sequence[Tensor]
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Take the sign of an interpolated momentum."""
    (b1, b2), m = k["betas"], torch.zeros_like(p)
    for g in grads:
        u = torch.sign(b1 * m + (1 - b1) * g)
        p = p - k["lr"] * (u + k.get("weight_decay", 0.0) * p)
        m = b2 * m + (1 - b2) * g
        yield p, {"exp_avg": m}
