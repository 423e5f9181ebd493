"""Saving, loading, copying: interchange with torch.optim in both directions, and refusals."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from algorithms import Algorithm
from cases import Case, every_case, every_pair, every_torch_case
from conftest import nonzero
from refusing import refused
from tolerances import assert_close
from torch import Tensor, nn

import torchopt


both_ways = pytest.mark.parametrize("maximize", [False, True], ids=["minimize", "maximize"])


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(nonzero(2, 3)), nn.Parameter(nonzero(3)), nn.Parameter(nonzero(1))]


def twins(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in params]


def groups(params: list[Any]) -> list[dict[str, Any]]:
    """Two groups; the last parameter never gets a gradient."""
    return [{"params": params[:1]}, {"params": params[1:], "lr": 0.3}]


def train(steps: int, *runs: tuple[Any, list[Any]]) -> None:
    """Step several optimizers with the same gradients."""
    for _ in range(steps):
        for group in list(zip(*(params for _, params in runs)))[:-1]:
            g = nonzero(*group[0].shape, dtype=group[0].dtype)
            for p in group:
                p.grad = g.clone()
        for optimizer, _ in runs:
            optimizer.step()


def data(params: list[Any]) -> list[Tensor]:
    return [p.detach() for p in params]


def through_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# Interchange with torch.optim ---------------------------------------------------------------------


@pytest.mark.sampled(1)
@every_torch_case
@both_ways
@pytest.mark.parametrize("direction", ["from-torch", "to-torch", "to-torch-and-back"])
def test_training_goes_on_identically_after_an_exchange(
    case: Case, maximize: bool, direction: str
) -> None:
    """The donor goes on, the recipient was made with other hyperparameters: both agree."""
    cls, kwargs = case.cls, {**case.kwargs, "maximize": maximize}
    donor_cls, other_cls = case.torch_cls, cls
    if direction != "from-torch":
        donor_cls, other_cls = other_cls, donor_cls
    p = parameters()
    donor = donor_cls(groups(p), **kwargs)
    train(3, (donor, p))
    q = twins(p)
    other = other_cls(groups(q), lr=0.5)
    other.load_state_dict(through_file(donor.state_dict()))
    if direction == "to-torch-and-back":
        middle, other = other, cls(groups(q), lr=0.7)
        other.load_state_dict(middle.state_dict())
    for mine, theirs in zip(other.param_groups, donor.param_groups):
        assert {k: mine[k] for k in kwargs} == {k: theirs[k] for k in kwargs}
    assert [g["lr"] for g in other.param_groups] == [kwargs["lr"], 0.3]
    start = data(q)[0].clone()
    for _ in range(4):
        train(1, (donor, p), (other, q))
        assert_close(data(q), data(p), times=10)
    assert not torch.equal(start, data(q)[0])


@every_torch_case
@both_ways
def test_the_state_has_the_form_of_torch(case: Case, maximize: bool) -> None:
    """The same keys, shapes, dtypes and values as torch's own, parameter by parameter."""
    kwargs = {**case.kwargs, "maximize": maximize}
    p = parameters()
    q = twins(p)
    ours, theirs = case.cls(groups(p), **kwargs), case.torch_cls(groups(q), **kwargs)
    train(3, (ours, p), (theirs, q))
    mine, expected = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == expected.keys()
    assert [g["params"] for g in mine["param_groups"]] == [[0], [1, 2]]
    for key in (0, 1):
        wanted = {k: v for k, v in expected["state"].get(key, {}).items() if v is not None}
        assert mine["state"].get(key, {}).keys() == wanted.keys()
        for name, value in wanted.items():
            found = mine["state"][key][name]
            assert isinstance(found, Tensor)
            assert (found.dtype, found.shape) == (value.dtype, value.shape)
            assert_close(found, value, times=10)
    assert not mine["state"].get(2)


@every_torch_case
def test_a_state_before_the_first_step(case: Case) -> None:
    cls, kwargs = case.cls, case.kwargs
    p = parameters()
    q = twins(p)
    donor, other = case.torch_cls(groups(p), **kwargs), cls(groups(q), lr=0.5)
    other.load_state_dict(donor.state_dict())
    train(2, (donor, p), (other, q))
    assert_close(data(q), data(p), times=10)
    donor.load_state_dict(cls(groups(twins(p)), **kwargs).state_dict())
    train(1, (donor, p))
    assert all(torch.isfinite(x).all() for x in data(p))


def test_loading_replaces_a_state_that_was_there() -> None:
    p = parameters()
    optimizer = torchopt.Adam(p)
    fresh = optimizer.state_dict()
    train(2, (optimizer, p))
    assert optimizer.state
    optimizer.load_state_dict(fresh)
    assert not any(optimizer.state.get(x) for x in p)


def test_names_of_parameters_travel() -> None:
    net, twin = nn.Linear(2, 1).double(), nn.Linear(2, 1).double()
    donor = torch.optim.Adam(net.named_parameters())
    optimizer = torchopt.Adam(twin.parameters())
    optimizer.load_state_dict(donor.state_dict())
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    assert torchopt.Adam(net.named_parameters()).state_dict()["param_groups"][0]["param_names"] == [
        "weight",
        "bias",
    ]


# Saving, pickling, copying ------------------------------------------------------------------------


def _clone(optimizer: Any, params: list[Any], how: str) -> tuple[Any, list[Any]]:
    if how == "pickle":
        return pickle.loads(pickle.dumps((optimizer, params)))
    if how == "deepcopy":
        return copy.deepcopy((optimizer, params))
    q = twins(params)
    other = torchopt.Optimizer(groups(q), optimizer.transformation)
    state = optimizer.state_dict()
    other.load_state_dict(through_file(state) if how == "file" else copy.deepcopy(state))
    return other, q


@every_case
@pytest.mark.parametrize("how", ["pickle", "deepcopy", "file", "state_dict"])
def test_a_copy_goes_on_identically(case: Case, how: str) -> None:
    p = parameters()
    optimizer = case.cls(groups(p), **case.kwargs)
    train(3, (optimizer, p))
    optimizer.param_groups[0]["lr"] = 0.07
    other, q = _clone(optimizer, p, how)
    assert other is not optimizer
    assert other.transformation == optimizer.transformation
    assert [g["lr"] for g in other.param_groups] == [0.07, 0.3]
    if how in ("pickle", "deepcopy"):
        assert type(other) is case.cls
        assert other.defaults.items() >= optimizer.defaults.items()
        assert all(x is y for x, y in zip(other.param_groups[0]["params"], q))
    train(3, (optimizer, p), (other, q))
    assert all(torch.equal(x, y) for x, y in zip(data(p), data(q)))
    other.zero_grad()
    assert q[0].grad is None
    assert p[0].grad is not None


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_copies_of_a_chain_with_a_schedule(how: str) -> None:
    tx = torchopt.chain(
        torchopt.clip_grad_norm(1.0), torchopt.adam(torchopt.schedules.linear(0.1, 0.0, 8))
    )
    p = parameters()
    optimizer = torchopt.Optimizer(groups(p), tx)
    optimizer.param_groups[1]["lr"] = torchopt.schedules.linear(0.2, 0.0, 8)
    train(3, (optimizer, p))
    other, q = _clone(optimizer, p, how)
    assert other.transformation == tx
    train(3, (optimizer, p), (other, q))
    assert all(torch.equal(x, y) for x, y in zip(data(p), data(q)))


def test_schedules_are_left_out_of_saved_states() -> None:
    """They are code. Also inside pairs and lists; ``weights_only=True`` reads what is left."""
    linear = torchopt.schedules.linear
    p = parameters()
    for kwargs in (
        {"lr": linear(0.1, 0.0, 8)},
        {"betas": (linear(0.5, 0.9, 8), 0.99)},
        {"lr": [linear(0.1, 0.0, 8), 0.1, 0.1]},
    ):
        optimizer = torchopt.Adam(p, **kwargs)
        train(3, (optimizer, p))
        saved = through_file(optimizer.state_dict())
        q = twins(p)
        other = torchopt.Adam(q, **kwargs)
        other.load_state_dict(saved)
        train(3, (optimizer, p), (other, q))
        assert all(torch.equal(x, y) for x, y in zip(data(p), data(q))), kwargs


def test_tensor_hyperparameters_are_saved() -> None:
    p = parameters()
    optimizer = torchopt.SGD(p, lr=torch.tensor(0.25, dtype=torch.float64))
    saved = through_file(optimizer.state_dict())
    assert saved["param_groups"][0]["lr"].item() == 0.25
    other = torchopt.SGD(twins(p), lr=0.1)
    other.load_state_dict(saved)
    assert other.param_groups[0]["lr"].item() == 0.25
    assert other.param_groups[0]["lr"] is not saved["param_groups"][0]["lr"]


def test_a_state_saved_by_torch_is_read_from_a_file() -> None:
    p = parameters()
    donor = torch.optim.AdamW(p, lr=0.1, amsgrad=True)
    train(2, (donor, p))
    other = torchopt.AdamW(twins(p))
    other.load_state_dict(through_file(donor.state_dict()))
    assert other.param_groups[0]["amsgrad"] is True


@pytest.mark.parametrize("donor_cls", [torchopt.Adam, torch.optim.Adam], ids=["own", "torch"])
def test_loaded_tensors_are_not_aliases(donor_cls: Any) -> None:
    p = parameters()
    donor = donor_cls(p, lr=torch.tensor(0.1), amsgrad=True)
    train(2, (donor, p))
    saved = donor.state_dict()
    before = copy.deepcopy(saved)
    q = twins(p)
    other = torchopt.Adam(q)
    other.load_state_dict(saved)
    theirs = {
        x.data_ptr()
        for entry in donor.state.values()
        for x in entry.values()
        if isinstance(x, Tensor)
    } | {donor.param_groups[0]["lr"].data_ptr()}
    mine = [x for entry in other.state.values() for x in entry.values() if isinstance(x, Tensor)]
    assert len(mine) == 6
    assert not theirs & {x.data_ptr() for x in [*mine, other.param_groups[0]["lr"]]}
    train(2, (other, q))
    for x in mine:
        x.fill_(7.0)
    for key, entry in before["state"].items():
        for name, value in entry.items():
            assert torch.equal(saved["state"][key][name], value)


def test_slots_of_one_parameter_are_tensors_of_their_own() -> None:
    p = parameters()
    optimizer = torchopt.Adam(p, amsgrad=False)
    train(1, (optimizer, p))
    optimizer.param_groups[0]["amsgrad"] = True  # switched on later
    train(1, (optimizer, p))
    entry = optimizer.state[p[0]]
    assert entry["max_exp_avg_sq"].data_ptr() != entry["exp_avg_sq"].data_ptr()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("donor_cls", [torchopt.Adam, torch.optim.Adam], ids=["own", "torch"])
def test_half_precision_keeps_float32_slots(donor_cls: Any, dtype: torch.dtype) -> None:
    p = [nn.Parameter(nonzero(4, dtype=dtype)), nn.Parameter(nonzero(2, dtype=dtype))]
    donor = donor_cls(p, lr=0.1)
    train(3, (donor, p))
    q = twins(p)
    other = torchopt.Adam(q)
    saved = donor.state_dict()
    other.load_state_dict(saved)
    for name in ("exp_avg", "exp_avg_sq"):
        slot = other.state[q[0]][name]
        assert slot.dtype is torch.float32
        assert torch.equal(slot, saved["state"][0][name].float())
    assert other.state_dict()["state"][0]["exp_avg"].dtype is torch.float32
    train(2, (other, q))
    assert q[0].dtype is dtype
    assert torch.isfinite(q[0]).all()
    again = torch.optim.Adam(twins(q))
    again.load_state_dict(other.state_dict())
    train(1, (again, again.param_groups[0]["params"]))
    assert torch.isfinite(again.param_groups[0]["params"][0]).all()


def test_the_dtype_of_the_parameters_decides() -> None:
    p = parameters()
    donor = torchopt.Adam(p)
    train(2, (donor, p))
    q = [nn.Parameter(x.detach().float()) for x in p]
    other = torchopt.Adam(q)
    other.load_state_dict(donor.state_dict())
    assert other.state[q[0]]["exp_avg"].dtype is torch.float32
    before = q[0].detach().clone()
    train(1, (other, q))
    assert not torch.equal(q[0], before)


# Refusals -----------------------------------------------------------------------------------------


def _trained(cls: Any, params: list[Any] | None = None, **kwargs: Any) -> tuple[Any, list[Any]]:
    params = parameters() if params is None else params
    optimizer = cls(params, **kwargs)
    train(2, (optimizer, params))
    return optimizer, params


def _other_shapes() -> Any:
    return _trained(torchopt.Adam, [nn.Parameter(nonzero(2, 2)), *parameters()[1:]])[0]


def _spoilt(change: Any) -> Any:
    state = copy.deepcopy(_trained(torchopt.Adam)[0].state_dict())
    state["param_groups"][0]["lr"] = 9.0
    change(state)
    return state


def _group(**values: Any) -> Any:
    return lambda state: state["param_groups"][0].update(values)


def _entry(**values: Any) -> Any:
    return lambda state: state["state"][0].update(values)


STATES = {
    "SGD": (lambda: _trained(torchopt.SGD, momentum=0.9)[0].state_dict(), "another optimizer"),
    "torch-SGD": (
        lambda: _trained(torch.optim.SGD, lr=0.1, momentum=0.9)[0].state_dict(),
        "another optimizer",
    ),
    "plain-SGD": (lambda: _trained(torchopt.SGD)[0].state_dict(), "another optimizer"),
    "RMSprop": (lambda: _trained(torchopt.RMSprop)[0].state_dict(), "another optimizer"),
    "torch-RMSprop": (lambda: _trained(torch.optim.RMSprop)[0].state_dict(), "another optimizer"),
    "torch-AdamW": (
        lambda: _trained(torch.optim.AdamW)[0].state_dict(),
        "decoupled_weight_decay=True; Adam is",
    ),
    "AdamW": (
        lambda: _trained(torchopt.AdamW)[0].state_dict(),
        "decoupled_weight_decay=True; Adam is",
    ),
    "two-groups": (
        lambda: torchopt.Adam(groups(parameters())).state_dict(),
        "2 parameter groups, Adam has 1",
    ),
    "fewer-parameters": (
        lambda: torchopt.Adam(parameters()[:2]).state_dict(),
        "has 2 parameters, that of Adam has 3",
    ),
    "other-shapes": (lambda: _other_shapes().state_dict(), r"shape \(2, 2\).*\(2, 3\)"),
    "lr-negative": (lambda: _spoilt(_group(lr=-1.0)), "lr must be >= 0"),
    "betas": (lambda: _spoilt(_group(betas=(0.9, 1.5))), r"betas\[1\]"),
    "unknown-slot": (lambda: _spoilt(_entry(momentum_buffer=torch.ones(2, 3))), "momentum_buffer"),
    "missing-slot": (lambda: _spoilt(lambda s: s["state"][1].pop("exp_avg")), "lacks .*exp_avg"),
    "missing-step": (lambda: _spoilt(lambda s: s["state"][1].pop("step")), "step"),
    "step-string": (lambda: _spoilt(_entry(step="abc")), "step"),
    "step-nan": (lambda: _spoilt(_entry(step=torch.tensor(float("nan")))), "step"),
    "step-many": (lambda: _spoilt(_entry(step=torch.ones(3))), "step"),
    "slot-string": (lambda: _spoilt(_entry(exp_avg="abc")), "exp_avg"),
    "slot-number": (lambda: _spoilt(_entry(exp_avg=3.0)), "exp_avg"),
    "none": (lambda: None, "expects a dict with 'state' and 'param_groups'"),
    "number": (lambda: 3, "expects a dict with 'state' and 'param_groups'"),
    "empty": (dict, "expects a dict with 'state' and 'param_groups'"),
    "list": (list, "expects a dict with 'state' and 'param_groups'"),
    "module-state": (
        lambda: nn.Linear(2, 1).state_dict(),
        "expects a dict with 'state' and 'param_groups'",
    ),
    "groups-number": (lambda: {"state": {}, "param_groups": 3}, "param_groups"),
    "group-number": (lambda: {"state": {}, "param_groups": [3]}, "[Pp]aram.*group"),
    "group-without-params": (lambda: {"state": {}, "param_groups": [{}]}, "params"),
    "state-number": (lambda: _spoilt(lambda s: s.update(state=1)), "'state'"),
    "entry-number": (lambda: _spoilt(lambda s: s["state"].update({0: 1})), "state"),
    "own-state": (lambda: torchopt.adam().init(parameters()), "expects a dict"),
}

#: torch 2.6 saves the same of Adam and of AdamW.
MARKED = "decoupled_weight_decay" in torch.optim.AdamW([torch.ones(1)]).defaults


@pytest.mark.parametrize(("make", "message"), STATES.values(), ids=STATES.keys())
def test_states_that_are_refused_change_nothing(make: Any, message: str) -> None:
    if make is STATES["torch-AdamW"][0] and not MARKED:
        pytest.skip("this torch does not tell an AdamW state from one of Adam")
    optimizer, params = _trained(torchopt.Adam)
    state = make()
    with refused((ValueError, TypeError), message, optimizer, state):
        optimizer.load_state_dict(state)
    twin, q = copy.deepcopy((optimizer, params))
    train(1, (optimizer, params), (twin, q))
    assert all(torch.equal(x, y) for x, y in zip(data(params), data(q)))


#: Algorithms of torch that have no row, into one that keeps slots of the same names.
PAIRS = {
    "Adagrad-into-RMSprop": (torch.optim.Adagrad, torchopt.RMSprop),
    "NAdam-into-Adam": (torch.optim.NAdam, torchopt.Adam),
    "RAdam-into-Adam": (torch.optim.RAdam, torchopt.Adam),
    "Adamax-into-Adam": (torch.optim.Adamax, torchopt.Adam),
}


@pytest.mark.parametrize(("donor", "cls"), PAIRS.values(), ids=PAIRS.keys())
def test_the_state_of_what_torch_alone_has_is_refused(donor: Any, cls: Any) -> None:
    saved = _trained(donor)[0].state_dict()
    optimizer, _ = _trained(cls)
    with refused(ValueError, "another optimizer", optimizer, saved):
        optimizer.load_state_dict(saved)


@every_pair
def test_the_state_of_another_algorithm_is_refused(algorithm: Algorithm, other: Algorithm) -> None:
    optimizer, _ = _trained(algorithm.cls)
    for donor in filter(None, (other.cls, other.torch_cls)):
        if not MARKED and {algorithm.torch_cls, donor} == {torch.optim.Adam, torch.optim.AdamW}:
            continue  # this torch does not tell an AdamW state from one of Adam
        saved = _trained(donor)[0].state_dict()
        with refused(ValueError, "another optimizer|decoupled_weight_decay", optimizer, saved):
            optimizer.load_state_dict(saved)


def test_a_chain_refuses_the_state_of_another_chain() -> None:
    clipped = torchopt.chain(torchopt.clip_grad_norm(1.0), torchopt.adam())
    optimizer, _ = _trained(lambda p: torchopt.Optimizer(p, clipped))
    saved = _trained(torchopt.Adam)[0].state_dict()
    with refused(ValueError, "another optimizer.*'max_norm'", optimizer, saved):
        optimizer.load_state_dict(saved)
