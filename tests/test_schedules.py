"""Schedules against closed forms and torch.optim.lr_scheduler, and in every face."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from conftest import nonzero
from tolerances import META_GRADIENT, assert_close, relative_error
from torch.optim import lr_scheduler

import torchopt
from torchopt import schedules


COUNTS = (*range(13), 20, 100, 10**6, 10**12)


def cos(x: float) -> float:
    return (1 + math.cos(math.pi * x)) / 2


def part(count: int, steps: int, begin: int = 0) -> float:
    return min(max((count - begin) / steps, 0.0), 1.0)


def warm(k: int) -> float:
    return k / 4 * 2.0 if k < 4 else 0.1 + (2.0 - 0.1) * cos(part(k - 4, 6))


SCHEDULES = {
    "constant": (schedules.constant(0.3), lambda k: 0.3),
    "linear": (schedules.linear(1.0, 0.2, 8), lambda k: 1.0 - 0.8 * part(k, 8)),
    "linear-rising-late": (
        schedules.linear(0.1, 0.9, 5, transition_begin=3),
        lambda k: 0.1 + 0.8 * part(k, 5, 3),
    ),
    "polynomial": (
        schedules.polynomial(1.0, 0.25, 3, 7, transition_begin=2),
        lambda k: 0.25 + 0.75 * (1 - part(k, 7, 2)) ** 3,
    ),
    "polynomial-root": (
        schedules.polynomial(2.0, 0.0, 0.5, 7),
        lambda k: 2.0 * (1 - part(k, 7)) ** 0.5,
    ),
    "exponential": (
        schedules.exponential_decay(2.0, 0.5, transition_begin=1, transition_steps=3),
        lambda k: 2.0 * 0.5 ** (max(k - 1, 0) / 3),
    ),
    "exponential-staircase": (
        schedules.exponential_decay(2.0, 0.5, transition_steps=3, staircase=True),
        lambda k: 2.0 * 0.5 ** (k // 3),
    ),
    "exponential-floor": (
        schedules.exponential_decay(2.0, 0.5, end_value=0.3),
        lambda k: max(2.0 * 0.5**k, 0.3),
    ),
    "exponential-ceiling": (
        schedules.exponential_decay(2.0, 1.5, end_value=9.0),
        lambda k: min(2.0 * 1.5 ** min(k, 50), 9.0),
    ),
    "cosine": (schedules.cosine_decay(2.0, 9), lambda k: 2.0 * cos(part(k, 9))),
    "cosine-alpha-exponent": (
        schedules.cosine_decay(2.0, 9, 0.1, 1.5),
        lambda k: 2.0 * (0.9 * cos(part(k, 9)) ** 1.5 + 0.1),
    ),
    "warmup_cosine": (schedules.warmup_cosine(0.0, 2.0, 4, 10, 0.1), warm),
    "piecewise_constant": (
        schedules.piecewise_constant(1.0, {6: 0.1, 3: 0.5}),
        lambda k: 1.0 if k < 3 else 0.5 if k < 6 else 0.05,
    ),
    "join": (
        schedules.join([schedules.linear(0.0, 1.0, 4), schedules.exponential_decay(1.0, 0.5)], [4]),
        lambda k: k / 4 if k < 4 else 0.5 ** (k - 4),
    ),
    "join-three": (
        schedules.join([schedules.constant(x) for x in (1.0, 2.0, 3.0)], [2, 7]),
        lambda k: 1.0 if k < 2 else 2.0 if k < 7 else 3.0,
    ),
}
every_schedule = pytest.mark.parametrize(
    ("schedule", "formula"), SCHEDULES.values(), ids=SCHEDULES.keys()
)


# Values -------------------------------------------------------------------------------------------


@every_schedule
def test_values_at_int_counts(schedule: Any, formula: Any) -> None:
    for count in COUNTS:
        value = schedule(count)
        assert isinstance(value, (int, float)), count
        assert value == pytest.approx(formula(count), rel=1e-12, abs=1e-15), count


@every_schedule
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float64], ids=str)
def test_values_at_tensor_counts(schedule: Any, formula: Any, dtype: torch.dtype) -> None:
    """An integer tensor gives float32, PyTorch's default; a float64 count gives float64."""
    precision = 1e-12 if dtype is torch.float64 else 1e-5
    for count in COUNTS:
        if dtype is not torch.float64 and count > 10**6:
            continue
        value = torch.as_tensor(schedule(torch.tensor(count, dtype=dtype)))
        assert value.dim() == 0
        assert value.item() == pytest.approx(formula(count), rel=precision, abs=1e-7), count


@every_schedule
def test_values_under_vmap(schedule: Any, formula: Any) -> None:
    counts = torch.arange(13)
    found = torch.func.vmap(lambda k: torch.as_tensor(schedule(k)) + 0 * k)(counts)
    for count in range(13):
        assert found[count].item() == pytest.approx(formula(count), rel=1e-5, abs=1e-7)


def test_growth_without_a_ceiling_ends_at_infinity() -> None:
    schedule = schedules.exponential_decay(1.0, 2.0)
    assert schedule(10) == 1024.0
    assert schedule(10**6) == math.inf
    assert schedule(torch.tensor(10**6)).item() == math.inf


def _torch_values(make: Any, steps: int = 14) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.7)
    scheduler = make(optimizer)
    values = []
    for _ in range(steps):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return values


TWINS = {
    "ConstantLR": (
        lambda o: lr_scheduler.ConstantLR(o, 0.5, 4),
        schedules.piecewise_constant(0.35, {4: 2.0}),
    ),
    "LinearLR": (
        lambda o: lr_scheduler.LinearLR(o, 0.25, 1.0, 6),
        schedules.linear(0.7 * 0.25, 0.7, 6),
    ),
    "PolynomialLR": (
        lambda o: lr_scheduler.PolynomialLR(o, 9, 2.0),
        schedules.polynomial(0.7, 0.0, 2.0, 9),
    ),
    "ExponentialLR": (
        lambda o: lr_scheduler.ExponentialLR(o, 0.8),
        schedules.exponential_decay(0.7, 0.8),
    ),
    "StepLR": (
        lambda o: lr_scheduler.StepLR(o, 3, 0.5),
        schedules.exponential_decay(0.7, 0.5, transition_steps=3, staircase=True),
    ),
    "MultiStepLR": (
        lambda o: lr_scheduler.MultiStepLR(o, [3, 7], 0.1),
        schedules.piecewise_constant(0.7, {3: 0.1, 7: 0.1}),
    ),
    "CosineAnnealingLR": (
        lambda o: lr_scheduler.CosineAnnealingLR(o, 13, eta_min=0.07),
        schedules.cosine_decay(0.7, 13, alpha=0.1),
    ),
    "SequentialLR": (
        lambda o: lr_scheduler.SequentialLR(
            o,
            [lr_scheduler.LinearLR(o, 0.5, 1.0, 4), lr_scheduler.ExponentialLR(o, 0.5)],
            [4],
        ),
        schedules.join(
            [schedules.linear(0.35, 0.7, 4), schedules.exponential_decay(0.7, 0.5)], [4]
        ),
    ),
}


@pytest.mark.filterwarnings("ignore:The epoch parameter")
@pytest.mark.parametrize(("make", "schedule"), TWINS.values(), ids=TWINS.keys())
def test_schedules_are_those_of_torch(make: Any, schedule: Any) -> None:
    expected = _torch_values(make)
    assert len(set(expected)) > 1
    assert [schedule(k) for k in range(14)] == pytest.approx(expected, rel=1e-10, abs=1e-14)


# Gradients ----------------------------------------------------------------------------------------

DIFFERENTIABLE = {
    "constant": (lambda v: schedules.constant(v[0]), 1),
    "linear": (lambda v: schedules.linear(v[0], v[1], 8), 2),
    "polynomial": (lambda v: schedules.polynomial(v[0], v[1], v[2], 8), 3),
    "exponential": (lambda v: schedules.exponential_decay(v[0], v[1], transition_steps=3), 2),
    "staircase": (
        lambda v: schedules.exponential_decay(v[0], v[1], transition_steps=3, staircase=True),
        2,
    ),
    "floor": (lambda v: schedules.exponential_decay(v[0], 0.8, end_value=0.2), 1),
    "cosine": (lambda v: schedules.cosine_decay(v[0], 9, v[1], v[2]), 3),
    "warmup_cosine": (lambda v: schedules.warmup_cosine(v[0], v[1], 3, 9, 0.1), 2),
    "piecewise": (lambda v: schedules.piecewise_constant(v[0], {2: v[1], 5: v[2]}), 3),
    "join": (
        lambda v: schedules.join([schedules.constant(v[0]), schedules.linear(v[1], v[2], 4)], [3]),
        3,
    ),
}


@pytest.mark.parametrize("kind", ["int-count", "tensor-count"])
@pytest.mark.parametrize("make", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE.keys())
def test_tensor_values_receive_gradients(make: Any, kind: str) -> None:
    build, number = make
    start = torch.tensor([0.7, 0.9, 1.3], dtype=torch.float64)[:number].requires_grad_()

    def total(values: Any) -> Any:
        schedule = build(values)
        counts = range(12)
        if kind == "tensor-count":
            counts = [torch.tensor(k, dtype=torch.float64) for k in counts]
        return sum((1 + int(k)) * schedule(k) for k in counts)

    (found,) = torch.autograd.grad(total(start), start)
    h, rows = 1e-6, torch.eye(number, dtype=torch.float64)
    point = start.detach()
    expected = torch.stack([(total(point + h * e) - total(point - h * e)) / (2 * h) for e in rows])
    assert (expected.abs() > 1e-3).all()
    assert relative_error(found, expected) < META_GRADIENT


def test_gradients_flow_through_a_scheduled_update() -> None:
    peak = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    tx = torchopt.sgd(schedules.linear(peak, 0.0, 4))
    p, g = nonzero(3), nonzero(3)
    state, params = tx.init(p), p
    for _ in range(4):
        updates, state = tx.update(g, state, params, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)
    (found,) = torch.autograd.grad(params.sum(), peak)
    assert_close(found, -(1 + 0.75 + 0.5 + 0.25) * g.sum())


# Bad arguments --------------------------------------------------------------------------------

BAD = {
    "no-steps": (lambda: schedules.linear(1.0, 0.0, 0), "transition_steps.*>= 1, got 0"),
    "float-steps": (lambda: schedules.linear(1.0, 0.0, 2.0), "transition_steps.*integer"),
    "bool-steps": (lambda: schedules.linear(1.0, 0.0, True), "transition_steps.*integer"),
    "late": (lambda: schedules.linear(1.0, 0.0, 2, -1), "transition_begin.*>= 0"),
    "polynomial": (lambda: schedules.polynomial(1.0, 0.0, 2, -3), "transition_steps"),
    "rate-zero": (lambda: schedules.exponential_decay(1.0, 0.0), "decay_rate must be > 0"),
    "rate-negative": (lambda: schedules.exponential_decay(1.0, -0.5), "decay_rate must be > 0"),
    "rate-nan": (lambda: schedules.exponential_decay(1.0, math.nan), "decay_rate must be > 0"),
    "exponential-steps": (
        lambda: schedules.exponential_decay(1.0, 0.5, transition_steps=0),
        "transition_steps",
    ),
    "tensor-rate-with-end": (
        lambda: schedules.exponential_decay(1.0, torch.tensor(0.5), end_value=0.1),
        "end_value needs a decay_rate that is a number",
    ),
    "cosine": (lambda: schedules.cosine_decay(1.0, 0), "decay_steps"),
    "warmup": (lambda: schedules.warmup_cosine(0.0, 1.0, -1, 4), "warmup_steps.*>= 0"),
    "warmup-longer": (lambda: schedules.warmup_cosine(0.0, 1.0, 4, 4), "decay_steps.*>= 5"),
    "boundary": (lambda: schedules.piecewise_constant(1.0, {-1: 0.5}), "boundary.*>= 0, got -1"),
    "boundary-float": (lambda: schedules.piecewise_constant(1.0, {0.5: 0.5}), "boundary"),
    "join-number": (
        lambda: schedules.join([schedules.constant(1.0)], [1]),
        "one boundary fewer than schedules, got 1 schedules and 1 boundaries",
    ),
    "join-none": (lambda: schedules.join([], []), "one boundary fewer"),
    "join-order": (
        lambda: schedules.join([schedules.constant(1.0)] * 3, [4, 2]),
        r"boundaries must increase, got \[4, 2\]",
    ),
    "join-equal": (lambda: schedules.join([schedules.constant(1.0)] * 3, [2, 2]), "must increase"),
}


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD.keys())
def test_bad_arguments_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# Printing, comparing, copying ---------------------------------------------------------------------


@every_schedule
def test_schedules_print_compare_and_copy(schedule: Any, formula: Any) -> None:
    for new in (pickle.loads(pickle.dumps(schedule)), copy.deepcopy(schedule)):
        assert new == schedule
        assert repr(new) == repr(schedule)
        assert new(5) == schedule(5)
    rebuilt = eval(repr(schedule), dict(vars(schedules)))
    assert rebuilt == schedule
    with pytest.raises(AttributeError, match="cannot assign"):
        setattr(schedule, next(iter(schedule.__dataclass_fields__)), 1)


@every_schedule
def test_schedules_hash(schedule: Any, formula: Any) -> None:
    assert hash(copy.deepcopy(schedule)) == hash(schedule)


def test_repr() -> None:
    assert repr(schedules.constant(0.1)) == "constant(value=0.1)"
    assert repr(schedules.linear(1.0, 0.0, 5)) == (
        "polynomial(init_value=1.0, end_value=0.0, power=1, transition_steps=5, transition_begin=0)"
    )


def test_names_of_torchopt_and_optax() -> None:
    assert torchopt.linear_schedule is schedules.linear
    assert torchopt.polynomial_schedule is schedules.polynomial
    assert torchopt.exponential_decay is schedules.exponential_decay
    assert torchopt.schedule is torchopt.schedules is schedules
    for name in ("constant_schedule", "cosine_decay_schedule", "warmup_cosine_decay_schedule"):
        assert callable(getattr(schedules, name))
    assert schedules.join_schedules is schedules.join


# In the faces -------------------------------------------------------------------------------------

LR = schedules.join([schedules.linear(0.2, 0.1, 2), schedules.exponential_decay(0.1, 0.5)], [2])


def expected_path(p: torch.Tensor, grads: list[torch.Tensor]) -> torch.Tensor:
    return p - sum(LR(k) * g for k, g in enumerate(grads))


def test_schedule_as_lr_in_the_functional_face() -> None:
    p, grads = nonzero(3), [nonzero(3) for _ in range(5)]
    expected = expected_path(p, grads)
    tx = torchopt.sgd(LR)
    state = tx.init(p)
    for g in grads:
        updates, state = tx.update(g, state, p)
        p = torchopt.apply_updates(p, updates)
    assert_close(p, expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torchopt.SGD([p], lr=LR),
        lambda p: torchopt.Optimizer([p], torchopt.sgd(LR)),
        lambda p: torchopt.Optimizer(
            [p], torchopt.chain(torchopt.scale_by_schedule(LR), torchopt.scale(-1.0))
        ),
        lambda p: torchopt.SGD([{"params": [p], "lr": LR}], lr=0.5),
        lambda p: torchopt.SGD([("name", p)], lr={"name": LR}),
        lambda p: torchopt.SGD([p], lr=[LR]),
        lambda p: torchopt.Optimizer(
            [p], torchopt.chain(torchopt.masked(torchopt.scale(LR), True), torchopt.scale(-1.0))
        ),
    ],
    ids=["SGD", "Optimizer", "scale_by_schedule", "group", "lr-by-name", "lr-in-a-list", "masked"],
)
def test_schedule_as_lr_in_the_object_oriented_face(make: Any) -> None:
    p, grads = torch.nn.Parameter(nonzero(3)), [nonzero(3) for _ in range(5)]
    expected = expected_path(p.detach().clone(), grads)
    optimizer = make(p)
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
    assert_close(p.detach(), expected)


def test_schedule_as_lr_in_the_differentiable_face() -> None:
    net = torch.nn.Linear(3, 1, bias=False).double()
    start, grads = net.weight.detach().clone(), [nonzero(1, 3) for _ in range(5)]
    optimizer = torchopt.MetaSGD(net, lr=LR)
    for g in grads:
        optimizer.step((net.weight * g).sum())
    assert_close(net.weight.detach(), expected_path(start, grads))


def test_schedule_goes_on_after_loading() -> None:
    """The count is part of the state, also where the rule does not read it."""
    p, grads = torch.nn.Parameter(nonzero(3)), [nonzero(3) for _ in range(5)]
    expected = expected_path(p.detach().clone(), grads)
    optimizer = torchopt.SGD([p], lr=LR)
    for k, g in enumerate(grads):
        if k == 3:
            state = optimizer.state_dict()
            optimizer = torchopt.SGD([p], lr=LR)
            optimizer.load_state_dict(state)
        p.grad = g.clone()
        optimizer.step()
    assert_close(p.detach(), expected)


@pytest.mark.parametrize("face", ["functional", "object-oriented"])
def test_schedules_as_momentum_and_betas(face: str) -> None:
    """The scheduled values are those of torch.optim whose groups are changed before each step."""
    rise = schedules.linear(0.5, 0.9, 4)
    pairs = {
        "momentum": (torchopt.SGD, torchopt.sgd, torch.optim.SGD, {"momentum": rise}),
        "betas": (torchopt.Adam, torchopt.adam, torch.optim.Adam, {"betas": (rise, 0.99)}),
        "weight_decay": (torchopt.AdamW, torchopt.adamw, torch.optim.AdamW, {"weight_decay": rise}),
    }
    for name, (cls, recipe, theirs, options) in pairs.items():
        p = torch.nn.Parameter(nonzero(3))
        q = torch.nn.Parameter(p.detach().clone())
        their_optimizer = theirs([q], lr=0.1, **({"momentum": 0.5} if name == "momentum" else {}))
        tx = recipe(lr=0.1, **options)
        optimizer, state = cls([p], lr=0.1, **options), tx.init(p)
        for count in range(6):
            g = nonzero(3)
            group = their_optimizer.param_groups[0]
            group[name] = (rise(count), 0.99) if name == "betas" else rise(count)
            q.grad, p.grad = g.clone(), g.clone()
            their_optimizer.step()
            if face == "functional":
                updates, state = tx.update(g, state, p)
                torchopt.apply_updates(p, updates)
            else:
                optimizer.step()
            assert_close(p.detach(), q.detach(), times=10, what=name)


def test_a_schedule_sees_the_count_as_an_int_from_zero() -> None:
    seen: list[Any] = []

    def schedule(count: Any) -> float:
        seen.append(count)
        return 0.1

    p = torch.nn.Parameter(nonzero(2))
    optimizer = torchopt.Adam([p], lr=schedule)
    for _ in range(3):
        p.grad = nonzero(2)
        optimizer.step()
    # param_groups shows the rate of the next step, and each step asks again
    assert seen == sorted(seen)
    assert set(seen) == {0, 1, 2, 3}
    assert all(type(count) is int for count in seen)
    seen.clear()
    tx = torchopt.sgd(schedule)
    state = tx.init([p])
    initial = len(seen)
    for _ in range(3):
        _, state = tx.update([nonzero(2)], state)
    assert seen[initial:] == [0, 1, 2]
