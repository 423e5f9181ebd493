"""Adan: its defaults and its weight decay."""

from __future__ import annotations

import torch
from conftest import nonzero
from tolerances import assert_close

import torchopt


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
