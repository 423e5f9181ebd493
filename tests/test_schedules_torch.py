"""Schedules that are those of torch.optim.lr_scheduler: step by step, in derivatives, copied."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from tolerances import META_GRADIENT, relative_error
from torch.optim import lr_scheduler

import torchopt
from torchopt import schedules


STEPS = 23
BASE = 0.7

#: Each schedule as a function of its tensors, those, and torch's scheduler for an optimizer whose
#: learning rate is the first of them.
TWINS: dict[str, Any] = {
    "constant_lr": (
        lambda a, f: schedules.constant_lr(a, f, 6),
        (BASE, 0.4),
        lambda o: lr_scheduler.ConstantLR(o, 0.4, 6),
    ),
    "linear_lr": (
        lambda a, s, e: schedules.linear_lr(a, s, e, 7),
        (BASE, 0.2, 0.9),
        lambda o: lr_scheduler.LinearLR(o, 0.2, 0.9, 7),
    ),
    "polynomial_lr": (
        lambda a, p: schedules.polynomial_lr(a, 9, p),
        (BASE, 1.7),
        lambda o: lr_scheduler.PolynomialLR(o, 9, 1.7),
    ),
    "exponential_lr": (
        lambda a, g: schedules.exponential_lr(a, g),
        (BASE, 0.9),
        lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    ),
    "step_lr": (
        lambda a, g: schedules.step_lr(a, 4, g),
        (BASE, 0.6),
        lambda o: lr_scheduler.StepLR(o, 4, 0.6),
    ),
    "multi_step_lr": (
        lambda a, g: schedules.multi_step_lr(a, [9, 3, 9, 12], g),
        (BASE, 0.6),
        lambda o: lr_scheduler.MultiStepLR(o, [9, 3, 9, 12], 0.6),
    ),
    "cosine_annealing_lr": (
        lambda a, b: schedules.cosine_annealing_lr(a, 7, b),
        (BASE, 0.05),
        lambda o: lr_scheduler.CosineAnnealingLR(o, 7, 0.05),
    ),
    "cosine_annealing_warm_restarts": (
        lambda a, b: schedules.cosine_annealing_warm_restarts(a, 5, eta_min=b),
        (BASE, 0.05),
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5, eta_min=0.05),
    ),
    "cosine_annealing_warm_restarts-longer": (
        lambda a, b: schedules.cosine_annealing_warm_restarts(a, 3, 2, b),
        (BASE, 0.05),
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, 2, 0.05),
    ),
    "cyclic_lr": (
        lambda a, b: schedules.cyclic_lr(a, b, 3),
        (0.1, 0.8),
        lambda o: lr_scheduler.CyclicLR(o, 0.1, 0.8, 3, cycle_momentum=False),
    ),
    "cyclic_lr-triangular2": (
        lambda a, b: schedules.cyclic_lr(a, b, 3, 5, "triangular2"),
        (0.1, 0.8),
        lambda o: lr_scheduler.CyclicLR(o, 0.1, 0.8, 3, 5, "triangular2", cycle_momentum=False),
    ),
    "cyclic_lr-exp_range": (
        lambda a, b, g: schedules.cyclic_lr(a, b, 4, 2, "exp_range", g),
        (0.1, 0.8, 0.9),
        lambda o: lr_scheduler.CyclicLR(o, 0.1, 0.8, 4, 2, "exp_range", 0.9, cycle_momentum=False),
    ),
    "one_cycle_lr": (
        lambda a, d, f: schedules.one_cycle_lr(a, 24, 0.3, "cos", d, f),
        (0.8, 5.0, 20.0),
        lambda o: lr_scheduler.OneCycleLR(
            o, 0.8, 24, div_factor=5.0, final_div_factor=20.0, cycle_momentum=False
        ),
    ),
    "one_cycle_lr-linear-three": (
        lambda a, d, f: schedules.one_cycle_lr(a, 24, 0.4, "linear", d, f, True),
        (0.8, 5.0, 20.0),
        lambda o: lr_scheduler.OneCycleLR(
            *(o, 0.8, 24),
            pct_start=0.4,
            anneal_strategy="linear",
            div_factor=5.0,
            final_div_factor=20.0,
            three_phase=True,
            cycle_momentum=False,
        ),
    ),
    "one_cycle_lr-no-rise": (
        lambda a, d, f: schedules.one_cycle_lr(a, 24, 0.0, "linear", d, f),
        (0.8, 5.0, 20.0),
        lambda o: lr_scheduler.OneCycleLR(
            *(o, 0.8, 24),
            pct_start=0.0,
            anneal_strategy="linear",
            div_factor=5.0,
            final_div_factor=20.0,
            cycle_momentum=False,
        ),
    ),
}
every_twin = pytest.mark.parametrize("name", TWINS)


def numbers(name: str) -> Any:
    build, values, _ = TWINS[name]
    return build(*values)


def values_in_groups(make: Any, what: str = "lr", **options: Any) -> list[float]:
    param = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([param], lr=BASE, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = make(optimizer)
        found = []
        for _ in range(STEPS):
            found.append(optimizer.param_groups[0][what])
            optimizer.step()
            scheduler.step()
    return found


@every_twin
def test_values_are_those_in_torch_s_group(name: str) -> None:
    expected = values_in_groups(TWINS[name][2])
    assert len(set(expected)) > 1
    schedule = numbers(name)
    assert [schedule(k) for k in range(STEPS)] == pytest.approx(expected, rel=1e-12, abs=1e-15)


MOMENTA: dict[str, Any] = {
    "one_cycle": (
        schedules.one_cycle_momentum(24, 0.8, 0.95, 0.4, "linear"),
        lambda o: lr_scheduler.OneCycleLR(
            *(o, 0.8, 24),
            pct_start=0.4,
            anneal_strategy="linear",
            base_momentum=0.8,
            max_momentum=0.95,
        ),
    ),
    "one_cycle-three": (
        schedules.one_cycle_momentum(24, 0.8, 0.95, three_phase=True),
        lambda o: lr_scheduler.OneCycleLR(
            o, 0.8, 24, three_phase=True, base_momentum=0.8, max_momentum=0.95
        ),
    ),
    "cyclic": (
        schedules.cyclic_lr(0.9, 0.6, 4, 2, "triangular2"),
        lambda o: lr_scheduler.CyclicLR(
            o, 0.1, 0.8, 4, 2, "triangular2", base_momentum=0.6, max_momentum=0.9
        ),
    ),
}


@pytest.mark.parametrize(("schedule", "make"), MOMENTA.values(), ids=MOMENTA.keys())
def test_momenta_are_those_in_torch_s_group(schedule: Any, make: Any) -> None:
    expected = values_in_groups(make, "momentum", momentum=0.5)
    assert len(set(expected)) > 1
    assert [schedule(k) for k in range(STEPS)] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("scale_mode", ["cycle", "iterations"])
def test_cyclic_lr_with_a_scale_of_one_s_own(scale_mode: str) -> None:
    options = {"scale_fn": lambda x: 1 / (1 + x), "scale_mode": scale_mode}
    expected = values_in_groups(
        lambda o: lr_scheduler.CyclicLR(o, 0.1, 0.8, 3, cycle_momentum=False, **options)
    )
    schedule = schedules.cyclic_lr(0.1, 0.8, 3, **options)
    assert [schedule(k) for k in range(STEPS)] == pytest.approx(expected, rel=1e-12)


def test_defaults_are_torch_s() -> None:
    pairs = [
        (schedules.constant_lr(BASE), lr_scheduler.ConstantLR),
        (schedules.linear_lr(BASE), lr_scheduler.LinearLR),
        (schedules.polynomial_lr(BASE), lr_scheduler.PolynomialLR),
        (schedules.step_lr(BASE, 3), lambda o: lr_scheduler.StepLR(o, 3)),
        (schedules.multi_step_lr(BASE, [3]), lambda o: lr_scheduler.MultiStepLR(o, [3])),
        (
            schedules.cosine_annealing_lr(BASE, 3),
            lambda o: lr_scheduler.CosineAnnealingLR(o, 3),
        ),
        (
            schedules.cyclic_lr(0.1, 0.5),
            lambda o: lr_scheduler.CyclicLR(o, 0.1, 0.5, cycle_momentum=False),
        ),
        (
            schedules.one_cycle_lr(0.5, 30),
            lambda o: lr_scheduler.OneCycleLR(o, 0.5, 30, cycle_momentum=False),
        ),
        (
            schedules.one_cycle_momentum(30),
            lambda o: lr_scheduler.OneCycleLR(o, 0.5, 30),
        ),
    ]
    for schedule, make in pairs:
        what = "momentum" if isinstance(schedule, schedules.one_cycle_momentum) else "lr"
        expected = values_in_groups(make, what, momentum=0.5)
        found = [schedule(k) for k in range(STEPS)]
        assert found == pytest.approx(expected, rel=1e-12, abs=1e-15), schedule


# Tensors ------------------------------------------------------------------------------------------


@every_twin
def test_tensor_counts(name: str) -> None:
    schedule = numbers(name)
    expected = [schedule(k) for k in range(STEPS)]
    counts = torch.arange(STEPS)
    for k in range(STEPS):
        value = torch.as_tensor(schedule(counts[k]))
        assert value.dim() == 0
        assert value.item() == pytest.approx(expected[k], rel=1e-12, abs=1e-15)
    found = torch.func.vmap(lambda k: torch.as_tensor(schedule(k)) + 0 * k)(counts)
    assert found.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("kind", ["int-count", "tensor-count"])
@every_twin
def test_derivatives_in_the_schedule_s_own_tensors(name: str, kind: str) -> None:
    build, values, _ = TWINS[name]
    start = torch.tensor(values, dtype=torch.float64, requires_grad=True)

    def total(schedule: Any) -> Any:
        tensors = kind == "tensor-count"
        counts = [torch.tensor(k) if tensors else k for k in range(STEPS)]
        return sum((1 + int(k)) * schedule(k) ** 2 for k in counts)

    schedule = build(*start.unbind())
    (found,) = torch.autograd.grad(total(schedule), start, retain_graph=True)
    h, rows = 1e-6, torch.eye(len(values), dtype=torch.float64)
    at = [[total(build(*(start.detach() + s * h * e))) for s in (1, -1)] for e in rows]
    expected = torch.stack([(up - down) / (2 * h) for up, down in at])
    assert (expected.abs() > 1e-4).all()
    assert relative_error(found, expected) < META_GRADIENT


SEVERAL: dict[str, Any] = {
    **{name: build for name, (build, _, _) in TWINS.items()},
    "warmup_cosine": lambda a, b, c: schedules.warmup_cosine(a, b, 3, 9, c),
    "cosine_onecycle": lambda a, b, c: schedules.cosine_onecycle(9, a, 0.3, b, c),
    "piecewise": lambda a, b, c: schedules.piecewise_interpolate("linear", a, {3: b, 5: c}),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_a_schedule_is_used_for_several_backward_passes(name: str) -> None:
    """What is computed where a schedule is made would belong to the first of them."""
    build = SEVERAL[name]
    tensors = [torch.tensor(x, requires_grad=True) for x in (0.5, 0.7, 0.9)]
    schedule = build(*tensors[: build.__code__.co_argcount])
    for k in (2, 4, 2):
        torch.as_tensor(schedule(k)).backward()
    assert tensors[0].grad is not None


# Copies and bad arguments -------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*TWINS, *MOMENTA])
def test_schedules_print_compare_and_copy(name: str) -> None:
    schedule = numbers(name) if name in TWINS else MOMENTA[name][0]
    for new in (pickle.loads(pickle.dumps(schedule)), copy.deepcopy(schedule)):
        assert new == schedule
        assert hash(new) == hash(schedule)
        assert new(5) == schedule(5)
    assert eval(repr(schedule), dict(vars(schedules))) == schedule


def test_as_hyperparameters_of_a_transformation() -> None:
    """Peak learning rate and momentum of one cycle, both learned, in the differentiable face."""
    peak, low = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.3, 0.6))

    def trained(peak: Any, low: Any) -> torch.Tensor:
        rate = schedules.one_cycle_lr(peak, 5, 0.4, "linear", 4.0, 10.0)
        tx = torchopt.sgd(rate, momentum=schedules.one_cycle_momentum(5, low, 0.9, 0.4))
        params = torch.tensor([1.0, -2.0], dtype=torch.float64)
        state = tx.init(params)
        for _ in range(5):
            params, state = tx.apply_gradients(params.sin(), state, params, inplace=False)
        return params.square().sum()

    found = torch.autograd.grad(trained(peak, low), (peak, low))
    h, x, y = 1e-6, peak.item(), low.item()
    expected = [
        (trained(x + h, y) - trained(x - h, y)) / (2 * h),
        (trained(x, y + h) - trained(x, y - h)) / (2 * h),
    ]
    assert relative_error(torch.stack(found), torch.stack(expected)) < META_GRADIENT


BAD = {
    "constant": (lambda: schedules.constant_lr(1.0, 0.5, 0), "total_iters must be an integer >= 1"),
    "linear": (lambda: schedules.linear_lr(1.0, total_iters=-2), "total_iters"),
    "polynomial": (lambda: schedules.polynomial_lr(1.0, 0), "total_iters"),
    "exponential": (lambda: schedules.exponential_lr(1.0, 0.0), "decay_rate must be > 0"),
    "step": (lambda: schedules.step_lr(1.0, 0), "step_size must be an integer >= 1, got 0"),
    "milestone": (lambda: schedules.multi_step_lr(1.0, [3, -1]), "milestone.*>= 0, got -1"),
    "T_max": (lambda: schedules.cosine_annealing_lr(1.0, 0), "T_max"),
    "T_0": (lambda: schedules.cosine_annealing_warm_restarts(1.0, 0), "T_0"),
    "T_mult": (lambda: schedules.cosine_annealing_warm_restarts(1.0, 2, 0), "T_mult"),
    "up": (lambda: schedules.cyclic_lr(0.0, 1.0, 0), "step_size_up"),
    "down": (lambda: schedules.cyclic_lr(0.0, 1.0, 2, 0), "step_size_down"),
    "mode": (lambda: schedules.cyclic_lr(0.0, 1.0, 2, mode="saw"), "mode must be 'triangular' or"),
    "scale_mode": (lambda: schedules.cyclic_lr(0.0, 1.0, scale_mode="x"), "scale_mode must be"),
    "total_steps": (lambda: schedules.one_cycle_lr(1.0, 1), "total_steps must be an integer >= 2"),
    "pct": (lambda: schedules.one_cycle_lr(1.0, 9, 1.5), "pct_start must be a number >= 0 and <="),
    "strategy": (
        lambda: schedules.one_cycle_momentum(9, anneal_strategy="cosine"),
        "anneal_strategy must be 'cos' or 'linear', got 'cosine'",
    ),
}


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD.keys())
def test_bad_arguments_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
