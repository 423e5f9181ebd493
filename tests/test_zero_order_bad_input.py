"""Zero-order calls that were meant otherwise: what was given, what was expected."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from refusing import refused
from torch.distributions import MultivariateNormal, Normal, Uniform

from torchopt.diff import zero_order as module
from torchopt.diff.zero_order import zero_order


X = torch.ones(2, requires_grad=True)


def square(x: Any) -> Any:
    return x.square().sum()


BAD_DECORATORS: dict[str, Any] = {
    "a method": ({"method": "central"}, ValueError, r"one of \['naive', 'forward', 'antithetic'"),
    "no samples": ({"num_samples": 0}, ValueError, "num_samples must be a whole number >= 1"),
    "a yes": ({"num_samples": True}, TypeError, "num_samples must be a whole number >= 1"),
    "sigma of zero": ({"sigma": 0}, ValueError, "sigma must be a finite number > 0, got 0"),
    "no sigma": ({"sigma": float("nan")}, ValueError, "sigma must be a finite number > 0"),
    "a tensor": ({"sigma": torch.ones(())}, TypeError, "sigma must be a number > 0, got a tensor"),
    "from behind": ({"argnums": -1}, ValueError, "counts from 0, got -1"),
    "a name": ({"argnums": "x"}, TypeError, "argnums must be a whole number"),
    "twice": ({"argnums": (0, 0)}, ValueError, "each once"),
    "none": ({"argnums": ()}, ValueError, "at least one argument"),
    "a seed": ({"generator": 3}, TypeError, "generator must be a torch.Generator, got int: 3"),
    "vectorize": ({"vectorize": "no"}, TypeError, "vectorize must be True, False or None"),
    "chunks": ({"chunk_size": 0}, ValueError, "chunk_size must be a whole number >= 1"),
    "a number": ({"distribution": 3.0}, TypeError, r"sample\(shape\).*torch.randn"),
    "a class": ({"distribution": Normal}, TypeError, "got the class Normal"),
    "bounded": ({"distribution": Uniform(-1.0, 1.0)}, ValueError, "positive on the whole line"),
    "batches": ({"distribution": Normal(torch.zeros(2), 1.0)}, ValueError, r"batch_shape \(2,\)"),
    "vectors": (
        {"distribution": MultivariateNormal(torch.zeros(2), torch.eye(2))},
        ValueError,
        r"event_shape \(2,\)",
    ),
}


@pytest.mark.parametrize("name", BAD_DECORATORS)
def test_bad_decorators(name: str) -> None:
    options, error, message = BAD_DECORATORS[name]
    with pytest.raises(error, match=message):
        zero_order(**{"distribution": torch.randn, **options})


def call(function: Any = square, *args: Any, **options: Any) -> Any:
    smoothed = zero_order(options.pop("distribution", torch.randn), **options)(function)
    return smoothed(*(args or (X,)))


BAD_CALLS: dict[str, Any] = {
    "no function": (lambda: call(3.0), TypeError, "decorates a function, got float: 3.0"),
    "a vector": (lambda: call(lambda x: x), ValueError, r"got shape \(2,\); take its mean"),
    "nothing": (lambda: call(lambda x: None), TypeError, "got None. Does it return"),
    "complex": (lambda: call(lambda x: x.sum() * 1j), TypeError, "real scalar"),
    "two values": (lambda: call(lambda x: (x.sum(), 1)), TypeError, "must return a scalar"),
    "too few": (lambda: call(argnums=1), ValueError, "argnums has 1, but square was called with 1"),
    "integers": (
        lambda: call(square, torch.arange(3)),
        TypeError,
        "got dtype torch.int64 as argument 0",
    ),
    "a leaf": (
        lambda: call(square, X, {"a": [X, 2.0]}, argnums=(0, 1)),
        TypeError,
        "got 2.0 as argument 1, 'a.1'",
    ),
    "no leaf": (lambda: call(square, []), ValueError, "no tensors to perturb"),
    "shapes": (
        lambda: call(distribution=lambda shape: torch.randn(3)),
        ValueError,
        r"a sample of shape \(2,\) and gave \(3,\)",
    ),
    "no noise": (lambda: call(distribution=lambda shape: "z"), TypeError, "must draw tensors"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(name: str) -> None:
    function, error, message = BAD_CALLS[name]
    with refused(error, message, X):
        function()


def test_an_error_of_the_function_is_its_own() -> None:
    def broken(x: Any) -> Any:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        call(broken)

    calls = 0

    def later(x: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise KeyError("mine")
        return x.sum()

    with pytest.raises(KeyError, match="mine"):
        call(later)
    calls = 0
    with pytest.raises(RuntimeError, match="mine"):
        call(later, vectorize=True)


def test_the_module_can_be_called_as_in_0_7_3() -> None:
    smoothed = module(distribution=torch.randn, method="naive", argnums=0)(square)
    assert smoothed(X).item() == 2
    with pytest.raises(ValueError, match="method must be"):
        module(torch.randn, "other")
