"""Evolution strategies: the estimate of a step, and the loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import nonzero
from refusing import refused
from tolerances import assert_close
from torch import Tensor
from torch.distributions import Normal

import torchopt
from torchopt.diff.zero_order import es_gradient, evolution_strategies
from torchopt.diff.zero_order.evolution import centered_ranks


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def start() -> Any:
    return {"w": nonzero(2, 2), "b": (nonzero(),)}


def cubic(params: Any) -> Tensor:
    w, b = params["w"], params["b"][0]
    return (w**3).sum() + b**2 * w[0, 0] + 2 * b


def test_without_shaping_it_is_the_gradient_of_the_smoothed_function() -> None:
    params, sigma, count = start(), 0.5, 300
    options: Any = {"shaping": None, "sigma": sigma, "generator": seeded(0)}
    found = [es_gradient(cubic, params, num_samples=20, **options)[0] for _ in range(count)]
    w, b = params["w"], params["b"][0]
    corner = torch.tensor([[1.0, 0.0], [0.0, 0.0]]).double()
    expected = 3 * (w**2 + sigma**2) + corner * (b**2 + sigma**2), 2 * b * w[0, 0] + 2
    for samples, slope in zip(([g["w"] for g in found], [g["b"][0] for g in found]), expected):
        stacked = torch.stack(samples)
        error = (stacked.mean(0) - slope).abs()
        assert (error <= 4.2 * stacked.std(0) / count**0.5).all()
    # and, as that, it is scaled with the noise
    wide = {**options, "distribution": Normal(0.0, 2.0), "generator": seeded(1), "sigma": 0.25}
    grads = es_gradient(cubic, params, num_samples=20_000, **wide)[0]
    assert ((grads["w"] - expected[0]).abs() < 0.3).all()


def test_values_and_order() -> None:
    params = start()
    seen: list[Any] = []
    grads, values = es_gradient(
        lambda p: seen.append(p) or cubic(p), params, num_samples=3, sigma=0.3, vectorize=False
    )
    assert len(seen) == 6
    assert torch.equal(values, torch.stack([cubic(p) for p in seen]))
    for there, here in zip(seen[:3], seen[3:]):
        assert_close((there["w"] + here["w"]) / 2, params["w"])
    assert type(grads["b"]) is tuple
    assert not values.requires_grad


def test_ranks_keep_the_order_only() -> None:
    params = start()
    options = {"num_samples": 20, "sigma": 0.3}
    plain = es_gradient(cubic, params, generator=seeded(3), **options)[0]
    curved = es_gradient(lambda p: cubic(p).exp() * 7, params, generator=seeded(3), **options)[0]
    falling = es_gradient(
        lambda p: -cubic(p), params, generator=seeded(3), maximize=True, **options
    )[0]
    for other in (curved, falling):
        assert_close(other, plain, torch.float64)
    constant = es_gradient(lambda p: 0 * p["w"].sum(), params, **options)[0]
    assert constant["w"].abs().max() == 0  # no gradient made of chance on a plateau
    assert centered_ranks(torch.tensor([3.0, 1.0, 2.0])).tolist() == [0.5, -0.5, 0.0]
    assert centered_ranks(torch.tensor([1.0, 1.0, 4.0, 4.0])).tolist() == pytest.approx(
        [-1 / 3, -1 / 3, 1 / 3, 1 / 3]
    )
    nan, infinity = float("nan"), float("inf")
    assert centered_ranks(torch.tensor([nan, 1.0, infinity, -infinity])).tolist() == pytest.approx(
        [1 / 3, -1 / 6, 1 / 3, -0.5]
    )
    assert centered_ranks(torch.tensor([nan] * 2)).tolist() == [0, 0]


def test_a_shaping_of_ones_own() -> None:
    """A value that is no number is worst in both directions; other weights must be finite."""
    params = {"x": torch.tensor([0.2, 0.1])}
    broken = lambda p: torch.where(p["x"][0] > 0.3, float("nan"), p["x"].sum())  # noqa: E731
    for maximize in (False, True):
        grads = es_gradient(broken, params, maximize=maximize, num_samples=200, sigma=0.2)[0]
        assert grads["x"][0] > 0  # keeps away from where there is no value
    with pytest.raises(ValueError, match="not finite"):
        es_gradient(broken, params, num_samples=50, sigma=0.5, shaping=None)
    best = lambda values: (values <= values.quantile(0.2)).float() * -1  # noqa: E731
    grads, _ = es_gradient(lambda p: p["x"].sum(), params, num_samples=300, shaping=best)
    assert (grads["x"] > 0).all()
    with pytest.raises(ValueError, match=r"shape \(8,\)"):
        es_gradient(lambda p: p["x"].sum(), params, num_samples=4, shaping=lambda v: v.mean())


@pytest.mark.parametrize(
    "tx", [torchopt.adam(0.1), torchopt.sgd(0.03), torchopt.chain(torchopt.sgd(0.02, momentum=0.5))]
)
def test_the_loop_finds_a_minimum_without_a_derivative(tx: Any) -> None:
    target = {"w": torch.tensor([0.5, -1.0]).double(), "b": torch.tensor(0.3).double()}

    def steps(params: Any) -> Tensor:  # a staircase: its derivative is zero
        return sum((((params[k] - target[k]) * 20).round().abs()).sum() for k in target)  # pyright: ignore[reportReturnType]

    params = {"w": torch.zeros(2).double(), "b": torch.zeros(()).double()}
    with refused_nothing(params):
        evolved = evolution_strategies(
            steps, params, tx, num_steps=120, num_samples=30, sigma=0.1, generator=seeded(0)
        )
    assert steps(params) == 36
    assert steps(evolved.params) <= 6
    assert evolved.values.shape == (120, 60)
    assert evolved.values[-1].mean() < evolved.values[0].mean() / 3
    assert not evolved.params["w"].requires_grad


class refused_nothing:  # noqa: N801 - reads as a statement
    """Nothing has changed in a tree at the end of a block."""

    def __init__(self, tree: Any) -> None:
        self.tree, self.before = tree, {k: x.clone() for k, x in tree.items()}

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        assert all(torch.equal(x, self.before[k]) for k, x in self.tree.items())


def test_going_on_is_the_same_as_not_stopping() -> None:
    params, tx = start(), torchopt.adam(0.05)
    options: Any = {"num_samples": 4}
    whole = evolution_strategies(cubic, params, tx, num_steps=6, generator=seeded(5), **options)
    generator = seeded(5)
    half = evolution_strategies(cubic, params, tx, num_steps=3, generator=generator, **options)
    rest = evolution_strategies(
        cubic, half.params, tx, num_steps=3, state=half.state, generator=generator, **options
    )
    assert torch.equal(rest.params["w"], whole.params["w"])
    assert torch.equal(torch.cat([half.values, rest.values]), whole.values)


def test_an_objective_outside_of_torch() -> None:
    """Numbers in, a number out: a simulator."""
    calls = 0

    def simulator(params: Tensor) -> float:
        nonlocal calls
        calls += 1
        return float(abs(params.tolist()[0] - 1))

    start, tx = torch.zeros(1, requires_grad=True), torchopt.adam(0.1)
    evolved = evolution_strategies(
        simulator, start, tx, num_steps=40, num_samples=5, vectorize=False, generator=seeded(1)
    )
    assert calls == 400
    assert abs(evolved.params.item() - 1) < 0.2
    assert not evolved.params.requires_grad
    with pytest.warns(UserWarning, match="evolution_strategies cannot call simulator") as caught:
        evolution_strategies(simulator, start, tx, num_steps=3, num_samples=2)
    assert len(caught) == 1
    assert caught[0].filename == __file__


P = {"x": torch.ones(2)}
TX = torchopt.sgd(0.1)


def square(p: Any) -> Tensor:
    return p["x"].square().sum()


BAD_CALLS = {
    "no function": (lambda: es_gradient(3.0, P), TypeError, "function of params"),
    "no transformation": (
        lambda: evolution_strategies(square, P, "adam", num_steps=1),
        TypeError,
        "evolution_strategies",
    ),
    "no steps": (
        lambda: evolution_strategies(square, P, TX, num_steps=0),
        ValueError,
        "num_steps must be a whole number >= 1, got 0",
    ),
    "half a sample": (lambda: es_gradient(square, P, num_samples=0.5), TypeError, "num_samples"),
    "sigma": (lambda: es_gradient(square, P, sigma=0.0), ValueError, "sigma must be"),
    "shaping": (lambda: es_gradient(square, P, shaping="rank"), ValueError, "'ranks', None"),
    "a biased distribution": (
        lambda: es_gradient(square, P, distribution=Normal(1.0, 1.0)),
        ValueError,
        "mean 0",
    ),
    "a generator": (lambda: es_gradient(square, P, generator=3), TypeError, "torch.Generator"),
    "integers": (lambda: es_gradient(square, {"x": torch.ones(2).long()}), TypeError, "'x'"),
    "nothing": (lambda: es_gradient(square, {}), ValueError, "no tensors"),
    "a vector": (lambda: es_gradient(lambda p: p["x"], P), ValueError, r"shape \(2,\); take its"),
    "none": (lambda: es_gradient(lambda p: None, P), TypeError, "Does it return"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(name: str) -> None:
    call, error, message = BAD_CALLS[name]
    with refused(error, message, P):
        call()
