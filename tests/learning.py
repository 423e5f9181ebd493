"""Steps with learned hyperparameters; shared by the tests of their kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from conftest import nonzero
from fusing import SHAPES, Result
from torch import Tensor, nn

import torchopt


#: Name -> the optimizer of its hyperparameters, and those. Decay rates are far from 1, where
#: derivatives by them would be small differences of large numbers.
CASES: dict[str, tuple[Callable[..., Any], dict[str, float]]] = {
    "sgd": (torchopt.sgd, {"lr": 0.1}),
    "sgd-momentum": (torchopt.sgd, {"lr": 0.1, "momentum": 0.8, "dampening": 0.2}),
    "sgd-nesterov": (
        lambda **h: torchopt.sgd(nesterov=True, **h),
        {"lr": 0.1, "momentum": 0.7, "weight_decay": 0.05},
    ),
    "adam": (
        lambda b1, b2, **h: torchopt.adam(betas=(b1, b2), **h),
        {"lr": 0.1, "b1": 0.7, "b2": 0.8, "eps": 0.05, "weight_decay": 0.1},
    ),
    "adam-amsgrad": (
        lambda b1, b2, **h: torchopt.adam(betas=(b1, b2), amsgrad=True, **h),
        {"lr": 0.1, "b1": 0.7, "b2": 0.8, "eps_root": 0.05},
    ),
    "adamw": (torchopt.adamw, {"lr": 0.1, "weight_decay": 0.2}),
    "rmsprop": (
        lambda **h: torchopt.rmsprop(centered=True, **h),
        {"lr": 0.1, "alpha": 0.7, "eps": 0.05, "momentum": 0.6},
    ),
}


def shared(value: float, params: Result) -> Any:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def of_each(value: float, params: Result) -> Any:
    """One of each parameter, as MAML++ has."""
    return [shared(value * (1 + k / 10), params) for k in range(len(params))]


def of_entries(value: float, params: Result) -> Any:
    """One of each entry, as Meta-SGD has."""
    entries = [value * (1 + torch.rand_like(p) / 10) for p in params]
    return [x.detach().requires_grad_() for x in entries]


FORMS: dict[str, Callable[[float, Result], Any]] = {
    "shared": shared,
    "parameter": of_each,
    "entry": of_entries,
}


def leaves_of(values: Any) -> Result:
    return [x for v in values for x in (v if isinstance(v, list) else [v])]


def problem(shapes: Any = SHAPES, dtype: torch.dtype = torch.float64) -> tuple[Result, Result]:
    """Parameters and the coefficients of their losses."""
    torch.manual_seed(0)
    params = [nonzero(*shape).to(dtype).requires_grad_() for shape in shapes]
    return params, [nonzero(*shape).to(dtype) for shape in shapes]


def gradients(params: Result, coefficients: Result) -> Result:
    """Those of parameters that depend on each other."""
    common = 1 + torch.stack([p.sum() for p in params]).sum().tanh() / 2
    return [(p**2 + c) * common for p, c in zip(params, coefficients)]


def _functional(tx: Any, params: Result, coefficients: Result, count: int) -> Result:
    state = tx.init(params)
    for _ in range(count):
        grads = gradients(params, coefficients)
        params, state = tx.apply_gradients(grads, state, params, inplace=False)
    return list(params)


def _by_updates(tx: Any, params: Result, coefficients: Result, count: int) -> Result:
    state = tx.init(params)
    for _ in range(count):
        grads = gradients(params, coefficients)
        updates, state = tx.update(grads, state, params, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)
    return list(params)


def _differentiable(tx: Any, params: Result, coefficients: Result, count: int) -> Result:
    net = Net(params)
    optimizer = torchopt.MetaOptimizer(net, tx)
    for _ in range(count):
        optimizer.step(net.loss(coefficients))
    return net.now()


class Net(nn.Module):
    """Parameters that are given."""

    def __init__(self, params: Result) -> None:
        super().__init__()
        for k, p in enumerate(params):
            self._parameters[str(k)] = p  # pyright: ignore[reportArgumentType]

    def now(self) -> Result:
        return [p for p in self._parameters.values() if p is not None]

    def loss(self, coefficients: Result) -> Tensor:
        parts = [(p**3 / 3 + c * p).sum() for p, c in zip(self.now(), coefficients)]
        total = torch.stack(parts).sum()
        return total + total.tanh()


FACES: dict[str, Callable[[Any, Result, Result, int], Result]] = {
    "apply_gradients": _functional,
    "update": _by_updates,
    "differentiable": _differentiable,
}


def judged(params: Result, coefficients: Result) -> Tensor:
    """An outer loss."""
    return torch.stack([(p.sin() * c).sum() for p, c in zip(params, coefficients)]).sum()
