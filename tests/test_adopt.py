"""ADOPT: beside Optax, and where its bounds rule instead of its moments."""

from __future__ import annotations

import pytest
import test_references as laws
import torch
from cases import Case, named
from conftest import nonzero
from tolerances import assert_close

import torchopt


#: Optax 0.2.8 in float64: ``optax.contrib.adopt(0.03, 0.7, 0.9, 1e-3)``, and with
#: ``use_clipping=False``.
OPTAX = {
    True: [0.5215883751706524, -1.027174678910554, 2.007739490483083, 0.08647962469327626],
    False: [0.5412983751706524, -1.0328420837923833, 2.007739490483083, 0.07071162469327626],
}

#: Roots above and below eps, quotients above and below the bound.
BOUNDED = Case(
    "adopt-bounded",
    named("adopt").algorithm,
    {"lr": 0.03, "betas": (0.8, 0.7), "eps": 0.9, "clip_exponent": 0.4, "weight_decay": 0.3},
)


@pytest.mark.parametrize("use_clipping", OPTAX)
def test_values_of_optax(use_clipping: bool) -> None:
    p = torch.tensor([0.5, -1.0, 2.0, 0.1], dtype=torch.float64)
    grads = [
        [0.3, -0.2, 1.0, -0.5],
        [-0.6, 0.1, -0.2, 0.9],
        [0.02, 0.3, -0.05, -0.1],
        [-0.1, -0.02, -0.3, -0.2],
    ]
    tx = torchopt.adopt(0.03, (0.7, 0.9), 1e-3, use_clipping=use_clipping)
    state = tx.init(p)
    for g in grads:
        p, state = tx.apply_gradients(torch.tensor(g, dtype=torch.float64), state, p, inplace=False)
    assert_close(p, torch.tensor(OPTAX[use_clipping], dtype=torch.float64))


def test_values_where_bounds_rule() -> None:
    laws.test_every_number_shows(BOUNDED)
    laws.test_the_functional_api(BOUNDED)
    laws.test_the_object_oriented_api(BOUNDED)


@pytest.mark.parametrize("setting", [None, False], ids=["fused", "rules"])
def test_derivatives_where_bounds_rule(setting: bool | None) -> None:
    laws.test_derivatives_are_those_of_the_reference(BOUNDED, setting)


def test_the_first_step_moves_nothing_whatever_decays() -> None:
    p, g = nonzero(3), nonzero(3)
    for decoupled in (False, True):
        tx = torchopt.adopt(0.1, weight_decay=0.5, decoupled_weight_decay=decoupled)
        updates, state = tx.update(g, tx.init(p), p, inplace=False)
        assert (updates == 0).all()
        assert_close(state.exp_avg_sq, (g if decoupled else g + 0.5 * p).square())
        assert (tx.update(g, state, p, inplace=False)[0] != 0).all()


def test_a_parameter_that_joins_later_starts_by_itself() -> None:
    """The count is that of the parameter: its first gradient moves nothing."""
    a, b = (torch.nn.Parameter(nonzero(2)) for _ in range(2))
    start, optimizer = b.detach().clone(), torchopt.ADOPT([a, b], 0.1)
    for step in range(4):
        a.grad, b.grad = nonzero(2), nonzero(2) if step >= 2 else None
        optimizer.step()
        assert torch.equal(b, start) == (step < 3)


def test_defaults_are_those_of_the_authors() -> None:
    defaults = {"lr": 1e-3, "betas": (0.9, 0.9999), "eps": 1e-6, "weight_decay": 0.0}
    bounds = {"use_clipping": True, "clip_exponent": 0.25}
    flags = {"decoupled_weight_decay": False, "maximize": False}
    assert torchopt.adopt().hyperparameters() == {**defaults, **bounds, **flags}
