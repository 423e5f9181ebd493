"""Bad input to the functional and the object-oriented face: a clear error, and nothing is lost."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import CASES, every_case, every_torch_case
from conftest import nonzero, nonzero_like
from tolerances import assert_close
from torch import Tensor, nn

import torchopt


def snapshot(value: Any) -> Any:
    """Return a comparable record of everything reachable: identities, versions, bits, numbers."""
    if isinstance(value, Tensor):
        if value.is_meta:
            bits: Any = None
        else:
            dense = value.detach().to_dense() if value.layout != torch.strided else value.detach()
            bits = dense.contiguous().clone().reshape(-1).view(torch.uint8).tolist()
        record = (id(value), value._version, value.dtype, tuple(value.shape), bits)
        return (*record, snapshot(value.grad) if value.is_leaf else None)
    if isinstance(value, dict):
        return [
            (id(key) if isinstance(key, Tensor) else key, snapshot(entry))
            for key, entry in value.items()
        ]
    if isinstance(value, (list, tuple)):
        return [type(value).__name__, *map(snapshot, value)]
    if isinstance(value, torchopt.OptState):
        return [id(value), snapshot(value.step), snapshot(value.slots)]
    if isinstance(value, torch.optim.Optimizer):
        return [id(value), snapshot(value.param_groups), snapshot(dict(value.state))]
    if isinstance(value, torchopt.FuncOptimizer):
        return [id(value), snapshot(value.state), value.inplace]
    if isinstance(value, torchopt.GradientTransformation):
        return [id(value), *(snapshot(getattr(value, f.name)) for f in dataclasses.fields(value))]
    return repr(value)


@contextlib.contextmanager
def refused(error: Any, message: str, *objects: Any) -> Iterator[None]:
    """Expect an error, and that ``objects`` are bit-identical afterwards."""
    before = snapshot(objects)
    with pytest.raises(error, match=message):
        yield
    assert snapshot(objects) == before


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


# Hyperparameters ----------------------------------------------------------------------------------

RECIPES = (torchopt.sgd, torchopt.adam, torchopt.adamw, torchopt.rmsprop)
every_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.__name__)
NAN = math.nan
OUT_OF_BOUNDS = {
    "lr-negative": (torchopt.sgd, {"lr": -1.0}, "lr must be >= 0, got -1.0"),
    "lr-negative-int": (torchopt.adam, {"lr": -1}, "lr must be >= 0, got -1"),
    "lr-nan": (torchopt.adamw, {"lr": NAN}, "lr must be >= 0, got nan"),
    "momentum-negative": (torchopt.sgd, {"momentum": -0.1}, "momentum must be >= 0, got -0.1"),
    "dampening-nan": (torchopt.sgd, {"dampening": NAN}, "dampening must be any number, got nan"),
    "decay-negative": (torchopt.sgd, {"weight_decay": -1e-9}, "weight_decay must be >= 0"),
    "decay-nan": (torchopt.adamw, {"weight_decay": NAN}, "weight_decay must be >= 0"),
    "beta1-negative": (torchopt.adam, {"betas": (-0.1, 0.9)}, r"betas\[0\] must be >= 0"),
    "beta1-one": (torchopt.adam, {"betas": (1.0, 0.9)}, r"betas\[0\] must be >= 0.* and < 1"),
    "beta2-one": (torchopt.adamw, {"betas": (0.9, 1)}, r"betas\[1\] must be >= 0.* and < 1"),
    "beta2-nan": (torchopt.adam, {"betas": (0.9, NAN)}, r"betas\[1\].*got nan"),
    "eps-negative": (torchopt.adam, {"eps": -1e-8}, "eps must be >= 0"),
    "eps_root-negative": (torchopt.adam, {"eps_root": -1e-8}, "eps_root must be >= 0"),
    "alpha-one": (torchopt.rmsprop, {"alpha": 1.0}, "alpha must be >= 0.* and < 1"),
    "rms-initial": (torchopt.rmsprop, {"initial_scale": -1.0}, "initial_scale must be >= 0"),
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


@every_torch_case
def test_numbers_out_of_bounds_in_the_object_oriented_face(case: Any) -> None:
    params = [nn.Parameter(nonzero(2))]
    optimizer = case.cls(params, **case.kwargs)
    with refused(ValueError, "lr must be >= 0", params):
        case.cls(params, lr=-1.0)
    with refused(ValueError, "weight_decay must be >= 0", params, optimizer):
        optimizer.add_param_group({"params": [nn.Parameter(nonzero(2))], "weight_decay": -1.0})


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
    "none-in-a-list": [0.1, None],
}


@every_recipe
@pytest.mark.parametrize("value", WRONG_TYPES.values(), ids=WRONG_TYPES.keys())
def test_hyperparameters_of_the_wrong_type(recipe: Any, value: Any) -> None:
    for name in ("lr", "weight_decay"):
        with pytest.raises(TypeError, match=rf"^{name}(\[.*\])? must be a (number|real tensor)"):
            recipe(**{name: value})


@pytest.mark.parametrize("value", [0.9, (0.9,), (0.9, 0.9, 0.9), "ab", None, {}], ids=repr)
def test_betas_must_be_a_pair(value: Any) -> None:
    with pytest.raises(TypeError, match="betas must be a pair of values, got"):
        torchopt.adam(betas=value)


@pytest.mark.parametrize("value", [1, "yes", None, torch.tensor(True)], ids=str)
def test_flags_must_be_bools(value: Any) -> None:
    for recipe, name in (
        (torchopt.adam, "amsgrad"),
        (torchopt.rmsprop, "centered"),
        (torchopt.sgd, "maximize"),
        (torchopt.sgd, "nesterov"),
    ):
        with pytest.raises(TypeError, match=f"{name} must be True or False"):
            recipe(**{name: value})


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


def params_of(**options: Any) -> dict[str, Tensor]:
    return {"w": nonzero(2, 3, **options), "b": nonzero(3, **options)}


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
@every_recipe
def test_hyperparameter_trees_that_do_not_fit(recipe: Any, lr: Any, message: str) -> None:
    params, tx = params_of(), recipe(lr=lr)
    with refused(ValueError, message, tx, params):
        tx.init(params)
    grads = nonzero_like(params)
    state = recipe(lr=0.1).init(params)
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


def ready(case: Any) -> tuple[Any, Any, Any, Any]:
    """Return a transformation, parameters, gradients and a state after one update."""
    tx, params = case.tx(), params_of()
    _, state = tx.update(nonzero_like(params), tx.init(params), params, inplace=False)
    return tx, params, nonzero_like(params), state


both_ways = pytest.mark.parametrize("inplace", [True, False], ids=["inplace", "pure"])


@both_ways
@every_case
def test_trees_that_do_not_match(case: Any, inplace: bool) -> None:
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
            with refused(ValueError, f"do not match grads: {message}", wrong, state):
                tx.update(wrong, state, inplace=inplace)


STRANGERS = {
    "sgd-for-adam": (torchopt.adam, lambda: torchopt.sgd(momentum=0.9), "has .*momentum_buffer"),
    "plain-sgd-for-adam": (torchopt.adam, torchopt.sgd, "lacks .*exp_avg"),
    "adam-for-sgd": (torchopt.sgd, torchopt.adam, "has .*exp_avg.*exp_avg_sq"),
    "rmsprop-for-adam": (torchopt.adamw, torchopt.rmsprop, "has .*square_avg"),
    "adam-for-rmsprop": (torchopt.rmsprop, torchopt.adam, "has .*exp_avg"),
}


@pytest.mark.parametrize(
    ("recipe", "stranger", "message"), STRANGERS.values(), ids=STRANGERS.keys()
)
def test_a_state_of_another_optimizer(recipe: Any, stranger: Any, message: str) -> None:
    params = params_of()
    tx, state, grads = recipe(), stranger().init(params), nonzero_like(params)
    text = f"The state belongs to another optimizer: it {message}"
    with refused(ValueError, text, tx, params, grads, state):
        tx.update(grads, state, params)


@pytest.mark.parametrize("state", [None, {}, (), "state", {"step": 0}], ids=repr)
def test_what_is_no_state(state: Any) -> None:
    params = params_of()
    with refused(TypeError, "expects the state that init returned, got", params):
        torchopt.sgd().update(nonzero_like(params), state, params)


def _last(grads: Any, value: Any) -> Any:
    """Return the gradients with a bad one at the end, after good ones."""
    return {"w": value, "b": grads["b"]}  # dicts are walked in sorted order


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


@both_ways
@every_bad_gradient
@every_case
def test_gradients_that_do_not_fit(
    case: Any, make: Any, error: type, message: str, inplace: bool
) -> None:
    tx, params, grads, state = ready(case)
    grads = _last(grads, make())
    with refused(error, message, tx, params, grads, state):
        tx.update(grads, state, params, inplace=inplace)


@every_bad_gradient
def test_gradients_that_do_not_fit_the_state(make: Any, error: type, message: str) -> None:
    """The state knows shapes, dtypes and devices if ``params`` are not given."""
    params = params_of()
    tx, grads = torchopt.adam(), _last(nonzero_like(params), make())
    state = tx.init(params)
    with refused(error, message, tx, grads, state):
        tx.update(grads, state)


def test_a_gradient_without_its_parameter() -> None:
    for tx in (torchopt.sgd(0.1), torchopt.sgd(0.1, momentum=0.9), torchopt.adam(0.1)):
        params = {"w": nonzero(2), "b": None}
        state, grads = tx.init(params), {"w": nonzero(2), "b": nonzero(2)}
        with refused(ValueError, "'b' has a gradient but", tx, params, grads, state):
            tx.update(grads, state, params)


def test_weight_decay_without_params() -> None:
    for tx in (torchopt.adamw(weight_decay=0.1), torchopt.sgd(weight_decay=torch.tensor(0.1))):
        params = params_of()
        grads, state = nonzero_like(params), tx.init(params)
        with refused(ValueError, "needs the parameters: call update", tx, grads, state):
            tx.update(grads, state)


@pytest.mark.parametrize("leaf", [1.0, "w", 3, object()], ids=["float", "str", "int", "object"])
def test_init_expects_tensors(leaf: Any) -> None:
    with pytest.raises(TypeError, match=r"Parameter 'w' must be a tensor or None, got"):
        torchopt.adam().init({"w": leaf})


# apply_updates ------------------------------------------------------------------------------------

BAD_UPDATES = {
    "shape": (lambda: nonzero(3, 2), ValueError),
    "broadcastable": (lambda: nonzero(3), ValueError),
    "device": (lambda: torch.ones(2, 3, dtype=torch.float64, device="meta"), ValueError),
    "complex": (lambda: nonzero(2, 3, dtype=torch.complex128), TypeError),
    "number": (lambda: 0.5, TypeError),
    "string": (lambda: "u", TypeError),
}


@both_ways
@pytest.mark.parametrize(("make", "error"), BAD_UPDATES.values(), ids=BAD_UPDATES.keys())
def test_updates_that_do_not_fit(make: Any, error: type, inplace: bool) -> None:
    """The bad one comes last: the good ones before it must not have been added."""
    params = params_of()
    updates = _last(nonzero_like(params), make())
    with refused(error, "'w'", params, updates):
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


# The object-oriented face -------------------------------------------------------------------------


SPARSE = ("sgd", "sgd-nesterov")  # without weight decay
dense_only = pytest.mark.parametrize(
    "case", [case for case in CASES if case.name not in SPARSE], ids=lambda case: case.name
)


def trained(case: Any) -> tuple[Any, list[Any]]:
    params = [nn.Parameter(nonzero(3)), nn.Parameter(nonzero(2, 3))]
    optimizer = case.cls(params, **case.kwargs)
    for _ in range(2):
        for p in params:
            p.grad = nonzero(*p.shape)
        optimizer.step()
    return optimizer, params


@dense_only
def test_step_refuses_sparse_gradients_by_name(case: Any) -> None:
    """Only SGD without weight decay has a sparse rule; others name the parameter and the cure."""
    optimizer, params = trained(case)
    params[1].grad = nonzero(2, 3).to_sparse()
    with refused(TypeError, r"\['params'\]\[1\].*is sparse.*to_dense", optimizer):
        optimizer.step()


@dense_only
def test_update_refuses_sparse_gradients_by_name(case: Any) -> None:
    tx, params, grads, state = ready(case)
    grads = _last(grads, nonzero(2, 3).to_sparse())
    with refused(TypeError, "'w' is sparse.*to_dense", tx, params, grads, state):
        tx.update(grads, state, params)


@pytest.mark.parametrize("maximize", [False, True], ids=["minimize", "maximize"])
def test_plain_sgd_takes_sparse_gradients_as_torch_does(maximize: bool) -> None:
    ours, theirs = (nn.Embedding(6, 2, sparse=True, dtype=torch.float64) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    options = {"lr": 0.1, "maximize": maximize}
    pairs = [
        (ours, torchopt.SGD(ours.parameters(), **options)),
        (theirs, torch.optim.SGD(theirs.parameters(), **options)),
    ]
    before = ours.weight.detach().clone()
    for index in (torch.tensor([1, 1, 4]), torch.tensor([0, 4])):
        for net, optimizer in pairs:
            optimizer.zero_grad()
            (net(index) ** 3).sum().backward()
            assert net.weight.grad.is_sparse
            optimizer.step()
    assert_close(ours.weight.detach(), theirs.weight.detach())
    changed = (ours.weight != before).any(1)
    assert changed.tolist() == [True, True, False, False, True, False]


def test_sparse_gradients_in_the_functional_face() -> None:
    tx, params = torchopt.sgd(0.5), {"w": nonzero(2, 3)}
    dense = torch.zeros(2, 3, dtype=torch.float64)
    dense[1] = nonzero(3)
    for inplace in (False, True):
        updates, _ = tx.update({"w": dense.to_sparse()}, tx.init(params), params, inplace=inplace)
        start = params["w"].clone()
        new = torchopt.apply_updates(params, updates, inplace=inplace)
        assert_close(new["w"], start - 0.5 * dense)


def test_scaling_takes_sparse_gradients() -> None:
    tx = torchopt.chain(torchopt.flip_sign(), torchopt.scale(2.0))
    dense = torch.tensor([0.0, 3.0])
    updates, _ = tx.update([dense.to_sparse()], tx.init([dense]))
    assert updates[0].is_sparse
    assert updates[0].to_dense().tolist() == [0.0, -6.0]


@every_torch_case
def test_step_refuses_gradients_of_what_a_parameter_was_before(case: Any) -> None:
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
def test_a_closure_that_raises_changes_nothing(case: Any) -> None:
    optimizer, _ = trained(case)

    def closure() -> None:
        raise KeyError("data")

    with refused(KeyError, "data", optimizer):
        optimizer.step(closure)


def test_func_optimizer_refuses_and_keeps() -> None:
    params = {"w": nonzero(2, requires_grad=True), "b": nonzero(2, requires_grad=True)}
    optimizer = torchopt.FuncOptimizer(torchopt.adam(0.1))
    optimizer.init(params)
    loss = (params["w"] * params["b"]).sum()
    with refused(ValueError, "do not match|does not match", params, optimizer):
        optimizer.step(loss, {"w": params["w"]})
    loss = (params["w"] * params["b"]).sum()
    with refused((ValueError, RuntimeError), "scalar", params, optimizer):
        optimizer.step(params["w"] * params["b"], params)
    with refused((TypeError, ValueError), "[Tt]ensor", params, optimizer):
        optimizer.step(3.0, params)
    assert_close(
        optimizer.step(loss, params)["w"].detach(),
        params["w"].detach() - 0.1 * params["b"].detach().sign(),
        times=1e6,
    )
