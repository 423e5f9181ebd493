"""Hooks, closures and schedulers of ``torch.optim``, and what works with its optimizers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Case, every, every_torch_case, kind, named
from stepping import assert_same_path, data, pair, parameters, set_grads, twins
from tolerances import assert_close
from torch import Tensor
from torch.optim import lr_scheduler

import torchopt


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


@pytest.mark.sampled(3)
@pytest.mark.filterwarnings("ignore:The epoch parameter")
@every(lambda case: case.torch_cls, each=kind, beside_torch=True)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name: str, case: Case) -> None:
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
        assert all(len(set(cycled)) > 2 for cycled in zip(*seen) if cycled[0] is not None)
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
    ours, theirs, p, q = pair(named("sgd-momentum-dampening-decay"), momentum=0.0, dampening=0.0)

    def after(optimizer: Any, k: int) -> None:
        optimizer.param_groups[0]["momentum"] = 0.0 if k < 2 else 0.9

    assert_same_path(ours, theirs, p, q, after)


# Hooks and closures -------------------------------------------------------------------------------


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
def test_closures(case: Case) -> None:
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
