"""Functions to minimise, shared by the tests of solvers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor


def rosenbrock(x: Tensor) -> Tensor:
    """The valley of Rosenbrock in any number of dimensions; its minimum is 0 at ones."""
    return (1 - x[:-1]).square().sum() + 100 * (x[1:] - x[:-1].square()).square().sum()


def logistic_data(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return standardised data of scikit-learn and their classes."""
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    x = (x - x.mean(0)) / (x.std(0) + 1e-9)
    return torch.tensor(x, dtype=dtype), torch.tensor(y)


def logistic_regression(
    x: Tensor, y: Tensor, strength: float = 1.0
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Return the mean loss of scikit-learn's ``LogisticRegression(C=1/strength)``, and zeros."""
    classes, features = int(y.max()) + 1, x.shape[1]

    def loss(w: Tensor) -> Tensor:
        w = w.reshape(classes, features + 1)
        logits = x @ w[:, :features].T + w[:, features]
        penalty = 0.5 * strength * w[:, :features].square().sum() / len(y)
        return torch.nn.functional.cross_entropy(logits, y) + penalty

    return loss, torch.zeros(classes * (features + 1), dtype=x.dtype)


def scipy_minimum(fn: Callable[[Tensor], Tensor], start: Tensor, **options: Any) -> Any:
    """Return what SciPy's L-BFGS-B finds."""
    optimize = pytest.importorskip("scipy.optimize")

    def value_and_grad(x: Any) -> Any:
        p = torch.tensor(x, dtype=start.dtype, requires_grad=True)
        value = fn(p)
        value.backward()
        assert p.grad is not None
        return value.item(), p.grad.numpy().astype("float64")

    return optimize.minimize(
        value_and_grad, start.numpy(), jac=True, method="L-BFGS-B", options=options
    )


def central_difference(
    function: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-6
) -> Tensor:
    """Return the gradient of a scalar function by central differences."""
    result = torch.empty_like(at)
    for k in range(at.numel()):
        delta = torch.zeros_like(at).view(-1)
        delta[k] = step
        delta = delta.view_as(at)
        result.view(-1)[k] = (function(at + delta) - function(at - delta)).item() / (2 * step)
    return result
