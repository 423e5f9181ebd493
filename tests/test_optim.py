"""The object-oriented face: everything that users of torch.optim do with an optimizer."""

from __future__ import annotations

import inspect
import itertools
import math
from typing import Any

import pytest
import torch
from cases import CASES, TORCH_CASES, every_case, every_torch_case
from conftest import nonzero
from tolerances import assert_close
from torch import Tensor, nn
from torch.optim import lr_scheduler

import torchopt


SGD_CASE = next(case for case in CASES if case.name == "sgd-momentum-dampening-decay")
ADAM_CASE = next(case for case in CASES if case.name == "adam-amsgrad-decay")


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(nonzero(2, 3)), nn.Parameter(nonzero(3))]


def twins(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in params]


def set_grads(*lists: list[nn.Parameter]) -> None:
    """Give equal random gradients to corresponding parameters."""
    for group in zip(*lists):
        g = nonzero(*group[0].shape, dtype=group[0].dtype)
        for p in group:
            p.grad = g.clone()


def data(params: list[Any]) -> list[Tensor]:
    return [p.detach() for p in params]


def pair(case: Any, **changed: Any) -> tuple[Any, Any, list[Any], list[Any]]:
    """Return our optimizer and torch's with the same options over equal parameters."""
    ours, theirs = (params := parameters()), twins(params)
    kwargs = {**case.kwargs, **changed}
    return case.cls(ours, **kwargs), case.torch_cls(theirs, **kwargs), ours, theirs


def assert_same_path(
    ours: Any, theirs: Any, p: Any, q: Any, after: Any = None, steps: int = 6
) -> None:
    """Assert that two optimizers go the same way, with ``after(optimizer, k)`` after each step."""
    for k in range(steps):
        set_grads(p, q)
        before = data(p)[0].clone()
        ours.step()
        theirs.step()
        if k == 0:
            assert not torch.equal(before, data(p)[0])
        if after is not None:
            after(ours, k)
            after(theirs, k)
        assert_close(data(p), data(q), times=10, what=f"step {k}")


# What it is ---------------------------------------------------------------------------------------


@every_case
def test_it_is_a_torch_optimizer(case: Any) -> None:
    params = parameters()
    optimizer = case.cls(params, **case.kwargs)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert isinstance(optimizer, torchopt.Optimizer)
    assert optimizer.transformation == case.tx()
    (group,) = optimizer.param_groups
    assert group["params"] == params
    assert {k: v for k, v in group.items() if k in case.kwargs} == case.kwargs
    assert optimizer.defaults.items() >= case.kwargs.items()
    assert repr(optimizer).startswith(f"{case.cls.__name__} (\nParameter Group 0")


@every_case
def test_it_is_the_functional_face(case: Any) -> None:
    p = parameters()
    q = data(twins(p))
    for optimizer in (case.cls(p, **case.kwargs), torchopt.Optimizer(twins(p), case.tx())):
        own = optimizer.param_groups[0]["params"]
        tx, expected = case.tx(), [x.clone() for x in q]
        state = tx.init(expected)
        for _ in range(4):
            set_grads(own)
            updates, state = tx.update([x.grad for x in own], state, expected, inplace=False)
            expected = torchopt.apply_updates(expected, updates, inplace=False)
            optimizer.step()
            assert_close(data(own), expected)


@every_torch_case
def test_signature_takes_the_arguments_of_torch(case: Any) -> None:
    """Positional arguments in torch's order, and every keyword of torch's class."""
    ours = list(inspect.signature(case.cls).parameters.values())
    theirs = list(inspect.signature(case.torch_cls).parameters.values())
    positional = [p.name for p in theirs if p.kind is p.POSITIONAL_OR_KEYWORD]
    switches = {"foreach", "fused", "capturable", "differentiable"}
    shared = list(itertools.takewhile(lambda name: name not in switches, positional))
    assert len(shared) > 5
    assert [p.name for p in ours][: len(shared)] == shared
    theirs = [p for p in theirs if p.name != "decoupled_weight_decay"]  # that is AdamW
    assert {p.name for p in theirs} <= {p.name for p in ours}
    defaults = {p.name: p.default for p in ours}
    for p in theirs:
        if p.name not in ("params", *switches):
            assert defaults[p.name] == p.default, p.name


# Groups and live hyperparameters ------------------------------------------------------------------


@every_torch_case
def test_groups_have_their_own_hyperparameters(case: Any) -> None:
    p = parameters()
    q = twins(p)
    options = {"lr": 0.2, "weight_decay": 0.3}
    groups = lambda x: [{"params": [x[0]]}, {"params": [x[1]], **options}]  # noqa: E731
    assert_same_path(
        case.cls(groups(p), **case.kwargs), case.torch_cls(groups(q), **case.kwargs), p, q
    )


@every_torch_case
def test_hyperparameters_are_read_at_every_step(case: Any) -> None:
    ours, theirs, p, q = pair(case)

    def change(optimizer: Any, k: int) -> None:
        group = optimizer.param_groups[0]
        group["lr"] *= 0.7
        group["weight_decay"] = 0.05 * k
        if "betas" in group:
            group["betas"] = (0.5 + 0.05 * k, 0.9)
        if group.get("momentum"):
            group["momentum"] = 0.5 + 0.05 * k

    assert_same_path(ours, theirs, p, q, change)


@every_torch_case
def test_maximize(case: Any) -> None:
    assert_same_path(*pair(case, maximize=True))
    ours, _, p, _ = pair(case, maximize=True, weight_decay=0.0)
    p[0].grad = torch.ones_like(p[0])
    before = p[0].detach().clone()
    ours.step()
    assert (p[0] > before).all()


@every_torch_case
def test_tensor_lr(case: Any) -> None:
    lr = torch.tensor(case.kwargs["lr"], dtype=torch.float64)
    ours, theirs, p, q = pair(case, lr=lr)
    theirs.param_groups[0]["lr"] = lr.item()
    assert_same_path(ours, theirs, p, q, steps=3)
    lr.fill_(0.5)
    ours.param_groups[0]["lr"].fill_(0.5)
    theirs.param_groups[0]["lr"] = 0.5
    assert_same_path(ours, theirs, p, q, steps=3)


def test_a_learned_lr_is_used_but_not_recorded() -> None:
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    params = parameters()
    optimizer = torchopt.SGD(params, lr=lr, momentum=0.9)
    before = [x.clone() for x in data(params)]
    set_grads(params)
    optimizer.step()
    assert_close(data(params), [x - 0.1 * p.grad for x, p in zip(before, params)])
    assert all(p.is_leaf and p.grad_fn is None for p in params)
    assert not optimizer.state[params[0]]["momentum_buffer"].requires_grad


def test_lr_per_parameter_by_name() -> None:
    net = nn.Linear(2, 1).double()
    lr = {"weight": 0.5, "bias": torch.tensor([0.25], dtype=torch.float64)}
    optimizer = torchopt.SGD(net.named_parameters(), lr=lr)
    before = [x.clone() for x in data(list(net.parameters()))]
    set_grads(list(net.parameters()))
    optimizer.step()
    assert_close(net.weight.detach(), before[0] - 0.5 * net.weight.grad)
    assert_close(net.bias.detach(), before[1] - 0.25 * net.bias.grad)


def test_lr_per_parameter_by_name_over_two_groups() -> None:
    a, b = parameters()
    groups = [{"params": [("a", a)]}, {"params": [("b", b)], "momentum": 0.5}]
    optimizer = torchopt.SGD(groups, lr={"a": 0.5, "b": 0.25})
    before = [x.clone() for x in data([a, b])]
    set_grads([a, b])
    optimizer.step()
    assert_close(data([a, b]), [before[0] - 0.5 * a.grad, before[1] - 0.25 * b.grad])


# Parameters -----------------------------------------------------------------------------------


@every_torch_case
def test_unused_and_frozen_parameters_stay(case: Any) -> None:
    p = [*parameters(), nn.Parameter(nonzero(2)), nn.Parameter(nonzero(2), requires_grad=False)]
    q = twins(p[:2])
    ours, theirs = case.cls(p, **case.kwargs), case.torch_cls(q, **case.kwargs)
    still = [x.clone() for x in data(p[2:])]
    for _ in range(3):
        set_grads(p[:2], q)
        ours.step()
        theirs.step()
    assert_close(data(p[:2]), data(q), times=10)
    assert all(torch.equal(x, y) for x, y in zip(data(p[2:]), still))
    assert not ours.state.get(p[2])
    assert not ours.state.get(p[3])
    p[2].grad = nonzero(2)  # it joins late and counts its own steps
    alone = [nn.Parameter(still[0].clone())]
    alone[0].grad = p[2].grad.clone()
    p[0].grad = p[1].grad = None
    ours.step()
    case.torch_cls(alone, **case.kwargs).step()
    assert_close(p[2].detach(), alone[0].detach(), times=10)


@every_torch_case
def test_parameters_that_get_no_gradient_now_and_then(case: Any) -> None:
    ours, theirs, p, q = pair(case)
    for k in range(6):
        set_grads(p, q)
        if k % 2:
            p[0].grad = q[0].grad = None
        ours.step()
        theirs.step()
        assert_close(data(p), data(q), times=10)


def test_a_step_without_any_gradient_does_nothing() -> None:
    params = parameters()
    optimizer = torchopt.AdamW(params, weight_decay=0.1)
    before = [x.clone() for x in data(params)]
    assert optimizer.step() is None
    assert all(torch.equal(x, y) for x, y in zip(data(params), before))
    assert not optimizer.state


@every_torch_case
def test_step_does_not_change_the_gradients(case: Any) -> None:
    for maximize in (False, True):
        optimizer, _, params, _ = pair(case, maximize=maximize)
        for _ in range(3):
            set_grads(params)
            grads = [p.grad for p in params]
            values, versions = [g.clone() for g in grads], [g._version for g in grads]
            optimizer.step()
            assert all(p.grad is g for p, g in zip(params, grads))
            assert all(torch.equal(g, v) for g, v in zip(grads, values))
            assert [g._version for g in grads] == versions


@every_torch_case
@pytest.mark.parametrize("set_to_none", [True, False], ids=["none", "zeros"])
def test_zero_grad(case: Any, set_to_none: bool) -> None:
    """Gradient buffers that are zeroed and reused must not change what the state remembers."""
    ours, theirs, p, q = pair(case)
    for _ in range(4):
        weight = nonzero(2, 3)
        for x, optimizer in ((p, ours), (q, theirs)):
            optimizer.zero_grad(set_to_none=set_to_none)
            assert all((y.grad is None) if set_to_none else True for y in x)
            ((x[0] * weight).sum() ** 2 + (x[1] ** 3).sum()).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
        assert_close(data(p), data(q), times=10)
    for y in p:
        assert y.grad is None if set_to_none else torch.equal(y.grad, torch.zeros_like(y))


@every_torch_case
def test_add_param_group(case: Any) -> None:
    p = [*parameters(), nn.Parameter(nonzero(4))]
    q = twins(p)
    ours, theirs = case.cls(p[:1], **case.kwargs), case.torch_cls(q[:1], **case.kwargs)
    assert_same_path(ours, theirs, p[:1], q[:1], steps=2)
    ours.add_param_group({"params": p[1:], "lr": 0.3})
    theirs.add_param_group({"params": q[1:], "lr": 0.3})
    assert ours.param_groups[1].items() >= {**case.kwargs, "lr": 0.3}.items()
    assert_same_path(ours, theirs, p, q, steps=3)


def test_add_param_group_with_names() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)).double()
    optimizer = torchopt.Adam(net[0].named_parameters())
    optimizer.add_param_group({"params": list(net[1].named_parameters("1"))})
    assert optimizer.param_groups[1]["param_names"] == ["1.weight", "1.bias"]
    net[1].weight.grad = nonzero(1, 2).to_sparse()
    with pytest.raises(TypeError, match=r"gradient of '1\.weight' is sparse"):
        optimizer.step()


def test_add_param_group_refuses_what_torch_refuses() -> None:
    params = parameters()
    optimizer = torchopt.SGD(params, lr=0.1)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": params[:1]})
    with pytest.raises(TypeError, match="must be a dict"):
        optimizer.add_param_group(torch.nn.Linear(2, 1))
    with pytest.raises(ValueError, match="lr must be >= 0"):
        optimizer.add_param_group({"params": parameters(), "lr": -0.1})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match="empty parameter list"):
        torchopt.SGD([])
    with pytest.raises(ValueError, match="lr must be >= 0"):
        torchopt.SGD([{"params": params, "lr": -1.0}])
    with pytest.raises(TypeError, match="expects a gradient transformation"):
        torchopt.Optimizer(params, torchopt.adam)


# Schedulers ---------------------------------------------------------------------------------------


def _sequential(o: Any) -> Any:
    first, second = lr_scheduler.LinearLR(o, 0.5, 1.0, 3), lr_scheduler.ExponentialLR(o, 0.8)
    return lr_scheduler.SequentialLR(o, [first, second], [3])


def _chained(o: Any) -> Any:
    return lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.9)]
    )


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda k: 0.9**k, lambda k: 1 / (k + 1)]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda k: 0.8),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3], 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.2, 1.0, 4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 5, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 4, 1e-3),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(
        o, 0.01, 0.2, 2, cycle_momentum="momentum" in o.defaults or "betas" in o.defaults
    ),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(
        o, 0.2, 7, cycle_momentum="momentum" in o.defaults or "betas" in o.defaults
    ),
    "SequentialLR": _sequential,
    "ChainedScheduler": _chained,
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.01, 3),
}


def test_every_scheduler_of_torch_is_tried() -> None:
    names = {
        name
        for name, value in vars(lr_scheduler).items()
        if isinstance(value, type)
        and issubclass(value, lr_scheduler.LRScheduler)
        and not name.startswith("_")
        and value is not lr_scheduler.LRScheduler
    }
    assert names <= set(SCHEDULERS)
    assert len(names) > 12


@pytest.mark.filterwarnings("ignore:The epoch parameter")
@pytest.mark.parametrize("case", [SGD_CASE, ADAM_CASE, CASES[-1]], ids=lambda case: case.name)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name: str, case: Any) -> None:
    """Each scheduler moves our groups and parameters exactly as it moves torch's."""
    p = parameters()
    q = twins(p)
    ours, theirs = (
        cls([{"params": [x[0]]}, {"params": [x[1]], "lr": 0.02}], **case.kwargs)
        for cls, x in ((case.cls, p), (case.torch_cls, q))
    )
    schedulers = {id(o): SCHEDULERS[name](o) for o in (ours, theirs)}
    seen: list[Any] = []

    def after(optimizer: Any, k: int) -> None:
        scheduler = schedulers[id(optimizer)]
        scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        group = optimizer.param_groups[0]
        seen.append((group["lr"], group.get("momentum"), group.get("betas")))

    assert_same_path(ours, theirs, p, q, after, steps=7)
    assert seen[0::2] == seen[1::2]
    assert len({lr for lr, _, _ in seen}) > 1
    if name in ("CyclicLR", "OneCycleLR"):
        cycled = [x[2] if case is ADAM_CASE else x[1] for x in seen]
        assert len(set(cycled)) > 2
    new = SCHEDULERS[name](theirs)
    new.load_state_dict(schedulers[id(ours)].state_dict())


def test_a_scheduler_moves_a_tensor_lr_in_place() -> None:
    lr = torch.tensor(0.5, dtype=torch.float64)
    params = parameters()
    optimizer = torchopt.SGD(params, lr=lr)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    set_grads(params)
    optimizer.step()
    scheduler.step()
    assert isinstance(optimizer.param_groups[0]["lr"], Tensor)
    assert optimizer.param_groups[0]["lr"].item() == 0.25
    before = params[0].detach().clone()
    optimizer.step()
    assert_close(params[0].detach(), before - 0.25 * params[0].grad)


def test_momentum_that_is_switched_on_during_training() -> None:
    """A scheduler may raise momentum from 0; torch.optim.SGD starts its buffer then."""
    ours, theirs, p, q = pair(SGD_CASE, momentum=0.0, dampening=0.0)

    def after(optimizer: Any, k: int) -> None:
        optimizer.param_groups[0]["momentum"] = 0.0 if k < 2 else 0.9

    assert_same_path(ours, theirs, p, q, after)


# Gradient scaling, hooks, closures ----------------------------------------------------------------


@every_torch_case
def test_grad_scaler(case: Any) -> None:
    """An overflowing step is skipped; the others are those of unscaled training."""
    ours, theirs, p, q = pair(case)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for k in range(4):
        weight = nonzero(2, 3)
        if k == 1:
            weight[0, 0] = math.inf
        ours.zero_grad()
        scaler.scale((p[0] * weight).sum() + (p[1] ** 2).sum()).backward()
        before = [x.clone() for x in data(p)]
        scaler.step(ours)
        scaler.update()
        if k == 1:
            assert all(torch.equal(x, y) for x, y in zip(data(p), before))
            continue
        theirs.zero_grad()
        ((q[0] * weight).sum() + (q[1] ** 2).sum()).backward()
        theirs.step()
        assert_close(data(p), data(q), times=10)
    assert scaler.get_scale() == 2.0**7


def test_step_hooks_run_in_order() -> None:
    params, calls = parameters(), []
    optimizer = torchopt.Adam(params)
    start = params[0].detach().clone()

    def pre(opt: Any, args: Any, kwargs: Any) -> None:
        assert opt is optimizer
        calls.append(("pre", torch.equal(params[0].detach(), start)))

    def post(opt: Any, args: Any, kwargs: Any) -> None:
        calls.append(("post", torch.equal(params[0].detach(), start)))

    handles = [optimizer.register_step_pre_hook(pre), optimizer.register_step_post_hook(post)]
    set_grads(params)
    optimizer.step()
    assert calls == [("pre", True), ("post", False)]
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert len(calls) == 2


def test_a_pre_hook_may_change_the_gradients() -> None:
    params = parameters()
    optimizer = torchopt.SGD(params, lr=1.0)

    def pre(opt: Any, args: Any, kwargs: Any) -> None:
        params[0].grad.fill_(2.0)

    optimizer.register_step_pre_hook(pre)
    before = params[0].detach().clone()
    set_grads(params)
    optimizer.step()
    assert_close(params[0].detach(), before - 2.0)


def test_global_step_hooks_run() -> None:
    from torch.optim.optimizer import (
        register_optimizer_step_post_hook,
        register_optimizer_step_pre_hook,
    )

    params, calls = parameters(), []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("pre")),
        register_optimizer_step_post_hook(lambda *_: calls.append("post")),
    ]
    try:
        set_grads(params)
        torchopt.RMSprop(params).step()
    finally:
        for handle in handles:
            handle.remove()
    assert calls == ["pre", "post"]


def test_state_dict_hooks() -> None:
    params, calls = parameters(), []
    optimizer = torchopt.Adam(params, lr=0.25)
    set_grads(params)
    optimizer.step()
    optimizer.register_state_dict_pre_hook(lambda opt: calls.append("pre-save"))
    optimizer.register_state_dict_post_hook(lambda opt, saved: {**saved, "extra": 7})
    saved = optimizer.state_dict()
    assert saved["extra"] == 7
    assert calls == ["pre-save"]


def test_a_state_dict_post_hook_may_return_anything() -> None:
    optimizer = torchopt.Adam(parameters())
    optimizer.register_state_dict_post_hook(lambda opt, saved: {"wrapped": saved})
    assert set(optimizer.state_dict()) == {"wrapped"}


@pytest.mark.parametrize("cls", [torchopt.Adam, torch.optim.Adam], ids=["torchopt", "torch"])
def test_load_state_dict_hooks(cls: Any) -> None:
    """A pre-hook replaces what is loaded; a post-hook sees and may change what was loaded."""
    params, seen = parameters(), []
    optimizer = cls(params, lr=0.25)
    set_grads(params)
    optimizer.step()
    saved = optimizer.state_dict()

    def pre(opt: Any, state: Any) -> Any:
        groups = [{**state["param_groups"][0], "lr": 0.5}]
        entry = {**state["state"][0], "exp_avg": torch.full((2, 3), 7.0, dtype=torch.float64)}
        return {"state": {**state["state"], 0: entry}, "param_groups": groups}

    def post(opt: Any) -> None:
        seen.append(opt.state[params[0]]["exp_avg"].mean().item())
        opt.state[params[1]]["exp_avg"].fill_(3.0)

    optimizer.register_load_state_dict_pre_hook(pre)
    optimizer.register_load_state_dict_post_hook(post)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.state[params[0]]["exp_avg"].mean() == 7.0
    assert seen == [7.0]
    assert optimizer.state[params[1]]["exp_avg"].mean() == 3.0


def test_a_pre_hook_may_adapt_a_foreign_state() -> None:
    """What is refused as it stands may be made to fit by a hook, as in torch."""
    params = parameters()
    optimizer = torchopt.SGD(params, momentum=0.9)
    donor = torch.optim.SGD(twins(params), momentum=0.9)
    wrapped = {"optimizer": donor.state_dict()}
    with pytest.raises(ValueError, match="'state' and 'param_groups'"):
        optimizer.load_state_dict(wrapped)
    optimizer.register_load_state_dict_pre_hook(lambda opt, state: state["optimizer"])
    optimizer.load_state_dict(wrapped)
    assert optimizer.param_groups[0]["momentum"] == 0.9


@every_torch_case
def test_closures(case: Any) -> None:
    ours, theirs, p, q = pair(case)

    def closure_of(optimizer: Any, x: Any) -> Any:
        def closure() -> Tensor:
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            loss = (x[0] ** 4).sum() + (x[1] ** 2).sum()
            loss.backward()
            return loss

        return closure

    for _ in range(3):
        with torch.no_grad():
            loss = ours.step(closure_of(ours, p))
        expected = theirs.step(closure_of(theirs, q))
        assert_close(loss.detach(), expected.detach())
        assert_close(data(p), data(q), times=10)


def test_a_closure_may_return_anything() -> None:
    optimizer = torchopt.SGD(parameters())
    assert optimizer.step(lambda: 3.5) == 3.5
    assert optimizer.step(lambda: None) is None


# Keywords of torch.optim --------------------------------------------------------------------------


@every_torch_case
def test_foreach_and_fused_false_change_nothing(case: Any) -> None:
    for foreach in (None, True, False):
        p = parameters()
        q = twins(p)
        ours = case.cls(p, **case.kwargs, foreach=foreach, fused=False, capturable=False)
        assert_same_path(ours, case.torch_cls(q, **case.kwargs), p, q, steps=3)


@every_torch_case
def test_switches_that_cannot_be_met_say_what_to_do(case: Any) -> None:
    params = parameters()
    with pytest.raises(ValueError, match=rf"Meta{case.cls.__name__}.*inplace=False"):
        case.cls(params, differentiable=True)
    with pytest.raises(ValueError, match="capturable=False"):
        case.cls(params, capturable=True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
        case.cls(params, nonsense=1)


@every_case
def test_use_accelerated_op(case: Any) -> None:
    params = parameters()
    for value in (None, False):
        optimizer = case.cls(params, **case.kwargs, use_accelerated_op=value)
        assert optimizer.transformation == case.tx()
    for keywords in ({"use_accelerated_op": True}, {"fused": True}):
        if torchopt.accelerated_op_available():
            parts = case.cls(params, **keywords).transformation.parts
            assert all(part.use_accelerated_op for part in parts)
        else:
            with pytest.raises(RuntimeError, match=r"use_accelerated_op=True.*fused"):
                case.cls(params, **keywords)
    with pytest.raises(TypeError, match="use_accelerated_op must be None, True or False"):
        case.recipe(use_accelerated_op="yes")


# Company ------------------------------------------------------------------------------------------


@every_torch_case
def test_clip_grad_norm_before_step(case: Any) -> None:
    """Clipping by torch's utility and clipping in the chain are one and the same."""
    p = parameters()
    q = twins(p)
    ours = torchopt.Optimizer(p, torchopt.chain(torchopt.clip_grad_norm(0.5), case.tx()))
    theirs = case.cls(q, **case.kwargs)
    for _ in range(3):
        set_grads(p, q)
        assert torch.nn.utils.clip_grad_norm_(q, 0.5) > 0.5
        ours.step()
        theirs.step()
        assert_close(data(p), data(q), times=10)


def test_averaged_model() -> None:
    net = nn.Linear(3, 1).double()
    average = torch.optim.swa_utils.AveragedModel(net)
    optimizer = torchopt.SGD(net.parameters(), lr=0.1, momentum=0.9)
    path = []
    for _ in range(4):
        set_grads(list(net.parameters()))
        optimizer.step()
        average.update_parameters(net)
        path.append(net.weight.detach().clone())
    assert not torch.equal(path[0], path[1])
    assert_close(average.module.weight.detach(), torch.stack(path).mean(0), times=10)


@every_torch_case
def test_initialisation_as_in_distributed_checkpoints(case: Any) -> None:
    """Zero gradients, lr 0, one step, restore: the state is made and no parameter moves."""
    optimizer, _, params, _ = pair(case)
    before = [x.clone() for x in data(params)]
    for p in params:
        p.grad = torch.zeros_like(p)
    kept = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(0.0) if isinstance(group["lr"], Tensor) else 0.0
    optimizer.step(closure=None)
    for group, lr in zip(optimizer.param_groups, kept):
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    assert all(torch.equal(x, y) for x, y in zip(data(params), before))
    slots = set(case.tx().init(data(params)).slots)
    assert slots <= set(optimizer.state[params[0]])


@every_torch_case
def test_distributed_checkpoint_functions(case: Any) -> None:
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    net = nn.Linear(3, 2).double()
    optimizer = case.cls(net.parameters(), **case.kwargs)
    for _ in range(2):
        set_grads(list(net.parameters()))
        optimizer.step()
    saved = get_optimizer_state_dict(net, optimizer)
    twin = nn.Linear(3, 2).double()
    twin.load_state_dict(net.state_dict())
    other = case.cls(twin.parameters(), **case.kwargs)
    set_optimizer_state_dict(twin, other, saved)
    for _ in range(2):
        set_grads(list(net.parameters()), list(twin.parameters()))
        optimizer.step()
        other.step()
    assert_close(data(list(twin.parameters())), data(list(net.parameters())), times=10)


def test_training_lowers_the_loss_of_a_network() -> None:
    x, y = nonzero(32, 3), nonzero(32, 1)
    for case in TORCH_CASES:
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        optimizer = case.cls(net.parameters(), **{**case.kwargs, "weight_decay": 0.0})
        losses = []
        for _ in range(60):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(net(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.9 * losses[0], case.name


def test_profiler_names_the_step_after_the_class() -> None:
    params = parameters()
    optimizer = torchopt.AdamW(params)
    set_grads(params)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    assert "Optimizer.step#AdamW.step" in {event.key for event in profile.key_averages()}
