"""Zero-order estimates against the analytic derivatives of the smoothed function."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import nonzero
from tolerances import assert_close
from torch import Tensor
from torch.distributions import Gumbel, Laplace, Normal, StudentT

from torchopt.diff.zero_order import zero_order
from torchopt.diff.zero_order.smoothing import METHODS


SIGMA = 0.4
#: A mean of independent estimates is farther from the truth once in 30,000 cases.
MOST_ERRORS = 4.2


def cubic(x: Tensor, y: Any) -> Tensor:
    """Of every kind: a cubic in ``x``, and a quadratic form in both that mixes all entries."""
    everything = torch.cat([x, y["a"].reshape(-1), y["b"][0].reshape(1)])
    form = torch.linspace(-1, 1, len(everything) ** 2, dtype=x.dtype).view(len(everything), -1)
    return (x**3).sum() + everything @ form @ everything / 2


def slopes(x: Tensor, y: Any, variance: float) -> tuple[Tensor, Any]:
    """The gradient of ``E cubic`` where the entries of ``x`` have a variance."""
    given = torch.cat([x, y["a"].reshape(-1), y["b"][0].reshape(1)])
    form = torch.linspace(-1, 1, len(given) ** 2, dtype=x.dtype).view(len(given), -1)
    linear = (form + form.T) @ given / 2
    slope = linear[: len(x)] + 3 * (x**2 + variance)
    return slope, {"a": linear[len(x) : -1].view_as(y["a"]), "b": (linear[-1],)}


def arguments() -> tuple[Tensor, Any]:
    return nonzero(2), {"a": nonzero(1, 2), "b": (nonzero(),)}


def leaves(tree: Any) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(tree)


def many(function: Callable[..., Any], count: int, *args: Any) -> list[Tensor]:
    """Return independent results of a random function, stacked: those of a ``vmap``."""
    batch = torch.utils._pytree.tree_map(lambda x: x.expand(count, *x.shape), args)
    return leaves(torch.vmap(function, randomness="different")(*batch))


def assert_unbiased(samples: Tensor, expected: Tensor) -> None:
    error = samples.mean(0) - expected
    bound = MOST_ERRORS * samples.std(0) / len(samples) ** 0.5
    assert samples.shape[1:] == expected.shape
    assert (samples.std(0) > 0).all()
    assert (error.abs() <= bound).all(), f"{error} > {bound}"


@pytest.mark.parametrize("argnums", [0, (1,), (0, 1), (1, 0)])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_of_the_smoothed_function(method: str, argnums: Any) -> None:
    x, y = arguments()
    smoothed = zero_order(torch.randn, method, argnums, num_samples=2, sigma=SIGMA)(cubic)
    found = many(torch.func.grad(smoothed, (0, 1)), 4000, x, y)
    listed = argnums if isinstance(argnums, tuple) else (argnums,)
    expected = slopes(x, y, SIGMA**2 if 0 in listed else 0.0)
    for position, samples, slope in zip([0, 1, 1], found, leaves(expected)):
        if position in listed:
            assert_unbiased(samples, slope)
        else:  # autograd's, of the function as it is
            assert_close(samples, slope.expand_as(samples))


@pytest.mark.parametrize("method", METHODS)
def test_many_samples_of_one_call(method: str) -> None:
    x, y = arguments()
    one = many(torch.func.grad(zero_order(torch.randn, method, sigma=SIGMA)(cubic)), 3000, x, y)[0]
    x.requires_grad_()
    zero_order(torch.randn, method, 0, 3000, SIGMA)(cubic)(x, y).backward()
    bound = MOST_ERRORS * one.std(0) / 3000**0.5
    assert ((x.grad - slopes(x.detach(), y, SIGMA**2)[0]).abs() <= bound).all()


DISTRIBUTIONS = {
    "normal": Normal(0.3, 1.5),
    "laplace": Laplace(-0.2, 0.7),
    "student": StudentT(9.0),
    "gumbel": Gumbel(torch.tensor(0.1), torch.tensor(0.8)),
}
SYMMETRIC = {"normal", "laplace", "student"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_other_distributions_are_taken_for_what_they_are(name: str, method: str) -> None:
    distribution = DISTRIBUTIONS[name]
    if method == "antithetic" and name not in SYMMETRIC:
        with pytest.raises(ValueError, match="symmetric"):
            zero_order(distribution, method)
        return
    x, y = arguments()
    smoothed = zero_order(distribution, method, num_samples=200, sigma=SIGMA)(cubic)
    # not by vmap, in which torch cannot draw from most of them
    found = torch.stack([torch.func.grad(smoothed)(x, y) for _ in range(40)])
    # E f(x + sigma z) is that of noise without mean around x + sigma E z
    expected, _ = slopes(x + SIGMA * distribution.mean, y, SIGMA**2 * distribution.variance)
    assert_unbiased(found, expected)


class Signs:
    """As classes of 0.7.3 had it: an object with ``sample``, of mean 0 and variance 1."""

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        return torch.randint(0, 2, sample_shape) * 2 - 1


@pytest.mark.parametrize(
    "distribution", [Signs(), Signs().sample, lambda shape: torch.randn(shape)]
)
def test_anything_that_draws_samples(distribution: Any) -> None:
    x, y = arguments()
    smoothed = zero_order(distribution, "antithetic", 1, sigma=SIGMA)(cubic)
    found = many(torch.func.grad(smoothed, 1), 2000, x, y)
    for samples, slope in zip(found, leaves(slopes(x, y, 0.0)[1])):
        assert_unbiased(samples, slope)


@pytest.mark.parametrize("method", METHODS)
def test_second_derivatives(method: str) -> None:
    x, y = nonzero(2), {"a": nonzero(1, 1), "b": (nonzero(),)}
    smoothed = zero_order(torch.randn, method, num_samples=20, sigma=1.0)(cubic)
    hessian = torch.func.hessian(cubic)(x, y)
    twice = torch.func.jacrev(torch.func.jacrev(smoothed))
    forward = torch.func.jacfwd(torch.func.jacrev(smoothed), randomness="same")
    for second in (twice, forward):
        assert_unbiased(many(second, 1500, x, y)[0], hessian)
    # and by a listed argument and another: here the mixed derivatives are constants
    mixed = many(torch.func.jacrev(torch.func.grad(smoothed), 1), 1500, x, y)
    exact = leaves(torch.func.jacrev(torch.func.grad(cubic), 1)(x, y))
    for samples, slope in zip(mixed, exact):
        assert_unbiased(samples, slope)


def test_second_derivatives_by_autograd() -> None:
    x, y = arguments()
    x.requires_grad_()
    options: Any = {"num_samples": 40_000, "sigma": 1.0, "method": "antithetic"}
    smoothed = zero_order(torch.randn, generator=torch.Generator().manual_seed(4), **options)(cubic)
    (grad,) = torch.autograd.grad(smoothed(x, y), x, create_graph=True)
    (product,) = torch.autograd.grad(grad.sum(), x)
    expected = torch.func.hessian(cubic)(x, y).sum(0)
    assert ((product - expected).abs() < 0.5).all()
    assert (expected.abs() > 1).any()


def test_forward_mode_is_the_same_as_reverse() -> None:
    x, y = arguments()
    v = nonzero(2)

    def smoothed(x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return zero_order(torch.randn, "forward", 0, 5, SIGMA, generator=generator)(cubic)(x, y)

    value, tangent = torch.func.jvp(smoothed, (x,), (v,))
    assert_close(tangent, torch.func.grad(smoothed)(x) @ v)
    assert torch.equal(value, cubic(x, y))


def test_vmap_in_grad() -> None:
    """The batch inside does not say that it requires grad."""
    x, y = nonzero(5, 2), arguments()[1]
    smoothed = zero_order(torch.randn, "antithetic", num_samples=40, sigma=SIGMA)(cubic)

    def total(x: Tensor) -> Tensor:
        return torch.vmap(lambda x: smoothed(x, y), randomness="different")(x).sum()

    found = torch.stack([torch.func.grad(total)(x) for _ in range(40)])
    for k in range(5):
        assert_unbiased(found[:, k], slopes(x[k], y, SIGMA**2)[0])


# Values -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_the_value_is_that_of_the_function(method: str) -> None:
    x, y = arguments()
    smoothed = zero_order(torch.randn, method, (0, 1), num_samples=3, sigma=SIGMA)(cubic)
    before = torch.get_rng_state()
    assert torch.equal(smoothed(x, y), cubic(x, y))
    assert torch.equal(torch.get_rng_state(), before)  # nothing is drawn without a derivative
    y["a"].requires_grad_()
    value = smoothed(x, y=y)
    assert torch.equal(value, cubic(x, y))
    assert value.requires_grad
    with torch.no_grad():
        assert not smoothed(x, y).requires_grad
    assert smoothed.__name__ == "cubic"
    assert smoothed.__doc__ == cubic.__doc__


@pytest.mark.parametrize("method", METHODS)
def test_the_value_is_exact_where_a_perturbed_one_is_infinite(method: str) -> None:
    x = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    noise = itertools.cycle([1.0, -1.0])
    wall = zero_order(lambda shape: next(noise), method, num_samples=2)(lambda x: -torch.log(x))
    smoothed = zero_order(lambda shape: next(noise), method, num_samples=2)(
        lambda x: torch.where(x > 0, -torch.log(x), float("inf"))
    )
    assert wall(x).item() == smoothed(x).item() == -torch.log(x).item()
    smoothed(x).backward()
    assert not x.grad.isfinite()  # as the estimate says


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    x = nonzero(3).to(dtype).requires_grad_()
    smoothed = zero_order(torch.randn, "antithetic", num_samples=4000, sigma=0.5)
    value = smoothed(lambda x: (x * torch.arange(1, 4)).sum())(x)
    value.backward()
    assert value.dtype == x.grad.dtype == dtype
    assert ((x.grad.double() - torch.arange(1, 4)).abs() < 0.3).all()


class Count:
    """A method as the function: the arguments are counted with ``self``."""

    calls = 0

    @zero_order(torch.randn, "naive", argnums=1, num_samples=6, vectorize=False)
    def steps(self, x: Tensor) -> int:
        self.calls += 1
        return int(x.sum().item())


def test_numbers_and_methods() -> None:
    counted, x = Count(), torch.tensor([1.7, 2.6], requires_grad=True)
    value = counted.steps(x)
    assert (value.item(), value.dtype, counted.calls) == (4.0, torch.float32, 7)
    value.backward()
    assert x.grad.abs().sum() > 0
    whole = zero_order(torch.randn, num_samples=3)(lambda x: (x > 0).sum())(x)
    assert (whole.item(), whole.dtype) == (2.0, torch.float32)


# How samples are computed -------------------------------------------------------------------------


def gradient(seed: int, function: Any = cubic, **options: Any) -> Tensor:
    x = torch.tensor([0.7, -0.4], dtype=torch.float64, requires_grad=True)
    y = {"a": torch.tensor([[0.3, 1.1]]).double(), "b": (torch.tensor(-0.8).double(),)}
    options.setdefault("distribution", torch.randn)
    generator = torch.Generator().manual_seed(seed)
    smoothed = zero_order(method="forward", num_samples=7, generator=generator, **options)
    smoothed(function)(x, y).backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize(
    "distribution", [torch.randn, Normal(0.0, 1.0), Signs(), lambda shape: torch.randn(shape)]
)
def test_a_generator_makes_it_reproducible(distribution: Any) -> None:
    before = torch.get_rng_state()
    first, second = (gradient(1, distribution=distribution) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, gradient(2, distribution=distribution))
    assert torch.equal(torch.get_rng_state(), before)  # PyTorch's own is left alone


def test_a_generator_goes_on() -> None:
    generator = torch.Generator().manual_seed(0)
    smoothed = zero_order(Normal(0.0, 1.0), generator=generator)(lambda x: x.sum())
    x = nonzero(3)
    first, second = torch.func.grad(smoothed)(x), torch.func.grad(smoothed)(x)
    assert not torch.equal(first, second)


def test_a_generator_that_is_not_drawn_from_is_refused() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = nonzero(3, requires_grad=True), nonzero(2, requires_grad=True)
    before, own = generator.get_state(), torch.get_rng_state()
    smoothed = zero_order(lambda shape: torch.ones(shape), generator=generator)(lambda x: x.sum())
    with pytest.raises(ValueError, match="draws from another one"):
        smoothed(x)
    failing = zero_order(lambda shape: torch.randn(3), generator=generator)(lambda x: x.sum())
    with pytest.raises(ValueError, match=r"shape \(2,\) and gave \(3,\)"):
        failing(y)
    assert torch.equal(generator.get_state(), before)
    assert torch.equal(torch.get_rng_state(), own)


def test_at_once_in_chunks_and_one_by_one_are_the_same() -> None:
    loop = gradient(3, vectorize=False)
    for options in ({}, {"vectorize": True}, {"chunk_size": 3}):
        assert_close(gradient(3, **options), loop)


def with_branches(x: Tensor, y: Any) -> Tensor:
    return cubic(x, y) if x.sum().item() > 0 else -cubic(x, y)


@pytest.mark.filterwarnings("error")
def test_what_vmap_cannot_call_is_said_once() -> None:
    x, y = arguments()
    smoothed = zero_order(torch.randn, num_samples=2)(with_branches)
    with pytest.warns(UserWarning, match=r"with_branches.*vectorize=False") as caught:
        smoothed(x.requires_grad_(), y)
    assert caught[0].filename == __file__
    smoothed(x, y).backward()  # warns no more
    with pytest.warns(UserWarning, match="one after the other"):
        found = gradient(3, with_branches)
    assert torch.equal(found, gradient(3, with_branches, vectorize=False))
    with pytest.raises(RuntimeError, match="vectorize=False"):
        gradient(3, with_branches, vectorize=True)


def test_each_sample_has_random_numbers_of_its_own() -> None:
    """Dropout in the function: samples that shared a mask would differ by the noise alone."""
    seen: list[Tensor] = []

    def noisy(x: Tensor) -> Tensor:
        seen.append(torch.rand(()) + 0 * x)
        return x * seen[-1]

    x = torch.tensor(1.0, requires_grad=True)
    found = torch.vmap(torch.func.grad(zero_order(lambda s: torch.ones(s), num_samples=4)(noisy)),
                       randomness="different")(x.detach().expand(50))  # fmt: skip
    assert found.std() > 0.05
    assert len(seen) == 2  # the function as it is, and all samples


# Variance -----------------------------------------------------------------------------------------


def test_variances_are_as_documented() -> None:
    """In 50 dimensions, far from a value of zero: relative errors at the same number of calls."""
    dim, calls = 50, 100
    slope, x = nonzero(dim), nonzero(dim)
    function = lambda x: 100 + slope @ x  # noqa: E731
    error = {}
    for method in METHODS:
        samples = calls // 2 if method == "antithetic" else calls
        smoothed = zero_order(torch.randn, method, num_samples=samples, sigma=0.01)(function)
        found = many(torch.func.grad(smoothed), 50, x)[0]
        error[method] = ((found - slope).norm(dim=1) / slope.norm()).square().mean().sqrt().item()
    # of a linear function z z' g - g has the squared length (dim + 1) |g|^2 in the mean
    assert abs(error["forward"] / ((dim + 1) / calls) ** 0.5 - 1) < 0.15
    assert abs(error["antithetic"] / ((dim + 1) / (calls / 2)) ** 0.5 - 1) < 0.15
    offset = abs(function(x).item()) / 0.01 / slope.norm().item() * (dim / calls) ** 0.5
    assert abs(error["naive"] / offset - 1) < 0.2
    assert error["naive"] > 300 * error["forward"]


def test_antithetic_pairs_cancel_even_terms() -> None:
    """Of a quadratic at its minimum each pair says the gradient: zero."""
    x = torch.zeros(4, dtype=torch.float64)
    found = {
        method: many(torch.func.grad(zero_order(torch.randn, method)(lambda x: x @ x)), 500, x)[0]
        for method in METHODS
    }
    assert found["antithetic"].abs().max() == 0
    assert found["naive"].std() > 1
    assert found["forward"].std() > 1
