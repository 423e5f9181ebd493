"""SOAP: Vyas et al., 2024, algorithms 3 and 4, begun as in the authors' code."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from references.shampoo import times, unfolded


def first_basis(g: Tensor, i: int) -> Tensor:
    """Return the eigenvectors of ``G G'``: left singular vectors of G, completed."""
    found = list(torch.linalg.svd(unfolded(g, i), full_matrices=False)[0].unbind(1))
    size = g.shape[i]
    return completed(found + [None] * (size - len(found)), torch.eye(size, dtype=g.dtype))


def later_basis(h: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Take a power step, sort by the eigenvalues it estimates, orthonormalize, complete."""
    estimates = torch.stack([x @ h @ x for x in q.unbind(1)])
    order = torch.argsort(estimates.detach(), descending=True)
    q = q[:, order]
    found: list[Tensor | None] = []
    for x in (h @ q).unbind(1):
        rest = x
        for _ in range(2):  # twice is enough (Kahan)
            rest = rest - sum((rest @ y) * y for y in found if y is not None)
        dependent = rest.norm() < 1e-12 * (h @ q).norm()
        found.append(None if dependent else rest / rest.norm())
    return completed(found, q), order


def completed(found: list[Tensor | None], q: Tensor) -> Tensor:
    """Fill the places of a basis that are open from the columns of another basis."""
    known = [x for x in found if x is not None]
    for x in beside(torch.stack(known, dim=1).detach(), q):
        rest = x - sum((x @ y) * y for y in known)
        known.append(rest / rest.norm())
        found[found.index(None)] = known[-1]
    return torch.stack([x for x in found if x is not None], dim=1)


def beside(known: Tensor, q: Tensor) -> list[Tensor]:
    """Return the columns of ``q`` that Gaussian elimination of ``known`` takes no pivot from."""
    a, left = q.detach().T @ known, list(range(len(known)))
    for j in range(known.shape[1]):
        best = j + int(a[j:, j].abs().argmax())
        a[[j, best]] = a[[best, j]]
        left[j], left[best] = left[best], left[j]
        a[j + 1 :] = a[j + 1 :] - torch.outer(a[j + 1 :, j] / a[j, j], a[j])
    return [q[:, i] for i in left[known.shape[1] :]]


def turned(g: Tensor, bases: dict[int, Tensor], back: bool = False) -> Tensor:
    """Multiply by the bases, or their transposes, along each dimension."""
    for i, q in bases.items():
        g = times(q if back else q.T, g, i)
    return g


def soap(
    k: dict[str, Any], p: Tensor, grads: Sequence[Tensor]
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Run Adam in the eigenbases of what Shampoo keeps."""
    (b1, b2), eta = k["betas"], k["lr"]
    beta = b2 if k["shampoo_beta"] is None else k["shampoo_beta"]
    shape = p.shape or (1,)
    m, v = torch.zeros_like(p).reshape(shape), torch.zeros_like(p).reshape(shape)
    turns = len(shape) > 1 or k["precondition_1d"]
    sizes = {i: n for i, n in enumerate(shape) if turns and 1 < n <= k["max_preconditioner_dim"]}
    h = {i: torch.zeros(n, n, dtype=p.dtype) for i, n in sizes.items()}
    q: dict[int, Tensor] = {}
    for n, g in enumerate(grads):
        g = g.reshape(shape)
        if n > 0:
            m = b1 * m + (1 - b1) * g
            v = b2 * v + (1 - b2) * turned(g, q) ** 2
            u = turned(m, q) / (torch.sqrt(v) + k["eps"])
            u = turned(u, q, back=True) * (1 - b2**n) ** 0.5 / (1 - b1**n)
            p = p - eta * u.reshape(p.shape)
            p = p - eta * k["weight_decay"] * p
        for i in sizes:
            rows = unfolded(g, i)
            h[i] = beta * h[i] + (1 - beta) * rows @ rows.T
            if n == 0:
                q[i] = first_basis(g, i)
            elif n % k["precondition_frequency"] == 0:
                q[i], order = later_basis(h[i], q[i])
                v = v.index_select(i, order)
        kept = {"exp_avg": m.reshape(p.shape), "exp_avg_sq": v.reshape(p.shape)}
        yield p, kept | {f"preconditioner_{i}": x for i, x in h.items()}
