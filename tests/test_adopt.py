"""ADOPT: where its bounds rule instead of its moments."""

from __future__ import annotations

import pytest
import test_references as laws
import torch
from cases import Case, named
from conftest import nonzero
from tolerances import assert_close

import torchopt


#: Roots above and below eps, quotients above and below the bound.
BOUNDED = Case(
    "adopt-bounded",
    named("adopt").algorithm,
    {"lr": 0.03, "betas": (0.8, 0.7), "eps": 0.9, "clip_exponent": 0.4, "weight_decay": 0.3},
)


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
