"""What a refused call must leave bit-identical, and objects in use to refuse something to."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import Case
from conftest import nonzero, nonzero_like
from torch import Tensor, nn

import torchopt


def snapshot(value: Any) -> Any:
    """Return a comparable record of everything reachable: identities, versions, bits, numbers."""
    if isinstance(value, Tensor):
        if value.is_meta:
            bits: Any = None
        else:
            dense = value.detach().to_dense() if value.layout != torch.strided else value.detach()
            bits = dense.contiguous().clone().reshape(-1).view(torch.uint8).tolist()
        record = (id(value), value._version, value.dtype, tuple(value.shape), bits)
        return (*record, snapshot(value.grad) if value.is_leaf else None)
    if isinstance(value, dict):
        return [
            (id(key) if isinstance(key, Tensor) else key, snapshot(entry))
            for key, entry in value.items()
        ]
    if isinstance(value, (list, tuple)):
        return [type(value).__name__, *map(snapshot, value)]
    if isinstance(value, torchopt.OptState):
        return [id(value), snapshot(value.step), snapshot(value.slots)]
    if isinstance(value, torch.optim.Optimizer):
        return [id(value), snapshot(value.param_groups), snapshot(dict(value.state))]
    if isinstance(value, torchopt.FuncOptimizer):
        return [id(value), snapshot(value.state), value.inplace]
    if isinstance(value, torchopt.GradientTransformation):
        return [id(value), *(snapshot(getattr(value, f.name)) for f in dataclasses.fields(value))]
    return repr(value)


@contextlib.contextmanager
def refused(error: Any, message: str, *objects: Any) -> Iterator[None]:
    """Expect an error, and that ``objects`` are bit-identical afterwards."""
    before = snapshot(objects)
    with pytest.raises(error, match=message):
        yield
    assert snapshot(objects) == before


def params_of(**options: Any) -> dict[str, Tensor]:
    return {"w": nonzero(2, 3, **options), "b": nonzero(3, **options)}


def ready(case: Case) -> tuple[Any, Any, Any, Any]:
    """Return a transformation, parameters, gradients and a state after one update."""
    tx, params = case.tx(), params_of()
    _, state = tx.update(nonzero_like(params), tx.init(params), params, inplace=False)
    return tx, params, nonzero_like(params), state


def trained(case: Case) -> tuple[Any, list[Any]]:
    params = [nn.Parameter(nonzero(3)), nn.Parameter(nonzero(2, 3))]
    optimizer = case.cls(params, **case.kwargs)
    for _ in range(2):
        for p in params:
            p.grad = nonzero(*p.shape)
        optimizer.step()
    return optimizer, params


def with_last(grads: Any, value: Any) -> Any:
    """Return the gradients with a bad one at the end, after good ones."""
    return {"w": value, "b": grads["b"]}  # dicts are walked in sorted order


both_ways = pytest.mark.parametrize("inplace", [True, False], ids=["inplace", "pure"])
