"""Estimates of a Hessian's diagonal, against the Hessian itself."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from conftest import nonzero
from refusing import refused
from tolerances import assert_close
from torch import Tensor, nn
from torch.func import functional_call

import torchopt


WEIGHTS = {"a": (3,), "b": {"c": (2, 2)}}


def start() -> Any:
    return {"a": nonzero(3), "b": {"c": nonzero(2, 2)}}


def mixed(params: Any) -> Tensor:
    """A loss with mixed terms within parameters and between them."""
    a, c = params["a"], params["b"]["c"]
    return (a.prod() + (c @ c).sum() * a.sum()).tanh() + (c**3).sum() + (a**4).sum()


def separable(params: Any) -> Tensor:
    return (params["a"] ** 4).sum() + (params["b"]["c"] ** 3).sum()


def flat(params: Any) -> Tensor:
    return torch.cat([params["a"], params["b"]["c"].reshape(-1)])


def unflat(x: Tensor) -> Any:
    return {"a": x[:3], "b": {"c": x[3:].view(2, 2)}}


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_hutchinson_is_unbiased(distribution: str) -> None:
    params, n = start(), 150
    dense = torch.func.hessian(lambda x: mixed(unflat(x)))(flat(params)).diagonal()
    options = {"distribution": distribution, "generator": torch.Generator().manual_seed(3)}
    samples = [flat(torchopt.hutchinson_diagonal(mixed, params, **options)) for _ in range(n)]
    stacked = torch.stack(samples)
    error = (stacked.mean(0) - dense).abs()
    assert (error <= 4.5 * stacked.std(0) / n**0.5).all()
    # and the samples of one call are averaged
    one = torchopt.hutchinson_diagonal(mixed, params, num_samples=n, **options)
    assert ((flat(one) - dense).abs() <= 4.5 * stacked.std(0) / n**0.5).all()
    assert (stacked.std(0) > 1e-2).all()  # there are mixed terms


def test_signs_give_the_diagonal_itself_where_nothing_is_mixed() -> None:
    params = start()
    found = torchopt.hutchinson_diagonal(separable, params)
    assert_close(found["a"], 12 * params["a"] ** 2)
    assert_close(found["b"]["c"], 6 * params["b"]["c"])


def test_the_variance_of_normal_vectors_is_as_the_docs_say() -> None:
    options = {"distribution": "normal", "generator": torch.Generator().manual_seed(1)}
    x = torch.tensor([1.0, 2.0], dtype=torch.float64)
    found = torch.stack(
        [torchopt.hutchinson_diagonal(lambda x: (x**2).sum(), x, **options) for _ in range(300)]
    )
    assert ((found.var(0) / (2 * 2.0**2) - 1).abs() < 0.6).all()


NET = nn.Linear(2, 3).double()
INPUTS = torch.tensor([[0.5, -1.0], [2.0, 0.3]], dtype=torch.float64)


def logits_of(params: Any) -> Tensor:
    return functional_call(NET, params, INPUTS)


def test_bartlett_is_unbiased_over_all_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """All nine pairs of labels, each with its chance, give the Gauss-Newton matrix exactly."""
    params = {n: nonzero(*p.shape) for n, p in NET.named_parameters()}
    chances = logits_of(params).softmax(-1)
    expected: Any = {n: torch.zeros_like(p) for n, p in params.items()}
    drawn: list[Any] = []
    monkeypatch.setattr(torch, "multinomial", lambda *_, **__: torch.tensor(drawn).view(-1, 1))
    for labels in itertools.product(range(3), repeat=2):
        drawn[:] = labels
        found = torchopt.gauss_newton_bartlett(logits_of, params)
        chance = chances[0, labels[0]] * chances[1, labels[1]]
        expected = {n: x + chance * found[n] for n, x in expected.items()}
        assert all((x >= 0).all() for x in found.values())
    jacobians = torch.func.jacrev(logits_of)(params)
    for n, p in params.items():
        diagonal = torch.zeros(p.numel(), dtype=torch.float64)
        for b in range(2):
            j = jacobians[n][b].reshape(3, -1)
            s = chances[b].diag() - chances[b].outer(chances[b])
            diagonal += (j.T @ s @ j).diagonal() / 2
        assert_close(expected[n].reshape(-1), diagonal)


def test_bartlett_draws_from_the_predictions() -> None:
    logits = torch.tensor([[0.0, 2.0, -1.0]], dtype=torch.float64)
    params, n = {"z": logits}, 300
    generator = torch.Generator().manual_seed(5)
    found = [
        torchopt.gauss_newton_bartlett(lambda p: p["z"], params, generator=generator)["z"][0]
        for _ in range(n)
    ]
    chances = logits.softmax(-1)[0]
    error = (torch.stack(found).mean(0) - chances * (1 - chances)).abs()
    assert (error <= 4.5 * torch.stack(found).std(0) / n**0.5).all()


def test_logits_may_have_any_shape() -> None:
    params = {"z": nonzero(2, 4, 3)}
    one, other = (torch.Generator().manual_seed(2) for _ in range(2))
    found = torchopt.gauss_newton_bartlett(lambda p: p["z"], params, generator=one)
    rows = torchopt.gauss_newton_bartlett(lambda p: p["z"].view(8, 3), params, generator=other)
    assert_close(found, rows)


@pytest.mark.parametrize("create_graph", [False, True])
def test_what_an_estimate_is_connected_to(create_graph: bool) -> None:
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    x = nonzero(3).requires_grad_()
    found = torchopt.hutchinson_diagonal(
        lambda p: scale * (p**4).sum(), x, create_graph=create_graph
    )
    assert found.requires_grad == create_graph
    assert_close(found.detach(), 24 * x.detach() ** 2)
    square = torchopt.gauss_newton_bartlett(lambda p: scale * p, x, create_graph=create_graph)
    assert square.requires_grad == create_graph
    if create_graph:
        by_x, by_scale = torch.autograd.grad(found.sum(), [x, scale], retain_graph=True)
        assert_close(by_x, 48 * x.detach())
        assert_close(by_scale, 12 * (x.detach() ** 2).sum())
        # (softmax - label) ** 2 times scale ** 2, for the label that was drawn
        z = scale * x
        labels = torch.where(square.sqrt() > 0, 0.0, 0.0)
        labels[(z.softmax(0) * scale - square.sqrt()).abs().argmax()] = 1.0
        expected = (scale * (z.softmax(0) - labels)) ** 2
        assert_close(square.detach(), expected.detach())
        found = torch.autograd.grad(square.sum(), [x, scale], retain_graph=True)
        assert_close(found, torch.autograd.grad(expected.sum(), [x, scale]))


def test_a_generator_repeats_itself_and_nothing_else_is_drawn_from() -> None:
    params = start()
    before = torch.get_rng_state()
    found = [
        torchopt.hutchinson_diagonal(mixed, params, generator=torch.Generator().manual_seed(k))
        for k in (1, 1, 2)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert_close(found[0], found[1])
    assert not torch.equal(flat(found[0]), flat(found[2]))


def test_estimates_of_a_batch() -> None:
    x = nonzero(4, 3)
    batch = torch.vmap(
        lambda x: torchopt.hutchinson_diagonal(lambda x: (x**4).sum(), x), randomness="different"
    )
    assert_close(batch(x), 12 * x**2)


P = {"w": torch.ones(2)}
BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "ignores": (lambda: NET(INPUTS).sum(), ValueError, "functional_call"),
    "number": (lambda: 1.0, TypeError, "loss"),
    "none": (lambda: None, TypeError, "return"),
}


@pytest.mark.parametrize("bad", BAD)
def test_losses_that_are_none(bad: str) -> None:
    result, error, message = BAD[bad]
    with refused(error, message, P):
        torchopt.hutchinson_diagonal(lambda _: result(), P)


def test_arguments_out_of_bounds() -> None:
    def loss(p: Any) -> Tensor:
        return p["w"].sum()

    with refused(ValueError, r"num_samples must be a whole number >= 1, got 0"):
        torchopt.hutchinson_diagonal(loss, P, num_samples=0)
    with refused(ValueError, r"distribution must be one of \['normal', 'rademacher'\], got 'sign'"):
        torchopt.hutchinson_diagonal(loss, P, distribution="sign")
    with refused(ValueError, r"must return a scalar, got shape \(2,\)"):
        torchopt.hutchinson_diagonal(lambda p: p["w"], P)
    with refused(TypeError, "expects floating-point tensors, got dtype torch.int64 as 'w'"):
        torchopt.hutchinson_diagonal(loss, {"w": torch.ones(2, dtype=torch.int64)})
    with refused(ValueError, r"logits of shape \(\.\.\., classes\), got \(\)"):
        torchopt.gauss_newton_bartlett(loss, P)
    with refused(ValueError, "no parameters"):
        torchopt.gauss_newton_bartlett(loss, {})
    with refused(ValueError, "functional_call"):
        torchopt.gauss_newton_bartlett(lambda _: torch.ones(2, 3), P)
