"""Schedules against Optax 0.2.8 (jax 0.10.2, JAX_ENABLE_X64=1).

The numbers are ``[float(schedule(k)) for k in range(12)]`` of the call that stands above each, with
``from optax import *``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tolerances import META_GRADIENT, relative_error

from torchopt import schedules


OPTAX: dict[str, tuple[Any, tuple[float, ...], list[float]]] = {
    # warmup_constant_schedule(0.1, 0.7, 4)
    "warmup_constant": (
        lambda a, b: schedules.warmup_constant(a, b, 4),
        (0.1, 0.7),
        [
            0.09999999999999998,
            0.25,
            0.39999999999999997,
            0.5499999999999999,
            0.7,
            0.7,
            0.7,
            0.7,
            0.7,
            0.7,
            0.7,
            0.7,
        ],
    ),
    # warmup_cosine_decay_schedule(0.1, 0.7, 3, 9, 0.05, 1.5)
    "warmup_cosine": (
        lambda a, b, c, q: schedules.warmup_cosine(a, b, 3, 9, c, q),
        (0.1, 0.7, 0.05, 1.5),
        [
            0.09999999999999998,
            0.29999999999999993,
            0.49999999999999994,
            0.7,
            0.6357936922587348,
            0.4721873843449138,
            0.279809703885628,
            0.13125000000000006,
            0.061269432544664895,
            0.05,
            0.05,
            0.05,
        ],
    ),
    # warmup_exponential_decay_schedule(0.1, 0.7, 3, 2, 0.6, 1, False, 0.2)
    "warmup_exponential_decay": (
        lambda a, b: schedules.warmup_exponential_decay(a, b, 3, 2, 0.6, 1, False, 0.2),
        (0.1, 0.7),
        [
            0.09999999999999998,
            0.29999999999999993,
            0.49999999999999994,
            0.7,
            0.7,
            0.5422176684690383,
            0.42,
            0.325330601081423,
            0.252,
            0.2,
            0.2,
            0.2,
        ],
    ),
    # warmup_exponential_decay_schedule(0.1, 0.7, 3, 2, 0.6, 1, True)
    "warmup_exponential_decay-staircase": (
        lambda a, b, r: schedules.warmup_exponential_decay(a, b, 3, 2, r, 1, True),
        (0.1, 0.7, 0.6),
        [
            0.09999999999999998,
            0.29999999999999993,
            0.49999999999999994,
            0.7,
            0.7,
            0.7,
            0.42,
            0.42,
            0.252,
            0.252,
            0.15119999999999997,
            0.15119999999999997,
        ],
    ),
    # cosine_onecycle_schedule(10, 0.7, 0.35, 5.0, 20.0)
    "cosine_onecycle": (
        lambda a, d, f: schedules.cosine_onecycle(10, a, 0.35, d, f),
        (0.7, 5.0, 20.0),
        [
            0.14,
            0.28,
            0.5599999999999999,
            0.7,
            0.6656857127281881,
            0.5695392163440511,
            0.4306035036158629,
            0.27639649638413705,
            0.13746078365594885,
            0.0413142872718118,
            0.006999999999999999,
            0.006999999999999999,
        ],
    ),
    # linear_onecycle_schedule(10, 0.7, 0.35, 0.75, 5.0, 20.0)
    "linear_onecycle": (
        lambda a, d, f: schedules.linear_onecycle(10, a, 0.35, 0.75, d, f),
        (0.7, 5.0, 20.0),
        [
            0.13999999999999999,
            0.32666666666666666,
            0.5133333333333333,
            0.7,
            0.5599999999999999,
            0.42,
            0.28,
            0.13999999999999999,
            0.09566666666666666,
            0.05133333333333334,
            0.006999999999999999,
            0.006999999999999999,
        ],
    ),
    # cosine_onecycle_schedule(10, 0.7, 0.05, 5.0, 20.0)
    "cosine_onecycle-no-rise": (
        lambda a, d, f: schedules.cosine_onecycle(10, a, 0.05, d, f),
        (0.7, 5.0, 20.0),
        [
            0.7,
            0.6830410828962707,
            0.6338243885509193,
            0.5571675899193419,
            0.46057438855091926,
            0.3535,
            0.24642561144908073,
            0.1498324100806581,
            0.07317561144908075,
            0.0239589171037293,
            0.006999999999999999,
            0.006999999999999999,
        ],
    ),
    # piecewise_interpolate_schedule("linear", 0.7, {3: 0.5, 8: 1.7})
    "piecewise_interpolate-linear": (
        lambda a, b, c: schedules.piecewise_interpolate("linear", a, {8: c, 3: b}),
        (0.7, 0.5, 1.7),
        [
            0.7,
            0.5833333333333333,
            0.4666666666666667,
            0.35,
            0.39899999999999997,
            0.44799999999999995,
            0.497,
            0.546,
            0.595,
            0.595,
            0.595,
            0.595,
        ],
    ),
    # piecewise_interpolate_schedule("cosine", 0.7, {3: 0.5, 8: 1.7})
    "piecewise_interpolate-cosine": (
        lambda a, b, c: schedules.piecewise_interpolate("cosine", a, {8: c, 3: b}),
        (0.7, 0.5, 1.7),
        [
            0.7,
            0.6124999999999999,
            0.4375,
            0.35,
            0.3733954181890689,
            0.4346454181890689,
            0.510354581810931,
            0.571604581810931,
            0.595,
            0.595,
            0.595,
            0.595,
        ],
    ),
    # sgdr_schedule([dict(init_value=0.1, peak_value=0.7, warmup_steps=1, decay_steps=4),
    # dict(init_value=0.2, peak_value=0.5, warmup_steps=2, decay_steps=6, end_value=0.05)])
    "sgdr": (
        lambda a, b, c: schedules.sgdr(
            [
                {"init_value": 0.1, "peak_value": a, "warmup_steps": 1, "decay_steps": 4},
                {
                    "init_value": 0.2,
                    "peak_value": b,
                    "warmup_steps": 2,
                    "decay_steps": 6,
                    "end_value": c,
                },
            ]
        ),
        (0.7, 0.5, 0.05),
        [
            0.09999999999999998,
            0.7,
            0.5249999999999999,
            0.17500000000000007,
            0.2,
            0.35,
            0.5,
            0.4340990257669732,
            0.275,
            0.11590097423302682,
            0.05,
            0.05,
        ],
    ),
    # join_schedules([optax.constant_schedule(0.3), optax.exponential_decay(0.7, 2, 0.5),
    # optax.polynomial_schedule(0.6, 0.1, 3.0, 4)], [2, 6])
    "join": (
        lambda a, b, c: schedules.join(
            [
                schedules.constant(a),
                schedules.exponential_decay(b, 0.5, 0, 2),
                schedules.polynomial(0.6, c, 3.0, 4),
            ],
            [2, 6],
        ),
        (0.3, 0.7, 0.1),
        [
            0.3,
            0.3,
            0.7,
            0.4949747468305833,
            0.35,
            0.24748737341529164,
            0.6,
            0.3109375,
            0.1625,
            0.1078125,
            0.1,
            0.1,
        ],
    ),
    # piecewise_constant_schedule(0.7, {3: 0.5, 8: 0.1})
    "piecewise_constant": (
        lambda a, b, c: schedules.piecewise_constant(a, {3: b, 8: c}),
        (0.7, 0.5, 0.1),
        [
            0.7,
            0.7,
            0.7,
            0.35,
            0.35,
            0.35,
            0.35,
            0.35,
            0.034999999999999996,
            0.034999999999999996,
            0.034999999999999996,
            0.034999999999999996,
        ],
    ),
    # cosine_decay_schedule(0.7, 8, 0.1, 1.5)
    "cosine_decay": (
        lambda a, b, q: schedules.cosine_decay(a, 8, b, q),
        (0.7, 0.1, 1.5),
        [
            0.7,
            0.6643775089281773,
            0.5668057197090846,
            0.4321426660954124,
            0.29273863607376244,
            0.17803325343825327,
            0.10530689542197726,
            0.07467786545203325,
            0.06999999999999999,
            0.06999999999999999,
            0.06999999999999999,
            0.06999999999999999,
        ],
    ),
}
every_row = pytest.mark.parametrize(
    ("build", "values", "expected"), OPTAX.values(), ids=OPTAX.keys()
)


@every_row
def test_values_are_those_of_optax(build: Any, values: Any, expected: list[float]) -> None:
    schedule = build(*values)
    assert [schedule(k) for k in range(12)] == pytest.approx(expected, rel=1e-12)
    found = [torch.as_tensor(schedule(torch.tensor(k))).item() for k in range(12)]
    assert found == pytest.approx(expected, rel=1e-12)


@every_row
def test_derivatives_in_all_values(build: Any, values: Any, expected: list[float]) -> None:
    start = torch.tensor(values, dtype=torch.float64, requires_grad=True)

    def total(values: Any) -> Any:
        schedule = build(*values)
        return sum((1 + k) * schedule(k) ** 2 for k in range(12))

    (found,) = torch.autograd.grad(total(start.unbind()), start)
    h, rows = 1e-6, torch.eye(len(values), dtype=torch.float64)
    at = [[total(start.detach() + sign * h * row) for sign in (1, -1)] for row in rows]
    wanted = torch.stack([(up - down) / (2 * h) for up, down in at])
    assert (wanted.abs() > 1e-4).all()
    assert relative_error(found, wanted) < META_GRADIENT


def test_names_of_optax() -> None:
    names = {
        *("constant_schedule", "linear_schedule", "polynomial_schedule", "exponential_decay"),
        *("cosine_decay_schedule", "cosine_onecycle_schedule", "linear_onecycle_schedule"),
        *("piecewise_constant_schedule", "piecewise_interpolate_schedule", "join_schedules"),
        *("warmup_constant_schedule", "warmup_cosine_decay_schedule", "sgdr_schedule"),
        "warmup_exponential_decay_schedule",
    }
    assert names <= set(schedules.__all__)


def test_without_a_warm_up_the_decay_begins_at_once() -> None:
    decay = schedules.cosine(0.7, 0.1, 4)
    assert schedules.warmup_cosine(0.0, 0.7, 0, 4, 0.1) == decay
    assert [schedules.warmup_constant(0.1, 0.7, 0)(k) for k in (0, 9)] == [0.7, 0.7]


def test_numbers_keep_their_precision_at_tensor_counts() -> None:
    """As tensors of their own 0.1 and 0.3 would be float32."""
    joined = schedules.join([schedules.constant(0.1), schedules.constant(0.3)], [2])
    jumping = schedules.piecewise_constant(1.0, {2: 0.3})
    for schedule in (joined, jumping):
        assert torch.as_tensor(schedule(torch.tensor(3))).item() == 0.3


BAD = {
    "product": (lambda: schedules.product([]), "product expects at least one schedule"),
    "sgdr": (lambda: schedules.sgdr([]), "sgdr expects the arguments of at least one period"),
    "warmup": (lambda: schedules.warmup_constant(0.0, 1.0, -1), "warmup_steps.*>= 0, got -1"),
    "kind": (
        lambda: schedules.piecewise_interpolate("cubic", 1.0),
        "interpolate_type must be 'linear' or 'cosine', got 'cubic'",
    ),
    "boundary": (lambda: schedules.piecewise_interpolate("linear", 1.0, {-1: 0.5}), "boundary"),
    "one-cycle": (lambda: schedules.cosine_onecycle(0, 1.0), "transition_steps"),
    "pct_start": (lambda: schedules.linear_onecycle(9, 1.0, -0.1), "pct_start must be a number"),
    "pct_final": (lambda: schedules.linear_onecycle(9, 1.0, 0.5, 0.4), "pct_final must be >= pct"),
    "cosine": (lambda: schedules.cosine(1.0, 0.0, 0), "transition_steps"),
}


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD.keys())
def test_bad_arguments_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_what_is_no_schedule_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"product expects a list of schedules, got .* in it"):
        schedules.product([0.5])  # pyright: ignore[reportArgumentType]
