"""D-Adaptation: Defazio and Mishchenko, 2023, as the authors' code has it.

The estimate is made of all parameters: ``p`` and ``grads`` are dicts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


Trees = dict[str, Tensor]
Steps = Iterator[tuple[Trees, dict[str, Trees]]]


def _total(tree: Trees) -> Any:
    return sum(x.sum() for x in tree.values())


def _none(p: Trees) -> Trees:
    return {n: torch.zeros_like(x) for n, x in p.items()}


def _first(k: dict[str, Any]) -> Tensor:
    return torch.as_tensor(k["estim_lr0"], dtype=torch.float64)


def dadapt_sgd(k: dict[str, Any], p: Trees, grads: Sequence[Trees]) -> Steps:
    """Algorithm 4."""
    start, d, s = p, _first(k), _none(p)
    r = {n: torch.zeros((), dtype=x.dtype) for n, x in p.items()}
    norm = None
    for g in grads:
        g = {n: g[n] + k["weight_decay"] * p[n] for n in p}
        if norm is None:
            norm = _total({n: x**2 for n, x in g.items()}).sqrt()
        rate = d * k["lr"] / norm
        r = {n: r[n] + rate * (g[n] * s[n]).sum() for n in p}
        s = {n: s[n] + rate * g[n] for n in p}
        d = torch.maximum(d, 2 * sum(r.values()) / _total({n: x**2 for n, x in s.items()}).sqrt())
        mu = k["momentum"]
        p = {n: mu * p[n] + (1 - mu) * (start[n] - s[n]) for n in p}
        numbers = {"grad_norm0": dict.fromkeys(p, norm), "estim_lr": dict.fromkeys(p, d)}
        yield p, {"grad_sum": s, "params0": start, "numerator_weighted": r, **numbers}


def dadapt_adamw(k: dict[str, Any], p: Trees, grads: Sequence[Trees]) -> Steps:
    """Algorithm 5, with the decoupled weight decay and the bias correction of the code."""
    (b1, b2), d = k["betas"], _first(k)
    b3 = b2**0.5
    m, v, s = _none(p), _none(p), _none(p)
    r = {n: torch.zeros((), dtype=x.dtype) for n, x in p.items()}
    for t, g in enumerate(grads, start=1):
        rate = d * k["lr"]
        if k["use_bias_correction"]:
            rate = rate * (1 - b2**t) ** 0.5 / (1 - b1**t)
        roots = {n: x.sqrt() if t > 1 else x for n, x in v.items()}
        agreement = {n: (g[n] * s[n] / (roots[n] + k["eps"])).sum() for n in p}
        r = {n: b3 * r[n] + (1 - b3) * rate * agreement[n] for n in p}
        m = {n: b1 * m[n] + (1 - b1) * rate * g[n] for n in p}
        v = {n: b2 * v[n] + (1 - b2) * g[n] ** 2 for n in p}
        s = {n: b3 * s[n] + (1 - b3) * rate * g[n] for n in p}
        total = (1 - b3) * _total({n: x.abs() for n, x in s.items()})
        d = torch.maximum(d, sum(r.values()) / total)
        p = {
            n: x - rate * k["weight_decay"] * x - m[n] / (v[n].sqrt() + k["eps"])
            for n, x in p.items()
        }
        slots = {"exp_avg": m, "exp_avg_sq": v, "grad_sum": s, "numerator_weighted": r}
        yield p, {**slots, "estim_lr": dict.fromkeys(p, d)}


def dadapt_adagrad(k: dict[str, Any], p: Trees, grads: Sequence[Trees]) -> Steps:
    """Algorithm 2, with the norms of the code."""
    start, d, s = p, _first(k), _none(p)
    a = {n: torch.zeros_like(x) + k["initial_accumulator_value"] for n, x in p.items()}
    q = {n: torch.zeros((), dtype=x.dtype) for n, x in p.items()}
    for g in grads:
        g = {n: g[n] + k["weight_decay"] * p[n] for n in p}
        rate = d * k["lr"]
        a = {n: a[n] + g[n] ** 2 for n in p}
        divisor = {n: x.sqrt() + k["eps"] for n, x in a.items()}
        q = {n: q[n] + rate**2 * (g[n] ** 2 / divisor[n]).sum() for n in p}
        s = {n: s[n] + rate * g[n] for n in p}
        gap = _total({n: x**2 / divisor[n] for n, x in s.items()}) - sum(q.values())
        d = torch.maximum(d, gap / _total({n: x.abs() for n, x in s.items()}))
        mu = k["momentum"]
        p = {n: mu * p[n] + (1 - mu) * (start[n] - s[n] / divisor[n]) for n in p}
        slots = {"sum": a, "grad_sum": s, "params0": start, "grad_sq_weighted": q}
        yield p, {**slots, "estim_lr": dict.fromkeys(p, d)}
