"""``torch.distributed.checkpoint``: states by name, nested and flat, and the step before them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case
from frameworks import ROWS, batches, every_optimizer, network, train, twin, weights
from tolerances import assert_close
from torch import nn

import torchopt


checkpoint = pytest.importorskip("torch.distributed.checkpoint")
states = pytest.importorskip("torch.distributed.checkpoint.state_dict")
SGD = torchopt.sgd(0.1, momentum=0.9)
#: Wrappers over the table, and groups of several algorithms.
WRAPPED = {
    "sam": lambda params: torchopt.SAM(params, SGD, 0.1),
    "lookahead": lambda params: torchopt.Optimizer(params, torchopt.lookahead(SGD, 2)),
    "accumulated": lambda params: torchopt.Optimizer(params, torchopt.MultiSteps(SGD, 2)),
    "if-finite": lambda params: torchopt.Optimizer(params, torchopt.apply_if_finite(SGD, 2)),
    "schedule": lambda params: torchopt.Adam(
        params, lr=torchopt.schedules.linear(0.1, 0.01, transition_steps=8)
    ),
    "partition": lambda params: torchopt.Optimizer(
        params,
        torchopt.partition(
            {"matrix": torchopt.muon(0.1), "rest": torchopt.lamb(0.1)}, torchopt.matrices_and_rest
        ),
    ),
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Let torch say that there is one process, and what it has deprecated of its own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch")
        yield


def options(flat: bool) -> Any:
    return states.StateDictOptions(flatten_optimizer_state_dict=flat)


def assert_initialised(net: nn.Module, optimizer: Any, flat: bool) -> dict[str, Any]:
    """Return the first state of an optimizer; nothing has moved for it."""
    before, rates = weights(net), [group["lr"] for group in optimizer.param_groups]
    found = states.get_optimizer_state_dict(net, optimizer, options=options(flat))
    assert all(map(torch.equal, weights(net), before))
    assert [group["lr"] for group in optimizer.param_groups] == rates
    assert all(p.grad is None for p in net.parameters())
    return found


def assert_resumes(case: Case, make: Any, flat: bool, folder: Path | None = None) -> nn.Module:
    """Assert that a state, which may have been in a folder, is the whole state; return the network.

    From a folder torch loads into the tensors of the first state of the optimizer that resumes.
    """
    net, data = network(case), batches(6)
    optimizer = make(net.parameters())
    train(net, optimizer, data[:3])
    saved = states.get_optimizer_state_dict(net, optimizer, options=options(flat))
    other = twin(net, case)
    resumed = make(other.parameters())
    first = assert_initialised(other, resumed, flat)
    if folder is not None:
        checkpoint.save({"optimizer": saved}, checkpoint_id=folder)
        saved = {"optimizer": first}
        checkpoint.load(saved, checkpoint_id=folder)
        saved = saved["optimizer"]
    elif not isinstance(optimizer, torchopt.Optimizer):
        saved = copy.deepcopy(saved)  # torch.optim's would go on in the tensors of the first one
    states.set_optimizer_state_dict(other, resumed, saved, options=options(flat))
    assert_close(weights(other), weights(net))
    train(net, optimizer, data[3:])
    train(other, resumed, data[3:])
    assert_close(weights(other), weights(net))
    return net


@every_optimizer()
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
def test_a_state_comes_back_by_name(case: Case, flat: bool, tmp_path: Path) -> None:
    state, folder = torch.random.get_rng_state(), None if flat else tmp_path
    ours = assert_resumes(case, lambda params: case.cls(params, **case.kwargs), flat, folder)
    if case.torch_cls is not None:
        torch.random.set_rng_state(state)
        make = lambda params: case.torch_cls(params, **case.kwargs)  # noqa: E731
        theirs = assert_resumes(case, make, flat)
        assert_close(weights(ours), weights(theirs), times=10)


@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
def test_a_wrapper_comes_back_by_name(name: str, flat: bool, tmp_path: Path) -> None:
    assert_resumes(ROWS[0], WRAPPED[name], flat, tmp_path if flat else None)


# What groups say, and what is no number -----------------------------------------------------------


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
def test_weights_to_evaluate_with_are_not_taken_for_those_to_train(flat: bool) -> None:
    net = network(ROWS[0])
    make = lambda params: torchopt.AdamWScheduleFree(params, 0.1)  # noqa: E731
    optimizer = make(net.parameters())
    train(net, optimizer, batches(3))
    trained = weights(net)
    optimizer.eval()
    assert not torch.equal(weights(net)[0], trained[0])
    saved = states.get_optimizer_state_dict(net, optimizer, options=options(flat))
    other = twin(net, ROWS[0])
    resumed = make(other.parameters())
    states.set_optimizer_state_dict(other, resumed, saved, options=options(flat))
    with pytest.raises(RuntimeError, match=r"call optimizer.train\(\)"):
        train(other, resumed, batches(1))
    resumed.train()
    assert_close(weights(other), trained)


def test_groups_say_their_algorithm_and_not_anothers() -> None:
    params = [nn.Parameter(torch.ones(2))]
    groups = torchopt.LAMB(params).param_groups
    assert groups[0]["algorithm"] == "lamb"
    for cls, mark in ((torchopt.Lion, "lion"), (torchopt.Adam, None)):
        copied = [{"params": group["params"], "algorithm": "lamb"} for group in groups]
        assert cls(copied).param_groups[0].get("algorithm") == mark
    states_of = [cls(params).state_dict() for cls in (torchopt.LAMB, torchopt.Adam)]
    for cls, state in zip((torchopt.Adam, torchopt.LAMB), states_of):
        with pytest.raises(ValueError, match="belongs to another optimizer"):
            cls(params).load_state_dict(state)


def test_a_dtype_is_saved_by_name_and_comes_back(tmp_path: Path) -> None:
    """What reads states knows numbers, text and tensors."""
    net = nn.Linear(2, 3, bias=False)
    optimizer = torchopt.Muon(net.parameters(), ns_dtype=torch.float32)
    inner = torchopt.MetaMuon(copy.deepcopy(net), ns_dtype=torch.float32)
    for state in (optimizer.state_dict(), inner.state_dict()):
        assert state["param_groups"][0]["ns_dtype"] == "torch.float32"
        torch.save(state, tmp_path / "state.pt")
        loaded = torch.load(tmp_path / "state.pt", weights_only=True)
        for given in ("torch.float32", torch.float32):  # as former versions saved it
            loaded["param_groups"][0]["ns_dtype"] = given
            for other in (torchopt.Muon(net.parameters()), torchopt.MetaMuon(copy.deepcopy(net))):
                other.load_state_dict(loaded)
                assert other.param_groups[0]["ns_dtype"] is torch.float32
    loaded["param_groups"][0]["ns_dtype"] = "torch.int8"
    with pytest.raises(ValueError, match="ns_dtype must be"):
        torchopt.Muon(net.parameters()).load_state_dict(loaded)
