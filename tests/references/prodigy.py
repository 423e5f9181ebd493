"""Prodigy: Mishchenko and Defazio, algorithm 4, with the options of the authors' code.

The estimate is made of all parameters: ``p`` and ``grads`` are dicts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def prodigy(
    k: dict[str, Any], p: dict[str, Tensor], grads: Sequence[dict[str, Tensor]]
) -> Iterator[tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]]:
    """Adam on gradients times the estimate, which is also a factor of the rate."""
    (b1, b2), d0, start = k["betas"], k["estim_lr0"], p
    b3 = b2**0.5 if k["beta3"] is None else k["beta3"]
    d = torch.as_tensor(d0, dtype=torch.float64)
    m, v, s = ({n: torch.zeros_like(x) for n, x in p.items()} for _ in range(3))
    r = {n: torch.zeros((), dtype=x.dtype) for n, x in p.items()}
    for t, g in enumerate(grads, start=1):
        rate = d * k["lr"]
        if k["use_bias_correction"]:
            rate = rate * (1 - b2**t) ** 0.5 / (1 - b1**t)
        m = {n: b1 * m[n] + (1 - b1) * d * g[n] for n in p}
        v = {n: b2 * v[n] + (1 - b2) * d**2 * g[n] ** 2 for n in p}
        r = {n: b3 * r[n] + d / d0 * rate * (g[n] * (start[n] - p[n])).sum() for n in p}
        by = d if k["safeguard_warmup"] else rate
        s = {n: b3 * s[n] + d / d0 * by * g[n] for n in p}
        found = k["estim_lr_coef"] * sum(r.values()) / sum(x.abs().sum() for x in s.values())
        d = torch.maximum(d, found)
        p = {
            n: x - rate * k["weight_decay"] * x - rate * m[n] / (v[n].sqrt() + d * k["eps"])
            for n, x in p.items()
        }
        yield (
            p,
            {
                "exp_avg": m,
                "exp_avg_sq": v,
                "grad_sum": s,
                "params0": start,
                "numerator_weighted": r,
                "estim_lr": dict.fromkeys(p, d),
            },
        )
