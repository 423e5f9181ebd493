"""Bad input to the functional and the object-oriented face: a clear error, and nothing is lost."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch
from algorithms import Algorithm
from cases import Case, every_case, every_pair, every_torch_case
from conftest import nonzero, nonzero_like
from refusing import both_ways, params_of, ready, refused, snapshot, trained, with_last
from tolerances import assert_close
from torch import nn

import torchopt


def test_the_snapshot_sees_every_change() -> None:
    p = nn.Parameter(nonzero(2))
    optimizer = torchopt.Adam([p])
    p.grad = nonzero(2)
    optimizer.step()
    state = torchopt.adam().init([p])

    def grow() -> None:
        p.data.mul_(1 + 1e-15)

    def rewrite() -> None:
        state.slots["exp_avg"][0] = state.slots["exp_avg"][0].clone()

    changes = [
        grow,
        rewrite,
        lambda: p.grad.zero_(),
        lambda: optimizer.state[p]["exp_avg"].mul_(1.0),
        lambda: optimizer.state[p].update(step=7),
        lambda: optimizer.param_groups[0].update(lr=0.5),
        lambda: optimizer.state.clear(),
    ]
    for change in changes:
        before = snapshot((optimizer, state))
        assert snapshot((optimizer, state)) == before
        change()
        assert snapshot((optimizer, state)) != before


# Transformations ----------------------------------------------------------------------------------


def _torch_optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)


NOT_TRANSFORMATIONS = {
    "class": lambda: torchopt.GradientTransformation,
    "optimizer-class": lambda: torchopt.Adam,
    "recipe": lambda: torchopt.adam,
    "torch-optim": _torch_optimizer,
    "torch-optim-class": lambda: torch.optim.Adam,
    "number": lambda: 0.1,
    "none": lambda: None,
    "string": lambda: "adam",
    "list": lambda: [torchopt.adam()],
}


@pytest.mark.parametrize("make", NOT_TRANSFORMATIONS.values(), ids=NOT_TRANSFORMATIONS.keys())
def test_what_is_no_transformation(make: Any) -> None:
    value, params = make(), [nn.Parameter(nonzero(2))]
    message = "expects a gradient transformation such as torchopt.adam"
    for call in (
        lambda: torchopt.Optimizer(params, value),
        lambda: torchopt.FuncOptimizer(value),
        lambda: torchopt.chain(value),
        lambda: torchopt.chain(torchopt.scale(1.0), value),
        lambda: torchopt.masked(value, True),
    ):
        with refused(TypeError, message, params):
            call()


# update -------------------------------------------------------------------------------------------


@both_ways
@every_case
def test_trees_that_do_not_match(case: Case, inplace: bool) -> None:
    tx, params, grads, state = ready(case)
    short, extra = {"w": grads["w"]}, {**grads, "c": nonzero(1)}
    nested = {"w": grads["w"], "b": [grads["b"]]}
    for wrong, message in (
        (short, "'b' was not expected"),
        (extra, "'c' is missing"),
        (nested, r"'b\.0' is missing"),
    ):
        with refused(ValueError, f"params do not match grads: {message}", params, wrong, state):
            tx.update(wrong, state, params, inplace=inplace)
        if state.slots:
            with refused(ValueError, f"does not match grads: {message}", wrong, state):
                tx.update(wrong, state, inplace=inplace)


@every_pair
def test_a_state_of_another_optimizer(algorithm: Algorithm, other: Algorithm) -> None:
    params, found = params_of(), set()
    for own, strange in itertools.product(algorithm.cases(), other.cases()):
        tx, state, grads = own.tx(), strange.tx().init(params), nonzero_like(params)
        given, plan = {*state.slots, *state.counters}, tx.plan
        excess = sorted(given - {*plan.slot_names, *plan.counters})
        needed = [name for name, slot in plan.slot_of.items() if not slot.may_be_absent]
        lack = sorted({*needed, *plan.counters} - given)
        if excess or lack:
            text = f"has .*{excess[0]}" if excess else f"lacks .*{lack[0]}"
            found.add(text)
            with refused(ValueError, f"belongs to another optimizer: it {text}", tx, params, state):
                tx.update(grads, state, params)
    if not found:
        pytest.skip("their states have the same slots")


@pytest.mark.parametrize("state", [None, {}, (), "state", {"step": 0}], ids=repr)
def test_what_is_no_state(state: Any) -> None:
    params = params_of()
    with refused(TypeError, "expects the state that init returned, got", params):
        torchopt.sgd().update(nonzero_like(params), state, params)


BAD_GRADIENTS = {
    "shape": (lambda: nonzero(3, 2), ValueError, r"'w' does not fit.*\(3, 2\).*\(2, 3\)"),
    "broadcastable": (lambda: nonzero(1, 3), ValueError, r"'w' does not fit.*\(1, 3\).*\(2, 3\)"),
    "scalar": (lambda: nonzero(), ValueError, r"'w' does not fit.*\(\).*\(2, 3\)"),
    "dtype": (
        lambda: nonzero(2, 3, dtype=torch.float32),
        TypeError,
        "'w' does not fit.*float32.*float64",
    ),
    "device": (
        lambda: torch.ones(2, 3, dtype=torch.float64, device="meta"),
        ValueError,
        "'w' does not fit.*on meta.*on cpu",
    ),
    "complex": (lambda: nonzero(2, 3, dtype=torch.complex128), TypeError, "'w' does not fit"),
    "integer": (
        lambda: torch.ones(2, 3, dtype=torch.int64),
        TypeError,
        "'w' must be floating-point or complex, got torch.int64",
    ),
    "bool": (lambda: torch.ones(2, 3, dtype=torch.bool), TypeError, "must be floating-point"),
    "number": (lambda: 0.5, TypeError, "'w' must be a tensor or None, got float"),
    "string": (lambda: "g", TypeError, "'w' must be a tensor or None, got str"),
}


every_bad_gradient = pytest.mark.parametrize(
    ("make", "error", "message"), BAD_GRADIENTS.values(), ids=BAD_GRADIENTS.keys()
)


@pytest.mark.sampled(3)
@both_ways
@every_bad_gradient
@every_case
def test_gradients_that_do_not_fit(
    case: Case, make: Any, error: type, message: str, inplace: bool
) -> None:
    tx, params, grads, state = ready(case)
    grads = with_last(grads, make())
    with refused(error, message, tx, params, grads, state):
        tx.update(grads, state, params, inplace=inplace)


@every_bad_gradient
def test_gradients_that_do_not_fit_the_state(make: Any, error: type, message: str) -> None:
    """The state knows shapes, dtypes and devices if ``params`` are not given."""
    params = params_of()
    tx, grads = torchopt.adam(), with_last(nonzero_like(params), make())
    state = tx.init(params)
    with refused(error, message, tx, grads, state):
        tx.update(grads, state)


def test_a_gradient_without_its_parameter() -> None:
    for tx in (torchopt.sgd(0.1), torchopt.sgd(0.1, momentum=0.9), torchopt.adam(0.1)):
        params = {"w": nonzero(2), "b": None}
        state, grads = tx.init(params), {"w": nonzero(2), "b": nonzero(2)}
        with refused(ValueError, "'b' has a gradient but", tx, params, grads, state):
            tx.update(grads, state, params)


@every_case
def test_update_without_params(case: Case) -> None:
    params = params_of()
    tx, grads = case.tx(), nonzero_like(params)
    state = tx.init(params)
    if case.needs_params:
        with refused(ValueError, "needs the parameters: call update", tx, grads, state):
            tx.update(grads, state)
    else:
        expected, _ = tx.update(grads, state, params, inplace=False)
        assert_close(tx.update(grads, state, inplace=False)[0], expected)


def test_a_learned_weight_decay_without_params() -> None:
    params = params_of()
    tx, grads = torchopt.sgd(weight_decay=torch.tensor(0.0)), nonzero_like(params)
    state = tx.init(params)
    with refused(ValueError, "needs the parameters: call update", tx, grads, state):
        tx.update(grads, state)


@pytest.mark.parametrize("leaf", [1.0, "w", 3, object()], ids=["float", "str", "int", "object"])
def test_init_expects_tensors(leaf: Any) -> None:
    with pytest.raises(TypeError, match=r"init expects parameter 'w' to be a tensor or None, got"):
        torchopt.adam().init({"w": leaf})


# apply_updates ------------------------------------------------------------------------------------


SHAPES = "update of 'w' has shape {}, the parameter {}"
BAD_UPDATES = {
    "shape": (lambda: nonzero(3, 2), ValueError, SHAPES.format("(3, 2)", "(2, 3)")),
    "broadcastable": (lambda: nonzero(3), ValueError, SHAPES.format("(3,)", "(2, 3)")),
    "one-entry": (lambda: nonzero(1), ValueError, SHAPES.format("(1,)", "(2, 3)")),
    "device": (lambda: torch.ones(2, 3, dtype=torch.float64, device="meta"), ValueError, "'w'"),
    "complex": (lambda: nonzero(2, 3, dtype=torch.complex128), TypeError, "'w'"),
    "number": (lambda: 0.5, TypeError, "'w'"),
    "string": (lambda: "u", TypeError, "'w'"),
}


@both_ways
@pytest.mark.parametrize(("make", "error", "message"), BAD_UPDATES.values(), ids=BAD_UPDATES.keys())
def test_updates_that_do_not_fit(make: Any, error: type, message: str, inplace: bool) -> None:
    """The bad one comes last: the good ones before it must not have been added."""
    params = params_of()
    updates = with_last(nonzero_like(params), make())
    with refused(error, re.escape(message), params, updates):
        torchopt.apply_updates(params, updates, inplace=inplace)


@both_ways
def test_integer_parameters_are_not_truncated(inplace: bool) -> None:
    params = [torch.ones(2), torch.ones(2, dtype=torch.int64)]
    updates = [torch.full((2,), 0.5), torch.full((2,), 0.5)]
    with refused(TypeError, "'1'", params, updates):
        torchopt.apply_updates(params, updates, inplace=inplace)


def test_expanded_parameters_are_updated_out_of_place() -> None:
    params = [torch.ones(2), torch.ones(1).expand(2)]
    result = torchopt.apply_updates(params, [torch.ones(2), torch.ones(2)], inplace=False)
    assert [x.tolist() for x in result] == [[2.0, 2.0], [2.0, 2.0]]
    assert params[1].tolist() == [1.0, 1.0]


# The objects --------------------------------------------------------------------------------------


@every_torch_case
def test_step_refuses_gradients_of_what_a_parameter_was_before(case: Case) -> None:
    """PyTorch checks ``p.grad`` when it is set; ``p.data`` may be exchanged afterwards."""
    for new, error, message in (
        (nonzero(3, 2), ValueError, r"\['params'\]\[1\].*does not fit.*\(2, 3\).*\(3, 2\)"),
        (nonzero(2, 3, dtype=torch.float32), TypeError, "does not fit.*float64.*float32"),
    ):
        optimizer, params = trained(case)
        params[1].data = new
        with refused(error, message, optimizer):
            optimizer.step()


@every_torch_case
def test_a_closure_that_raises_changes_nothing(case: Case) -> None:
    optimizer, _ = trained(case)

    def closure() -> None:
        raise KeyError("data")

    with refused(KeyError, "data", optimizer):
        optimizer.step(closure)


def test_func_optimizer_refuses_and_keeps() -> None:
    params = {"w": nonzero(2, requires_grad=True), "b": nonzero(2, requires_grad=True)}
    optimizer = torchopt.FuncOptimizer(torchopt.adam(0.1))
    optimizer.init(params)
    product = params["w"] * params["b"]
    for loss, given, options, message in (
        (product.sum(), {"w": params["w"]}, {}, "do not match|does not match"),
        (product, params, {}, "scalar"),
        (3.0, params, {}, "[Tt]ensor"),
        (torch.tensor(1.0), params, {}, "graph|grad"),
    ):
        with refused((ValueError, RuntimeError, TypeError), message, params, optimizer):
            optimizer.step(loss, given, **options)
    new = optimizer.step(product.sum(), params)
    expected = params["w"].detach() - 0.1 * params["b"].detach().sign()
    assert_close(new["w"].detach(), expected, times=1e6)
    loss = (new["w"] * new["b"]).sum()  # these carry a graph
    with refused(RuntimeError, "inplace=False", new, optimizer):
        optimizer.step(loss, new, inplace=True)
