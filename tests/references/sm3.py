"""SM3: Anil et al., Memory-efficient adaptive optimization, SM3-II, entry by entry."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def sm3(
    k: dict[str, Any], p: Tensor, grads: Sequence[Tensor]
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Keep for each slice the greatest of what its entries have added up to."""
    m, zero = torch.zeros_like(p), torch.zeros((), dtype=p.dtype)
    entries = list(itertools.product(*map(range, p.shape)))
    slices = [(d, n) for d, size in enumerate(p.shape) for n in range(size)] or [()]
    holds = {s: [i for i in entries if not s or i[s[0]] == s[1]] for s in slices}
    mu = dict.fromkeys(slices, zero)
    for g in grads:
        g = g + k["weight_decay"] * p
        v = {}
        for i in entries:
            least = torch.stack([mu[s] for s in slices if i in holds[s]]).amin()
            v[i] = least + g[i] ** 2
        mu = {s: torch.stack([v[i] for i in holds[s]]).amax() for s in slices}
        each = torch.stack([v[i] for i in entries]).reshape(p.shape)
        m = k["momentum"] * m + (1 - k["momentum"]) * g / torch.sqrt(each + k["eps"])
        p = p - k["lr"] * m
        yield p, {"accumulator": torch.stack([mu[s] for s in slices]), "momentum_buffer": m}
