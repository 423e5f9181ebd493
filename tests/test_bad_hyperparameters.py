"""What is no hyperparameter: an error that says what is wrong, and nothing has changed."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from algorithms import Algorithm
from cases import ALGORITHMS, SPECIAL_ALGORITHMS, every_algorithm, every_row
from conftest import nonzero, nonzero_like
from refusing import params_of, refused
from torch import nn

import torchopt


# Numbers ------------------------------------------------------------------------------------------


def edges(bounds: str) -> tuple[list[Any], list[float]]:
    """Return numbers that bounds such as ``>= 0 and < 1`` exclude, and the outermost they allow."""
    outside: list[Any] = [math.nan]
    inside = []
    for sign, number in re.findall(r"([<>]=?) (\S+)", bounds):
        bound, away = float(number), math.inf if sign[0] == "<" else -math.inf
        beyond = bound + math.copysign(0.1, away)
        outside += [beyond, round(beyond + math.copysign(0.5, away))]  # an int, too
        if sign[1:]:
            inside.append(bound)
            outside.append(math.nextafter(bound, away))
        else:
            inside.append(math.nextafter(bound, -away))
            outside.append(bound)
    return outside, inside or [-5.0, 0.0, 5.0]


def with_number(algorithm: Algorithm, name: str, place: int | None, value: Any) -> dict[str, Any]:
    """Return the argument that gives one number of an algorithm."""
    if place is None:
        return {name: value}
    values = list(algorithm.defaults()[name])
    values[place] = value
    return {name: tuple(values)}


def is_whole(algorithm: Algorithm, name: str) -> bool:
    """Whether a number is a whole one."""
    return name not in algorithm.fixed and algorithm.specs()[name].integer


@every_row
def test_the_bounds_of_every_number(algorithm: Algorithm) -> None:
    for name, place, bounds in algorithm.numbers():
        outside, inside = edges(bounds)
        label, whole = name if place is None else f"{name}[{place}]", is_whole(algorithm, name)
        for value in outside:
            error, what = ValueError, bounds
            if whole and not isinstance(value, int):
                error, what = TypeError, "a whole number"
            message = re.escape(f"{label} must be {what}, got {value!r}.")
            with pytest.raises(error, match=f"^{message}"):
                algorithm.recipe(**with_number(algorithm, name, place, value))
        for value in inside:
            given = with_number(algorithm, name, place, int(value) if whole else value)
            tx = algorithm.recipe(**given)
            assert name in algorithm.fixed or tx.hyperparameters()[name] == given[name]


@every_row
def test_numbers_out_of_bounds_in_the_object_oriented_face(algorithm: Algorithm) -> None:
    params = [nn.Parameter(nonzero(2, 2))]
    optimizer = algorithm.cls(params)
    for name, place, bounds in algorithm.numbers():
        kind = int if is_whole(algorithm, name) else float
        outside = [value for value in edges(bounds)[0] if isinstance(value, kind)]
        wrong = with_number(algorithm, name, place, outside[-1])
        message = rf"{name}(\[\d\])? must be {bounds}"
        with refused(ValueError, message, params):
            algorithm.cls(params, **wrong)
        if name not in algorithm.fixed:
            with refused(ValueError, message, params, optimizer):
                optimizer.add_param_group({"params": [nn.Parameter(nonzero(2, 2))], **wrong})


OUT_OF_BOUNDS = {
    "clip-negative": (torchopt.clip_grad_norm, {"max_norm": -1.0}, "max_norm must be >= 0"),
    "value-negative": (torchopt.clip_grad_value, {"clip_value": -1.0}, "clip_value must be >= 0"),
    "one-of-a-tree": (torchopt.sgd, {"lr": {"w": 0.1, "b": -0.1}}, r"lr\['b'\] must be >= 0"),
    "one-of-a-list": (torchopt.sgd, {"lr": [0.1, -0.1]}, r"lr\['1'\] must be >= 0"),
}


@pytest.mark.parametrize(
    ("recipe", "kwargs", "message"), OUT_OF_BOUNDS.values(), ids=OUT_OF_BOUNDS.keys()
)
def test_numbers_out_of_bounds(recipe: Any, kwargs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(**kwargs)


# Types --------------------------------------------------------------------------------------------


WRONG_TYPES = {
    "string": "0.1",
    "bool": True,
    "none": None,
    "complex": 1j,
    "bytes": b"1",
    "set": {0.1},
    "complex-tensor": torch.tensor(1j),
    "bool-tensor": torch.tensor(True),
    "string-in-a-tree": {"w": "0.1"},
    "none-in-a-list": [None, 0.1],
}


@every_row
@pytest.mark.parametrize("value", WRONG_TYPES.values(), ids=WRONG_TYPES.keys())
def test_hyperparameters_of_the_wrong_type(algorithm: Algorithm, value: Any) -> None:
    for name, place, _ in algorithm.numbers():
        if name in algorithm.fixed:
            continue
        default = algorithm.defaults()[name]
        if place is not None and default[place] is None and value in (None, [None, 0.1]):
            continue
        what = "whole number" if is_whole(algorithm, name) else "(number|real tensor)"
        message = rf"^{name}(\[.*\])? must be a (number|{what})"
        with pytest.raises(TypeError, match=message):
            algorithm.recipe(**with_number(algorithm, name, place, value))


@every_row
@pytest.mark.parametrize("value", [2.0, torch.tensor(2), int, [2, 2]], ids=str)
def test_whole_numbers_are_one_for_all(algorithm: Algorithm, value: Any) -> None:
    for name, spec in algorithm.specs().items():
        if spec.integer:
            with pytest.raises(TypeError, match=f"^{name} must be a whole number, got"):
                algorithm.recipe(**{name: value})


@every_row
@pytest.mark.parametrize("value", ["no such choice", 0.5, True, ()], ids=str)
def test_choices_are_named(algorithm: Algorithm, value: Any) -> None:
    for name, spec in algorithm.specs().items():
        if spec.choices:
            message = " or ".join(re.escape(repr(choice)) for choice in spec.choices)
            with pytest.raises(ValueError, match=f"^{name} must be {message}, got"):
                algorithm.recipe(**{name: value})


@every_algorithm
def test_numbers_of_a_parameter_as_a_whole_have_no_value_per_entry(algorithm: Algorithm) -> None:
    params = params_of()
    for name, spec in algorithm.specs().items():
        if not spec.scalar:
            continue
        default = algorithm.defaults()[name]
        number = default[-1] if spec.length else default
        number = 0.5 if number is None else number
        for shape in ((2, 3), (3,), (2, 1)):
            value = {"w": torch.full(shape, number), "b": number}
            given = (*default[:-1], value) if spec.length else value
            tx = algorithm.recipe(**{name: given})
            message = rf"^{name}(\[\d\])? is of a parameter as a whole.*'w'"
            with refused(ValueError, message, tx, params):
                tx.init(params)


#: Each argument that is a pair, of each algorithm.
PAIRS = [
    (algorithm, name)
    for algorithm in ALGORITHMS + SPECIAL_ALGORITHMS
    for name, default in algorithm.defaults().items()
    if isinstance(default, tuple)
]


@pytest.mark.parametrize(("algorithm", "name"), PAIRS, ids=lambda x: getattr(x, "name", x))
@pytest.mark.parametrize("value", [0.9, -1, 1, "ab", None, {}], ids=repr)
def test_pairs_must_be_pairs(algorithm: Algorithm, name: str, value: Any) -> None:
    """So many values as the default has, not one more or less."""
    length = len(algorithm.defaults()[name])
    what = "a pair of" if length == 2 else f"a tuple of {length}"
    if isinstance(value, int):
        value = (0.9,) * (length + value)
    with pytest.raises(TypeError, match=f"{name} must be {what} values, got"):
        algorithm.recipe(**{name: value})


@every_row
@pytest.mark.parametrize("value", [1, "yes", None, torch.tensor(True)], ids=str)
def test_flags_must_be_bools(algorithm: Algorithm, value: Any) -> None:
    for name in algorithm.flags():
        with pytest.raises(TypeError, match=f"{name} must be True or False"):
            algorithm.recipe(**{name: value})


PLAIN = {
    "norm_type": lambda: torchopt.clip_grad_norm(1.0, norm_type="2"),
    "nan": lambda: torchopt.nan_to_num("0"),
    "posinf": lambda: torchopt.nan_to_num(0.0, posinf="1"),
    "initial_scale": lambda: torchopt.scale_by_rms(initial_scale="0"),
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_fields_of_the_wrong_type_are_named(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must be a number"):
        PLAIN[name]()


# Trees --------------------------------------------------------------------------------------------


TREES = {
    "missing": ({"w": 0.1}, "lr has no entry for parameter 'b'; it has"),
    "misspelt": ({"w": 0.1, "B": 0.1}, "lr has no entry for parameter 'b'"),
    "too-many": ({"w": 0.1, "b": 0.1, "c": 0.1}, "lr has an entry 'c' that names no parameter"),
    "empty": ({}, "lr has no entry for parameter"),
    "short-list": ([0.1], "lr has no entry for parameter"),
    "long-list": ([0.1, 0.1, 0.1], "lr has no entry for parameter"),
    "shape": (
        {"w": torch.ones(2), "b": 0.1},
        r"lr has shape \(2,\), which does not broadcast to parameter 'w' of shape \(2, 3\)",
    ),
    "shape-for-all": (torch.ones(2, 3), "does not broadcast to parameter 'b'"),
    "too-large": ({"w": 0.1, "b": torch.ones(2, 3)}, "does not broadcast to parameter 'b'"),
}


every_wrong_tree = pytest.mark.parametrize(("lr", "message"), TREES.values(), ids=TREES.keys())


@every_wrong_tree
@every_algorithm
def test_hyperparameter_trees_that_do_not_fit(algorithm: Algorithm, lr: Any, message: str) -> None:
    params, tx = params_of(), algorithm.recipe(lr=lr)
    with refused(ValueError, message, tx, params):
        tx.init(params)
    grads = nonzero_like(params)
    state = algorithm.recipe(lr=0.1).init(params)
    with refused(ValueError, message, tx, params, grads, state):
        tx.update(grads, state, params)


@every_wrong_tree
def test_hyperparameter_trees_that_do_not_fit_named_parameters(lr: Any, message: str) -> None:
    named = [(name, nn.Parameter(p)) for name, p in params_of().items()]
    optimizer = torchopt.SGD(named, lr=lr, momentum=0.9)
    for _, p in named:
        p.grad = nonzero(*p.shape)
    with refused(ValueError, message, optimizer):
        optimizer.step()


def test_a_group_that_is_spoilt_later_changes_nothing() -> None:
    params = [nn.Parameter(nonzero(2)), nn.Parameter(nonzero(3))]
    optimizer = torchopt.Adam([{"params": [p]} for p in params])
    for _ in range(2):
        for p in params:
            p.grad = nonzero(*p.shape)
        optimizer.step()
    optimizer.param_groups[1]["lr"] = torch.ones(5)
    with refused(ValueError, "lr has shape .* does not broadcast", optimizer):
        optimizer.step()
