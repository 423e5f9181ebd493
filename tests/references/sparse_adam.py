"""SparseAdam: Adam's moments with eps on the uncorrected root, for the entries there are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def sparse_adam(
    k: dict[str, Any], p: Tensor, grads: Sequence[Tensor]
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Take every entry of a dense gradient for one that is there."""
    b1, b2 = k["betas"]
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t, g in enumerate(grads, start=1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        step_size = k["lr"] * (1 - b2**t) ** 0.5 / (1 - b1**t)
        p = p - step_size * m / (torch.sqrt(v) + k["eps"])
        yield p, {"exp_avg": m, "exp_avg_sq": v}
