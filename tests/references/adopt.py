"""ADOPT: Taniguchi et al., algorithm 1 with clipping, and the authors' code for weight decay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def adopt(
    k: dict[str, Any], p: Tensor, grads: Sequence[Tensor]
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Divide a gradient by the root of the second moment of those before it."""
    (b1, b2), lr, decay = k["betas"], k["lr"], k["weight_decay"]
    m = v = torch.zeros_like(p)
    for t, g in enumerate(grads):  # the paper counts the gradient that starts v as 0
        if not k["decoupled_weight_decay"]:
            g = g + decay * p
        if t == 0:
            v = g * g
            yield p, {"exp_avg": m, "exp_avg_sq": v}
            continue
        if k["decoupled_weight_decay"]:
            p = p * (1 - lr * decay)
        scaled = g / v.sqrt().maximum(torch.as_tensor(k["eps"], dtype=p.dtype))
        if k["use_clipping"]:
            bound = torch.as_tensor(float(t), dtype=p.dtype) ** k["clip_exponent"]
            scaled = scaled.minimum(bound).maximum(-bound)
        m = b1 * m + (1 - b1) * scaled
        p = p - lr * m
        v = b2 * v + (1 - b2) * g * g
        yield p, {"exp_avg": m, "exp_avg_sq": v}
