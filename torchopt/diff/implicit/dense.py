"""A dense linear solver."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchopt.base import tree


def solve_dense(matvec: Callable[[Any], Any], b: Any, *, init: Any = None) -> Any:
    """Solve a linear system by its matrix."""
    leaves, spec = tree.flatten(b)
    present = [x for x in leaves if x is not None]
    sizes, shapes = [x.numel() for x in present], [x.shape for x in present]
    vector = torch.cat([x.reshape(-1) for x in present])

    def restored(v: Tensor) -> Any:
        parts = iter(p.reshape(s).to(x.dtype) for p, s, x in zip(v.split(sizes), shapes, present))
        return tree.unflatten(spec, [None if x is None else next(parts) for x in leaves])

    def column(v: Tensor) -> Tensor:
        return torch.cat([x.reshape(-1) for x in tree.flatten(matvec(restored(v)))[0] if x is not None])

    eye = torch.eye(len(vector), dtype=vector.dtype, device=vector.device)
    matrix = torch.stack([column(row) for row in eye], 1)
    return restored(torch.linalg.solve(matrix, vector))
