"""Shampoo: Gupta, Koren and Singer, 2018, algorithm 2, with momentum of what it returns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def inverse_root(a: Tensor, p: int) -> Tensor:
    """Iterate ``M = C^p M`` and ``X = X C`` with ``C = ((p + 1) I - M) / p`` until ``M`` is I."""
    eye = torch.eye(len(a), dtype=a.dtype)
    scale = (1 + p) / (2 * a.norm())
    m, x = a * scale, eye * scale ** (1 / p)
    for _ in range(40):
        c = ((p + 1) * eye - m) / p
        m, x = torch.linalg.matrix_power(c, p) @ m, x @ c
    return x


def unfolded(g: Tensor, i: int) -> Tensor:
    """Return the matrix whose rows are the slices of a tensor along a dimension."""
    return torch.stack([x.reshape(-1) for x in g.unbind(i)])


def times(matrix: Tensor, g: Tensor, i: int) -> Tensor:
    """Multiply the vectors of a tensor along a dimension by a matrix."""
    rows = matrix @ unfolded(g, i)
    return torch.stack([x.reshape(g.select(i, 0).shape) for x in rows.unbind(0)], dim=i)


def shampoo(
    k: dict[str, Any], p: Tensor, grads: Sequence[Tensor]
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Keep a preconditioner of each dimension; of long ones, and of vectors, its diagonal."""
    shape = p.shape or (1,)
    order, total = len(shape), {}
    for i, size in enumerate(shape):
        full = (order > 1 or k["precondition_1d"]) and 1 < size <= k["max_preconditioner_dim"]
        total[i] = torch.zeros((size, size) if full else (size,), dtype=p.dtype)
    roots, b = {}, torch.zeros_like(p)
    for t, g in enumerate(grads):
        g = g + k["weight_decay"] * p
        u = g.reshape(shape)
        for i, size in enumerate(shape):
            rows = unfolded(g.reshape(shape), i)
            if total[i].dim() == 1:
                total[i] = total[i] + (rows * rows).sum(dim=1)
                roots[i] = torch.diag((total[i] + k["eps"]) ** (-1 / (2 * order)))
            else:
                total[i] = total[i] + rows @ rows.T
                if t % k["precondition_frequency"] == 0:
                    h = k["eps"] * torch.eye(size, dtype=p.dtype) + total[i]
                    roots[i] = inverse_root(h, 2 * order)
            u = times(roots[i], u, i)
        b = k["momentum"] * b + u.reshape(p.shape)
        p = p - k["lr"] * b
        kept = {"momentum_buffer": b} if k["momentum"] else {}
        for i, h in total.items():
            kept[f"diagonal_{i}" if h.dim() == 1 else f"preconditioner_{i}"] = h
        yield p, kept
