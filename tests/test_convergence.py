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

import convergence  # noqa: E402
import convergence_picture as picture  # noqa: E402


RECORDED = convergence.recorded()
QUADRATIC, ROSENBROCK, DIGITS = convergence.PROBLEMS.values()

every_optimizer = pytest.mark.parametrize("name", convergence.optimizers())


def again(name: str, key: str) -> convergence.Run:
    """Run an optimizer anew from the learning rate that the figure shows."""
    assert name in RECORDED, f"run `python docs/convergence.py {name}`"
    return convergence.run(name, convergence.PROBLEMS[key], RECORDED[name][key]["lr"])


def assert_as_recorded(name: str, key: str, found: convergence.Run) -> None:
    """Rounding may differ between machines, and chaos enlarge it: hence some leeway."""
    expected = RECORDED[name][key].get("reached")
    if expected is not None:
        assert found.reached is not None
        assert 0.7 * expected - 4 <= found.reached <= 1.4 * expected + 4


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
    """To a hundredth of the loss at the beginning, by the budget of 500 gradients."""
    found = again(name, "quadratic")
    assert found.gradients[-1] <= 1.1 * QUADRATIC.budget
    assert found.losses[-1] < 0.01 * found.losses[0]
    assert_as_recorded(name, "quadratic", found)


@every_optimizer
def test_rosenbrock_is_descended(name: str) -> None:
    """From 24.2 into the valley, and along it at least some way."""
    found = again(name, "rosenbrock")
    assert found.losses[0] == pytest.approx(24.2)
    assert found.losses[-1] < 2.0
    assert_as_recorded(name, "rosenbrock", found)


@pytest.mark.thorough
@every_optimizer
def test_digits_are_learned(name: str) -> None:
    """Chance is a loss of 2.3 and an accuracy of a tenth."""
    pytest.importorskip("sklearn")
    found = again(name, "digits")
    assert found.losses[-1] < 0.5
    assert found.accuracy is not None
    assert found.accuracy > 0.85
    assert_as_recorded(name, "digits", found)


@pytest.mark.parametrize("lr", [1e-6, 100.0])
def test_what_does_not_converge_is_not_said_to(lr: float) -> None:
    found = convergence.run("SGD", QUADRATIC, lr)
    assert found.reached is None
    assert not found.losses[-1] < 0.5 * found.losses[0]
    assert found.rank()[0] == math.inf


def test_gradients_are_counted() -> None:
    few = replace(QUADRATIC, tolerance=-1.0, budget=40)
    assert convergence.run("SGD", few, 0.1).gradients[1:4] == [1, 2, 3]
    assert convergence.run("SAM", few, 0.1).gradients[1:4] == [2, 4, 6]
    cost = convergence.CURVATURE_COST
    assert convergence.run("Sophia", few, 0.1).gradients[1:4] == [cost + 1, cost + 2, cost + 3]


def test_averages_are_measured_where_they_are_to_be_evaluated() -> None:
    few = replace(QUADRATIC, tolerance=-1.0, budget=30)
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
