"""Noisy SGD: what the noise is distributed like, what it depends on, and that it is a constant."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import test_conformance as grid
import test_dtypes as dtypes
import torch
from cases import NOISY_ALGORITHMS
from conftest import nonzero
from tolerances import assert_close
from torch import Tensor, nn

import torchopt
from torchopt.optimizers.noisy_sgd import normal


(CASE,) = NOISY_ALGORITHMS[0].cases()
N = 40_000
WIDE = torch.zeros(N, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_noise_is_standard_normal(dtype: torch.dtype) -> None:
    """Its moments, its distribution function, and neighbours within five standard errors."""
    x = normal(WIDE.to(dtype), 3, 1, "w")
    assert x.dtype == dtype
    x = x.double()
    error = 5 / math.sqrt(N)
    assert x.mean().abs() < error
    assert (x.square().mean() - 1).abs() < error * math.sqrt(2)
    assert x.pow(3).mean().abs() < error * math.sqrt(15)
    assert (x.pow(4).mean() - 3).abs() < error * math.sqrt(96)
    for bound in (-2.5, -1.0, -0.3, 0.0, 0.5, 1.7):
        share = 0.5 * (1 + math.erf(bound / math.sqrt(2)))
        assert abs((x < bound).double().mean().item() - share) < error / 2
    for shift in (1, 2, 3, 256, 4096):
        assert (x[shift:] * x[:-shift]).mean().abs() < 1.05 * error


def test_noise_of_other_seeds_steps_and_names_is_other_noise() -> None:
    keys = [(3, 1, "a"), (4, 1, "a"), (3, 2, "a"), (3, 1, "b"), (3, 1, ""), (3, 1, "ab")]
    keys += [(3, 1, "ba"), (2**32 - 1, 1, "a")]
    for one, other in itertools.combinations([normal(WIDE, *key) for key in keys], 2):
        assert (one * other).mean().abs() < 5 / math.sqrt(N)


def test_the_variance_falls_with_a_power_of_the_step() -> None:
    """That of Optax: the count is 1 at the first step, and ``eta`` is a variance."""
    tx, state = torchopt.noisy_sgd(0.5, eta=0.01, gamma=0.55), None
    state = tx.init(WIDE)
    for wanted in (0.05, 0.0413, 0.0370):
        updates, state = tx.update(WIDE, state, inplace=False)
        assert updates.std().item() == pytest.approx(wanted, rel=0.02)


def test_derivatives_are_those_of_constant_noise() -> None:
    lr, eta, gamma = (
        torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.1, 0.3, 0.8)
    )
    p, grads = nonzero(5).requires_grad_(), [nonzero(5).requires_grad_() for _ in range(3)]
    tx = torchopt.noisy_sgd(lr, eta, gamma, seed=9)
    now, other, state = p, p, tx.init(p)
    for t, g in enumerate(grads, start=1):
        now, state = tx.apply_gradients(g, state, now, inplace=False)
        other = other - lr * (g + (eta / t**gamma).sqrt() * normal(g.detach(), 9, t, ""))
    weights, inputs = nonzero(5), [p, *grads, lr, eta, gamma]
    assert_close(now.detach(), other.detach())
    found = torch.autograd.grad((weights * now).sum(), inputs)
    assert_close(found, torch.autograd.grad((weights * other).sum(), inputs))


@pytest.mark.parametrize("wrt", ["parameters", "hyperparameters"])
def test_meta_gradients(wrt: str) -> None:
    """The conformance grid, but for the names of the differentiable API, which are others."""
    for face in ("functional", "forward"):
        grid.test_meta_gradient(CASE, "polynomial", 3, wrt, face)


def test_meta_gradients_through_a_network() -> None:
    lr, eta = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.1, 0.3))
    net = nn.ParameterDict({"w": nonzero(3)})
    w = net["w"]
    inner = torchopt.MetaNoisySGD(net, lr, eta, 0.8, 9)
    other = w
    for t in (1, 2):
        inner.step(net["w"].pow(4).sum())
        noise = normal(w.detach(), 9, t, "w")
        other = other - lr * (4 * other**3 + (eta / t**0.8).sqrt() * noise)
    inputs = [w, lr, eta]
    found = torch.autograd.grad(net["w"].square().sum(), inputs)
    assert_close(found, torch.autograd.grad(other.square().sum(), inputs), times=100)


def test_purity_dtypes_and_checks() -> None:
    """Laws of the table that hold of noise as well."""
    for record in (False, True):
        dtypes.test_pure_algorithms(CASE, record)
    for dtype in (torch.float32, torch.bfloat16):
        dtypes.test_no_dtype_drifts(CASE, dtype, None)


@pytest.mark.thorough
def test_an_update_is_compiled_once_for_all_steps() -> None:
    torch._dynamo.reset()
    tx, g = torchopt.noisy_sgd(0.5, seed=3), {"w": nonzero(4)}
    compiled = torch.compile(
        lambda state: tx.update(g, state, inplace=False), backend="eager", fullgraph=True
    )
    state = other = tx.init(g)
    for _ in range(2):
        updates, state = compiled(state)
        expected, other = tx.update(g, other, inplace=False)
        assert_close(updates, expected)
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(state)


def test_without_variance_it_is_sgd_with_finite_derivatives() -> None:
    eta = torch.tensor(0.0, requires_grad=True)
    g = torch.tensor([1.0, -2.0])
    for value in (0.0, eta):
        tx = torchopt.noisy_sgd(0.5, value)
        updates, _ = tx.update(g, tx.init(g), inplace=False)
        assert updates.tolist() == [-0.5, 1.0]
    assert torch.autograd.grad(updates.sum(), eta)[0] == 0


def ends(grads: list[dict[str, Tensor]], start: dict[str, Tensor], **k: Any) -> list[Any]:
    """Return the weights of all APIs after the same steps."""
    tx, now = torchopt.noisy_sgd(**k), start
    state = tx.init(now)
    own = {n: nn.Parameter(w.clone()) for n, w in start.items()}
    optimizer = torchopt.NoisySGD(own.items(), **k)
    net = nn.ParameterDict({n: w.clone() for n, w in start.items()})
    inner = torchopt.MetaNoisySGD(net, **k)
    for g in grads:
        now, state = tx.apply_gradients(g, state, now, inplace=False)
        for n, p in own.items():
            p.grad = g[n].clone()
        optimizer.step()
        inner.step(torch.stack([(net[n] * g[n]).sum() for n in g]).sum())
    return [now, *({n: p.detach() for n, p in x.items()} for x in (own, net))]


def test_noise_is_the_same_in_all_apis_and_leaves_generators_alone() -> None:
    start = {"w": nonzero(3, 2), "b": nonzero(2), "s": nonzero()}
    grads = [{n: nonzero(*w.shape) for n, w in start.items()} for _ in range(3)]
    before = torch.get_rng_state()
    one, *others = ends(grads, start, lr=0.1, seed=4)
    for other in others:
        assert_close(other, one)
    again, *_ = ends(grads, start, lr=0.1, seed=5)
    assert all((again[n] != one[n]).all() for n in start)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loaded_state_goes_on_with_the_noise_that_would_have_come() -> None:
    def steps(optimizer: Any, p: nn.Parameter, count: int) -> None:
        for _ in range(count):
            p.grad = torch.ones_like(p)
            optimizer.step()

    p, q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer, other = torchopt.NoisySGD([p], 0.1, seed=6), torchopt.NoisySGD([q], 0.2)
    steps(optimizer, p, 2)
    other.load_state_dict(optimizer.state_dict())
    with torch.no_grad():
        q.copy_(p)
    steps(optimizer, p, 2)
    steps(other, q, 2)
    assert torch.equal(p, q)


def test_a_parameter_keeps_its_noise_where_another_has_no_gradient() -> None:
    tx, params = torchopt.add_noise(seed=1), [torch.zeros(4), torch.zeros(4)]
    both, _ = tx.update([torch.zeros(4), torch.zeros(4)], tx.init(params), params)
    one, _ = tx.update([None, torch.zeros(4)], tx.init(params), params)
    assert torch.equal(one[1], both[1])
    assert (both[0] != both[1]).all()


def test_all_of_a_batch_have_the_same_noise() -> None:
    tx, g = torchopt.add_noise(seed=1), torch.zeros(3, 4)
    batch, _ = torch.func.vmap(lambda x: tx.update(x, tx.init(x), inplace=False))(g)
    assert torch.equal(batch, tx.update(g[0], tx.init(g[0]))[0].expand(3, 4))


@pytest.mark.parametrize(
    ("seed", "error"), [(-1, ValueError), (2**32, ValueError), (0.5, TypeError)]
)
def test_seeds_are_whole_numbers_of_32_bits(seed: Any, error: Any) -> None:
    with pytest.raises(error, match="seed"):
        torchopt.add_noise(seed=seed)
