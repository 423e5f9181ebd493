"""States by name, states of older versions, foreign entries, and what groups may say."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import every, every_torch_case
from conftest import nonzero
from fusing import needs_library
from tolerances import assert_close
from torch import nn

import torchopt


def train(optimizer: Any, params: Any, steps: int = 2) -> None:
    for _ in range(steps):
        for p in params:
            p.grad = nonzero(*p.shape)
        optimizer.step()


class Subclass(torch.Tensor):
    """A tensor for which there are no kernels."""


# Names --------------------------------------------------------------------------------------------


def named(order: str) -> list[tuple[str, nn.Parameter]]:
    return [(name, nn.Parameter(nonzero(3))) for name in order]


def test_parameters_are_matched_by_name() -> None:
    donor_params, params = named("abc"), named("cab")
    rates = {"a": 0.1, "b": 0.2, "c": 0.3}
    donor = torchopt.Adam(donor_params, lr=list(rates.values()), betas=([0.1, 0.2, 0.3], 0.9))
    train(donor, [p for _, p in donor_params])
    optimizer = torchopt.Adam(params, lr=1.0)
    optimizer.load_state_dict(donor.state_dict())
    group, own = optimizer.param_groups[0], dict(params)
    assert group["param_names"] == ["c", "a", "b"]
    assert list(group["lr"]) == [rates[name] for name in "cab"]
    assert tuple(map(list, map(list, [group["betas"][0]]))) == ([0.3, 0.1, 0.2],)
    assert [id(p) for p in group["params"]] == [id(p) for _, p in params]
    for name, p in donor_params:
        for slot in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[own[name]][slot], donor.state[p][slot])


def test_other_names_are_refused_and_the_way_is_told() -> None:
    donor_params, params = named("ab"), named("ax")
    donor, optimizer = torchopt.SGD(donor_params, momentum=0.9), torchopt.SGD(params, momentum=0.9)
    train(donor, [p for _, p in donor_params])
    state = donor.state_dict()
    with pytest.raises(ValueError, match=r"'x' is missing.*pop\('param_names'\)"):
        optimizer.load_state_dict(state)
    assert not optimizer.state
    state["param_groups"][0].pop("param_names")
    optimizer.load_state_dict(state)
    assert torch.equal(
        optimizer.state[params[1][1]]["momentum_buffer"],
        donor.state[donor_params[1][1]]["momentum_buffer"],
    )


# Older versions -----------------------------------------------------------------------------------


@pytest.mark.sampled(1, each=3)
@every_torch_case
@pytest.mark.parametrize("donor", ["own", "torch"])
@pytest.mark.parametrize("missing", ["maximize", "nesterov", "amsgrad", "momentum", "all"])
def test_states_saved_before_an_option_existed(case: Any, donor: str, missing: str) -> None:
    """The option is then what it was at the time, as torch.optim has it, not what it is here."""
    kwargs = {k: v for k, v in case.kwargs.items() if k in ("lr", "weight_decay", "betas", "alpha")}
    p = [nn.Parameter(nonzero(3))]
    optimizer = (case.cls if donor == "own" else case.torch_cls)(p, **kwargs)
    train(optimizer, p)
    state = copy.deepcopy(optimizer.state_dict())
    for name in {"maximize", "nesterov", "amsgrad", "momentum", *case.cls.former_defaults}:
        if missing in (name, "all"):
            state["param_groups"][0].pop(name, None)
    added = "decoupled_weight_decay" not in case.specs  # to the state, for torch
    if donor == "own" and missing != "maximize" and added:  # without amsgrad it would be RAdam's
        state["param_groups"][0].pop("decoupled_weight_decay", None)
    q = [nn.Parameter(p[0].detach().clone())]
    other = case.cls(q, **{**kwargs, "lr": 9.0}, maximize=missing in ("maximize", "all"))
    other.load_state_dict(state)
    g = nonzero(3)
    p[0].grad, q[0].grad = g, g.clone()
    optimizer.step()
    other.step()
    assert_close(q[0].detach(), p[0].detach())


def test_a_state_without_amsgrad_is_not_taken_from_a_newer_algorithm() -> None:
    p = [nn.Parameter(nonzero(3))]
    donor = torch.optim.RAdam(p)
    train(donor, p)
    with pytest.raises(ValueError, match="another optimizer"):
        torchopt.Adam(p).load_state_dict(donor.state_dict())


# Entries ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", [None, False], ids=["fused", "rules"])
def test_plain_sgd_keeps_no_state(setting: Any) -> None:
    p = [nn.Parameter(nonzero(3))]
    optimizer = torchopt.SGD(p, lr=0.1, use_accelerated_op=setting)
    train(optimizer, p, 3)
    assert not optimizer.state
    assert optimizer.state_dict()["state"] == {}
    optimizer.param_groups[0]["momentum"] = 0.9
    train(optimizer, p)
    assert set(optimizer.state[p[0]]) == {"momentum_buffer"}


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("setting", [None, False], ids=["fused", "rules"])
def test_groups_with_and_without_momentum(setting: Any, momentum: float) -> None:
    pairs = []
    for cls, more in ((torchopt.SGD, {"use_accelerated_op": setting}), (torch.optim.SGD, {})):
        torch.manual_seed(5)
        p = [nn.Parameter(nonzero(3)), nn.Parameter(nonzero(2))]
        groups = [{"params": p[:1]}, {"params": p[1:], "momentum": 0.5}]
        optimizer = cls(groups, lr=0.1, momentum=momentum, **more)
        train(optimizer, p, 4)
        pairs.append([x.detach() for x in p])
        assert len(optimizer.state) == (2 if momentum else 1)
    assert_close(*pairs)


@pytest.mark.parametrize("cls", [torchopt.SGD, torchopt.Adam])
@pytest.mark.parametrize("setting", [None, False], ids=["fused", "rules"])
@pytest.mark.parametrize("value", [7, {"mean": torch.ones(2)}, "note"], ids=str)
def test_entries_of_no_parameter(cls: Any, setting: Any, value: Any) -> None:
    """``torch.optim`` saves and loads what else a user puts into ``optimizer.state``."""
    results = []
    for entry in (False, True):
        torch.manual_seed(3)
        p = [nn.Parameter(nonzero(3))]
        optimizer = cls(p, lr=0.1, use_accelerated_op=setting)
        train(optimizer, p)
        if entry:
            optimizer.state["mine"] = value
            other = cls(p, lr=0.1)
            other.load_state_dict(optimizer.state_dict())
            assert str(other.state["mine"]) == str(value)
        train(optimizer, p, 3)
        results.append(p[0].detach())
    assert torch.equal(*results)


@pytest.mark.parametrize("setting", [None, False], ids=["fused", "rules"])
def test_an_entry_of_a_parameter_that_is_no_dict(setting: Any) -> None:
    p = [nn.Parameter(nonzero(3))]
    optimizer = torchopt.Adam(p, use_accelerated_op=setting)
    train(optimizer, p)
    optimizer.state[p[0]] = 3
    before = p[0].detach().clone()
    with pytest.raises(TypeError, match=r"optimizer\.state has 3 .*expected a dict"):
        train(optimizer, p, 1)
    assert torch.equal(p[0].detach(), before)


# Groups -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("switch", ["capturable", "differentiable"])
@every_torch_case
def test_switches_are_refused_in_a_group_as_in_the_constructor(case: Any, switch: str) -> None:
    p = [nn.Parameter(nonzero(3))]
    with pytest.raises(ValueError) as of_constructor:
        case.cls(p, **{switch: True})
    optimizer = case.cls([nn.Parameter(nonzero(2))])
    for give in (
        lambda: case.cls([{"params": p, switch: True}]),
        lambda: optimizer.add_param_group({"params": p, switch: True}),
    ):
        with pytest.raises(ValueError) as of_group:
            give()
        assert str(of_group.value) == str(of_constructor.value)
    assert len(optimizer.param_groups) == 1
    case.cls([{"params": p, switch: False, "foreach": True}])


@needs_library
def test_fused_in_a_group_requires_kernels_as_in_the_constructor() -> None:
    p = [nn.Parameter(nonzero(3))]
    later = torchopt.Adam([nn.Parameter(nonzero(3))])
    later.add_param_group({"params": p, "fused": True})
    for optimizer in (
        torchopt.Adam(p, fused=True),  # pyright: ignore[reportCallIssue]
        torchopt.Adam([{"params": p, "fused": True}]),
        later,
    ):
        p[0].grad = nonzero(3).as_subclass(Subclass)
        with pytest.raises(RuntimeError, match=r"requires a fused kernel.*Subclass"):
            optimizer.step()
        p[0].grad = None


def test_a_group_given_as_parameters_alone() -> None:
    a, b, c = (nn.Parameter(nonzero(2)) for _ in range(3))
    optimizer = torchopt.SGD([a], lr=0.25)
    optimizer.add_param_group([b])
    optimizer.add_param_group(c)
    assert [group["params"] for group in optimizer.param_groups] == [[a], [b], [c]]
    assert [group["lr"] for group in optimizer.param_groups] == [0.25] * 3
    with pytest.raises(TypeError, match=r"must be a dict .* got Linear.*module\.parameters"):
        optimizer.add_param_group(nn.Linear(2, 1))
    assert len(optimizer.param_groups) == 3


# Rates that are tensors ---------------------------------------------------------------------------


@pytest.mark.sampled(1)
@needs_library
@every(lambda case: case.torch_cls and case.algorithm.fused)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_fused_with_a_tensor_rate(case: Any, shape: tuple[int, ...]) -> None:
    rate = case.kwargs["lr"]
    paths = []
    for lr in (torch.full(shape, rate, dtype=torch.float64), rate):
        torch.manual_seed(1)
        p = [nn.Parameter(nonzero(2, 3)), nn.Parameter(nonzero())]
        optimizer = case.cls(p, **{**case.kwargs, "lr": lr}, fused=True)
        train(optimizer, p, 3)
        if isinstance(lr, torch.Tensor):
            lr.fill_(0.5 * rate)
        else:
            optimizer.param_groups[0]["lr"] = 0.5 * rate
        train(optimizer, p, 2)
        paths.append([x.detach() for x in p])
    assert_close(*paths)
