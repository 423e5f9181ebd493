"""Adan: beside Optax, and its weight decay."""

from __future__ import annotations

import torch
from conftest import nonzero
from tolerances import assert_close

import torchopt


def test_values_of_optax_from_the_betas_that_mean_the_same() -> None:
    """``optax.adan(0.03, 0.7, 0.5, 0.9, 1e-3, 0.0, 0.2)`` of Optax 0.2.8, in float64.

    It has ``1 - b2`` where the authors have ``b2``: at 0.5 they are equal.
    """
    p = torch.tensor([0.5, -1.0, 2.0, 0.1], dtype=torch.float64)
    grads = [
        [0.3, -0.2, 1.0, -0.5],
        [-0.6, 0.1, -0.2, 0.9],
        [0.02, 0.3, -0.05, -0.1],
        [-0.1, -0.02, -0.3, -0.2],
    ]
    tx = torchopt.adan(0.03, (0.7, 0.5, 0.9), 1e-3, 0.2, no_prox=True)
    state = tx.init(p)
    for g in grads:
        p, state = tx.apply_gradients(torch.tensor(g, dtype=torch.float64), state, p, inplace=False)
    expected = [0.4879668379795624, -0.9819418499114508, 1.9336663333803161, 0.10869486248751974]
    assert_close(p, torch.tensor(expected, dtype=torch.float64))


def test_defaults_are_those_of_the_authors() -> None:
    tx = torchopt.adan()
    assert tx.hyperparameters() == {
        "maximize": False,
        "betas": (0.98, 0.92, 0.99),
        "eps": 1e-8,
        "lr": 1e-3,
        "weight_decay": 0.0,
        "no_prox": False,
    }


def test_weights_decay_by_a_division_under_the_rate_of_the_step() -> None:
    params = {"a": nonzero(3), "b": nonzero(3)}
    grads = {n: torch.zeros_like(p) for n, p in params.items()}
    tx = torchopt.adan({"a": 0.5, "b": 0.25}, weight_decay={"a": 0.4, "b": 0.0})
    new, _ = tx.apply_gradients(grads, tx.init(params), params, inplace=False)
    assert_close(new, {"a": params["a"] / 1.2, "b": params["b"]})

    own = torch.nn.Parameter(params["a"].clone())
    optimizer = torchopt.Adan([own], 0.5, weight_decay=0.4)
    optimizer.param_groups[0]["lr"] = 1.0
    own.grad = torch.zeros_like(own)
    optimizer.step()
    assert_close(own.detach(), params["a"] / 1.4)
