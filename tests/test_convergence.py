"""Every optimizer converges, and the figure of the docs is of the optimizers of today."""

from __future__ import annotations

import hashlib
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import ALGORITHMS, SPECIAL_ALGORITHMS

import torchopt


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "docs"))

import convergence
import convergence_picture as picture


RECORDED = convergence.recorded()
QUADRATIC = convergence.PROBLEMS["quadratic"]

every_optimizer = pytest.mark.parametrize("name", convergence.optimizers())


def again(name: str, key: str, tolerance: float | None = None) -> convergence.Run:
    """Run an optimizer anew from the learning rate that the figure shows."""
    assert name in RECORDED, f"run `python docs/convergence.py {name}`"
    problem = convergence.PROBLEMS[key]
    if tolerance is not None:
        problem = replace(problem, tolerance=tolerance)
    return convergence.run(name, problem, RECORDED[name][key]["lr"])


def test_the_list_leaves_none_out() -> None:
    listed = set(convergence.optimizers().values())
    rows = {row.cls for row in ALGORITHMS + SPECIAL_ALGORITHMS}
    assert listed == rows | {torchopt.SAM, torchopt.LBFGS}


def test_the_figure_is_of_the_optimizers_of_today() -> None:
    today = convergence.optimizers().keys()
    assert RECORDED.keys() == today, (
        f"run `python docs/convergence.py {' '.join(sorted(today - RECORDED.keys()))}`"
    )
    for row in RECORDED.values():
        assert row.keys() == convergence.PROBLEMS.keys()
    digest = hashlib.sha256(convergence.DATA.read_bytes()).hexdigest()
    assert digest.encode() in picture.PICTURE.read_bytes(), (
        "run `python docs/convergence_picture.py`"
    )


@every_optimizer
def test_the_quadratic_is_minimised(name: str) -> None:
    """To a fiftieth of the loss at the beginning, where it stays, in 500 gradients."""
    found = again(name, "quadratic", 0.02 * RECORDED[name]["quadratic"]["losses"][0])
    assert found.reached is not None
    assert found.reached <= QUADRATIC.budget


@every_optimizer
def test_rosenbrock_is_descended(name: str) -> None:
    """From 24.2 into the valley, whose floor is at 4.1 there, in 1000 gradients."""
    found = again(name, "rosenbrock", 4.5)
    assert found.losses[0] == pytest.approx(24.2)
    assert found.reached is not None


@pytest.mark.thorough
@pytest.mark.parametrize("key", convergence.PROBLEMS)
@every_optimizer
def test_the_figure_shows_what_happens(name: str, key: str) -> None:
    """Rounding may differ between machines, and grow from step to step: hence the leeway."""
    if key == "digits":
        pytest.importorskip("sklearn")
    found, expected = again(name, key), RECORDED[name][key].get("reached")
    if expected is not None:
        assert found.reached is not None
        assert 0.7 * expected - 4 <= found.reached <= 1.4 * expected + 4
    if key == "digits":  # chance is a tenth
        assert found.accuracy is not None
        assert found.accuracy > 0.85


@pytest.mark.parametrize("lr", [1e-6, 100.0])
def test_what_does_not_converge_is_not_said_to(lr: float) -> None:
    found = convergence.run("SGD", QUADRATIC, lr)
    assert found.reached is None
    assert found.rank()[0] == math.inf


def test_a_loss_that_is_low_by_chance_is_not_low_enough() -> None:
    """It is to stay low for some measurements."""
    losses = [4.0, 0.0, 4.0, 4.0, 0.0, 4.0, 0.0, 0.0, 0.0, 9.0]
    given = iter([*losses, *[9.0] * 9])
    problem = replace(
        QUADRATIC, tolerance=1.0, budget=20, whole=lambda params: torch.tensor(next(given))
    )
    found = convergence.run("SGD", problem, 1e-3)
    assert found.losses == losses[:9]
    assert found.reached == 6


def test_gradients_are_counted() -> None:
    few = replace(QUADRATIC, tolerance=-1.0, budget=40)
    assert convergence.run("SGD", few, 0.1).gradients[1:4] == [1, 2, 3]
    assert convergence.run("SAM", few, 0.1).gradients[1:4] == [2, 4, 6]
    cost = convergence.CURVATURE_COST
    assert convergence.run("Sophia", few, 0.1).gradients[1:4] == [cost + 1, cost + 2, cost + 3]


def test_averages_are_measured_where_they_are_to_be_evaluated() -> None:
    few = replace(QUADRATIC, tolerance=-1.0, budget=15)
    found = convergence.run("SGDScheduleFree", few, 0.5)
    params = [x.requires_grad_() for x in few.start()]
    tx = torchopt.schedule_free_sgd(0.5)
    state = tx.init(params)
    for _ in range(found.gradients[-1]):
        grads = torch.autograd.grad(few.whole(params), params)
        params, state = tx.apply_gradients(list(grads), state, params, inplace=False)
        params = [x.detach().requires_grad_() for x in params]
    assert found.losses[-1] == pytest.approx(few.whole(tx.eval_params(state, params)).item())
    assert found.losses[-1] != pytest.approx(few.whole(params).item())


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("SGD", picture.PLAIN),
        ("Lion", picture.SIGNS),
        ("RAdam", picture.ENTRIES),
        ("LAMB", picture.TENSORS),
        ("Prodigy", picture.FREE),
        ("SAM", picture.MORE),
        ("Sophia", picture.MORE),
    ],
)
def test_families_are_found_by_what_an_optimizer_does(name: str, family: str) -> None:
    assert picture.family(name) == family
