"""What the rows of the table of algorithms say is so, and every optimizer has a row."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from algorithms import Algorithm
from cases import (
    ALGORITHMS,
    CASES,
    SPECIAL_ALGORITHMS,
    Case,
    every_algorithm,
    every_case,
    every_row,
)
from conftest import nonzero, nonzero_like
from fusing import needs_library
from tolerances import assert_close

import torchopt
from torchopt.kernels import why


pytestmark = pytest.mark.complete


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs"))

import catalogue_tables  # noqa: E402


def named_classes(base: type) -> set[type]:
    """Return the classes that ``torchopt`` exports, the base left out."""
    values = [
        value
        for value in (getattr(torchopt, name) for name in dir(torchopt))
        if isinstance(value, type)
    ]
    return {value for value in values if issubclass(value, base) and value is not base}


def test_every_optimizer_has_a_row() -> None:
    algorithms = ALGORITHMS + SPECIAL_ALGORITHMS
    wrapping = {torchopt.SAM, torchopt.MetaSAM}  # which are given the optimizer: test_sam.py
    plain, meta = map(named_classes, (torchopt.Optimizer, torchopt.MetaOptimizer))
    assert plain - wrapping == {row.cls for row in algorithms}
    assert meta - wrapping == {row.meta for row in algorithms} - {None}
    for names in ([row.name for row in algorithms], [case.name for case in CASES]):
        assert len(set(names)) == len(names)


@every_row
def test_the_faces_are_of_one_algorithm(algorithm: Algorithm) -> None:
    assert getattr(torchopt, algorithm.name) is algorithm.recipe
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    assert algorithm.cls([parameter]).transformation == algorithm.recipe()
    if algorithm.meta is not None:
        net = torch.nn.Linear(1, 1, bias=False)
        assert algorithm.meta(net).transformation == algorithm.recipe()


def test_the_catalogue_lists_what_there_is() -> None:
    text = catalogue_tables.PAGE.read_text(encoding="utf-8")
    assert catalogue_tables.written(text) == text, "run `python docs/catalogue_tables.py`"
    for row in ALGORITHMS + SPECIAL_ALGORITHMS:
        assert f"| `{row.name}` |" in text


@every_case
def test_values_have_an_oracle(case: Case) -> None:
    row = case.algorithm
    known = case.torch_cls or row.formula or row.reference
    assert known or (row.oracle and (Path(__file__).parent / row.oracle).is_file())


@every_case
def test_every_number_of_a_configuration_matters(case: Case) -> None:
    """None is the default, so a law would notice if it were not passed on."""
    defaults = case.algorithm.defaults()
    for name, value in case.kwargs.items():
        assert value != defaults[name] or name == "eps", name


@every_algorithm
def test_the_slots_are_those_of_the_rows(algorithm: Algorithm) -> None:
    params = {"w": nonzero(4, 3), "b": nonzero(3), "s": nonzero()}
    for case in algorithm.cases():
        tx = case.tx()
        assert set(tx.slot_names()) == set(algorithm.slots)
        for name, column in tx.init(params).slots.items():
            for key, p in params.items():
                shape = algorithm.shapes.get(name, tuple)
                if column[key] is not None:
                    assert tuple(column[key].shape) == tuple(shape(p.shape)), name


@needs_library
@every_case
def test_kernels_compute_what_the_rows_say(case: Case) -> None:
    params = {"w": nonzero(4, 3), "b": nonzero(3)}
    reasons = why(case.tx(), params, params=params)
    assert (not reasons) == case.algorithm.fused, reasons


@every_case
def test_a_rule_of_single_entries_is_one(case: Case) -> None:
    """An entry has the same update in a matrix, and by itself; of other rules it has not."""
    p, g = nonzero(4, 3), nonzero(4, 3)
    grads = [g * (1 + 0.3 * nonzero(4, 3)) for _ in range(6)]  # alike: so estimates grow

    def way(index: tuple[slice, ...]) -> torch.Tensor:
        tx, params = case.tx(), {"w": p[index]}
        state = tx.init(params)
        for g in grads:
            params, state = tx.apply_gradients({"w": g[index]}, state, params, inplace=False)
        return params["w"] - p[index]

    whole, alone = way(()), way((slice(1), slice(1)))
    if case.algorithm.size == "entry":
        assert_close(alone, whole[:1, :1])
    else:
        assert (alone - whole[:1, :1]).abs().max() > 1e-6


@every_case
def test_linear_rules_are_linear(case: Case) -> None:
    params = {"w": nonzero(4, 3)}
    updates = []
    for factor in (1.0, 2.0):
        tx = case.tx(dict.fromkeys(case.decay, 0.0))
        torch.manual_seed(0)
        state = tx.init(params)
        for _ in range(case.algorithm.settled):
            grads = {"w": factor * nonzero_like(params)["w"]}
            update, state = tx.update(grads, state, params, inplace=False)
        updates.append(update["w"])
    equal = (updates[1] - 2 * updates[0]).abs().max() < 1e-12
    assert bool(equal) == case.algorithm.linear
