"""Our optimizers and torch's over equal parameters, step by step."""

from __future__ import annotations

from typing import Any

import torch
from cases import Case
from conftest import nonzero
from tolerances import assert_close
from torch import Tensor, nn


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(nonzero(2, 3)), nn.Parameter(nonzero(3))]


def twins(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in params]


def set_grads(*lists: list[nn.Parameter]) -> None:
    """Give equal random gradients to corresponding parameters."""
    for group in zip(*lists):
        g = nonzero(*group[0].shape, dtype=group[0].dtype)
        for p in group:
            p.grad = g.clone()


def data(params: list[Any]) -> list[Tensor]:
    return [p.detach() for p in params]


def pair(case: Case, **changed: Any) -> tuple[Any, Any, list[Any], list[Any]]:
    """Return our optimizer and torch's with the same options over equal parameters."""
    ours, theirs = (params := parameters()), twins(params)
    kwargs = {**case.kwargs, **changed}
    return case.cls(ours, **kwargs), case.torch_cls(theirs, **kwargs), ours, theirs


def assert_same_path(
    ours: Any, theirs: Any, p: Any, q: Any, after: Any = None, steps: int = 6
) -> None:
    """Assert that two optimizers go the same way, with ``after(optimizer, k)`` after each step."""
    for k in range(steps):
        set_grads(p, q)
        before = data(p)[0].clone()
        ours.step()
        theirs.step()
        if k == 0:
            assert not torch.equal(before, data(p)[0])
        if after is not None:
            after(ours, k)
            after(theirs, k)
        assert_close(data(p), data(q), times=10, what=f"step {k}")
