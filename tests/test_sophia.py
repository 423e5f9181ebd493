"""Sophia with estimates of the curvature at some steps: the paper's algorithm in all APIs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import nonzero
from fusing import needs_library
from refusing import refused
from tolerances import all_finite, assert_close
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import torchopt
from torchopt.base import tree
from torchopt.kernels import why


NUMBERS: dict[str, Any] = {
    "lr": 0.05,
    "betas": (0.8, 0.7),
    "eps": 0.3,
    "weight_decay": 0.1,
    "gamma": 0.9,
    "clip_threshold": 0.6,
}
STEPS = 5
GRADS = [[0.3, -0.2, 1.0, -0.5], [-0.6, 0.1, -0.2, 0.9], [0.02, 0.3, -0.05, -0.1]]
GRADS += [[-0.1, -0.02, -0.3, -0.2]]
ESTIMATES = [[0.5, 0.1, 2.0, -0.3], [1.5, 0.4, 0.2, 0.9], [0.1, 0.6, 3.0, 2.5]]
#: ``optax.contrib.sophia(0.3, b1=0.0, b2=0.7, eps=0.05, weight_decay=0.1, gamma=0.9,
#: clip_threshold=1.4, update_interval=1, hessian_diagonal_fn=given)`` of Optax 0.2.8, in float64,
#: where ``given`` returns these estimates.
OPTAX = [0.5224996353634818, -1.2806275663377586, 1.606394108867314, 0.30736983825567804]


def test_values_of_optax() -> None:
    """It uses each estimate from the next step on, and corrects a momentum that has none here."""
    p = torch.tensor([0.5, -1.0, 2.0, 0.1], dtype=torch.float64)
    tx = torchopt.sophia(0.3, (0.0, 0.7), 0.05, 0.1, 0.9, 1.4)
    state = tx.init(p)
    for g, h in zip(GRADS, [None, *ESTIMATES]):
        given = {} if h is None else {"hessian": torch.tensor(h, dtype=torch.float64)}
        grads = torch.tensor(g, dtype=torch.float64)
        p, state = tx.apply_gradients(grads, state, p, inplace=False, **given)
    assert_close(p, torch.tensor(OPTAX, dtype=torch.float64))


def by_the_paper(
    k: dict[str, Any], p: Tensor, grads: list[Tensor], estimates: list[Tensor | None]
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Algorithm 3, for one parameter; with how much of each entry was not clipped."""
    (b1, b2), m, h, free = k["betas"], torch.zeros_like(p), torch.zeros_like(p), []
    for g, estimate in zip(grads, estimates):
        m = b1 * m + (1 - b1) * g
        if estimate is not None:
            h = b2 * h + (1 - b2) * estimate
        p = p - k["lr"] * k["weight_decay"] * p
        rho = k["clip_threshold"]
        quotient = m / torch.maximum(k["gamma"] * h, torch.as_tensor(k["eps"], dtype=h.dtype))
        p = p - k["lr"] * torch.where(quotient.abs() < rho, quotient, rho * quotient.sign())
        free.append(quotient.abs() < rho)
    return p, m, h, free


def given(params: dict[str, Tensor], step: int) -> dict[str, Any]:
    """An estimate at every other step."""
    return {} if step % 2 else {"hessian": {n: nonzero(*p.shape).abs() for n, p in params.items()}}


@pytest.mark.parametrize("use", [None, False], ids=["fused", "rules"])
def test_every_face_follows_the_paper(use: bool | None) -> None:
    k, params = {**NUMBERS, "use_accelerated_op": use}, {"w": nonzero(2, 3), "b": nonzero(3)}
    tx, now = torchopt.sophia(**k), params
    state = tx.init(params)
    own = {n: nn.Parameter(p.clone()) for n, p in params.items()}
    unnamed = {n: nn.Parameter(p.clone()) for n, p in params.items()}
    optimizer = torchopt.Sophia(own.items(), **k)
    other = torchopt.Sophia(unnamed.values(), **k)
    net = nn.ParameterDict({n: p.clone() for n, p in params.items()})
    inner = torchopt.MetaSophia(net, **k)
    grads, estimates = [], []
    for step in range(STEPS):
        g = {n: nonzero(*p.shape) for n, p in params.items()}
        extra = given(params, step)
        grads.append(g)
        estimates.append(extra.get("hessian", dict.fromkeys(params)))
        now, state = tx.apply_gradients(g, state, now, inplace=False, **extra)
        for n in params:
            own[n].grad, unnamed[n].grad = g[n].clone(), g[n].clone()
        optimizer.step(**extra)
        other.step(**{name: list(value.values()) for name, value in extra.items()})
        inner.step(sum((net[n] * g[n]).sum() for n in params), **extra)
    (kept,) = inner.extract_state()
    for n, p in params.items():
        column, own_estimates = [g[n] for g in grads], [e[n] for e in estimates]
        expected, m, h, free = by_the_paper(NUMBERS, p, column, own_estimates)
        assert any(x.any() and not x.all() for x in free)
        for found in (now[n], own[n], unnamed[n], net[n]):
            assert_close(found.detach(), expected)
        for slots in (optimizer.state[own[n]], {s: x[n] for s, x in state.slots.items()}):
            assert_close([slots["exp_avg"], slots["hessian"]], [m, h])
        assert_close([kept.exp_avg[n].detach(), kept.hessian[n].detach()], [m, h])


@pytest.mark.usefixtures("float64_by_default")
@pytest.mark.parametrize("face", ["functional", "differentiable"])
@pytest.mark.parametrize("use", [None, False], ids=["fused", "rules"])
def test_meta_gradients(face: str, use: bool | None) -> None:
    """By first weights, every number, and through estimates that depend on the weights."""
    start, weights = nonzero(6), nonzero(6)

    def unrolled(p: Tensor, k: dict[str, Any]) -> Tensor:
        (b1, b2), m, h = k["betas"], 0.0, 0.0
        for step in range(STEPS):
            m = b1 * m + (1 - b1) * (p**3 - p)
            if step % 2 == 0:
                h = b2 * h + (1 - b2) * (3 * p**2 - 1)
            quotient = m / torch.maximum(k["gamma"] * h, k["eps"])
            u = torch.where(quotient.abs() < 0.6, quotient, k["clip_threshold"] * quotient.sign())
            p = p - k["lr"] * (u + k["weight_decay"] * p)
        return (p * weights).sum()

    def loss_fn(params: Any) -> Tensor:
        return (params["p"] ** 4 / 4 - params["p"] ** 2 / 2).sum()

    def by_us(p: Tensor, k: dict[str, Any]) -> Tensor:
        tx, params = torchopt.sophia(**k, use_accelerated_op=use), {"p": p}
        net = nn.ParameterDict({"p": p.detach().clone()})
        net._parameters["p"] = p  # pyright: ignore[reportArgumentType]
        inner, state = torchopt.MetaOptimizer(net, tx), tx.init(params)
        for step in range(STEPS):
            if face == "differentiable":
                params = dict(net.items())
            extra: dict[str, Any] = {}
            if step % 2 == 0:  # without mixed terms signs give the diagonal itself
                extra["hessian"] = torchopt.hutchinson_diagonal(loss_fn, params, create_graph=True)
            if face == "differentiable":
                inner.step(loss_fn(params), **extra)
                params = dict(net.items())
            else:
                grads = torch.func.grad(loss_fn)(params)
                params, state = tx.apply_gradients(grads, state, params, inplace=False, **extra)
        return (params["p"] * weights).sum()

    results = []
    for function in (unrolled, by_us):
        p = start.clone().requires_grad_()
        k = {n: x for n, x in NUMBERS.items() if n != "betas"}
        k = {n: torch.tensor(x, requires_grad=True) for n, x in k.items()}
        betas = tuple(torch.tensor(b, requires_grad=True) for b in NUMBERS["betas"])
        value = function(p, {**k, "betas": betas})
        grads = torch.autograd.grad(value, [p, *k.values(), *betas])
        results.append([value.detach(), *grads])
        assert all((g != 0).any() for g in grads)
    assert_close(results[1], results[0], times=10)


@pytest.mark.parametrize("eps", [0.0, 1e-30, 1e-12])
def test_nothing_is_infinite_where_there_is_no_curvature(eps: float) -> None:
    params = [torch.tensor([1.0, 0.0, -2.0], requires_grad=True)]
    gamma = torch.tensor(0.1, requires_grad=True)
    tx = torchopt.scale_by_sophia(eps=eps, gamma=gamma)
    grads = [params[0] * torch.tensor([1.0, 1.0, 0.5])]
    updates, state = tx.update(grads, tx.init(params), params, inplace=False)
    assert updates[0].tolist() == [1.0, 0.0, -1.0]
    found = torch.autograd.grad(updates[0].sum() + state.exp_avg[0].sum(), [params[0], gamma])
    assert all_finite(*found)


WHERE = {
    "masked": lambda tx: torchopt.masked(tx, True),
    "partition": lambda tx: torchopt.partition({"a": tx}, lambda p: dict.fromkeys(p, "a")),
    "named": lambda tx: torchopt.named_chain(("a", tx)),
    "injected": torchopt.inject_hyperparams,
    "finite": lambda tx: torchopt.apply_if_finite(tx, 3),
    "clipped": lambda tx: torchopt.chain(torchopt.clip_grad_norm(100.0), tx),
}


@pytest.mark.parametrize("where", WHERE)
def test_inside_of_others(where: str) -> None:
    params = {"w": nonzero(2, 3), "b": nonzero(3)}
    tx, alone = WHERE[where](torchopt.sophia(**NUMBERS)), torchopt.sophia(**NUMBERS)
    state, expected = tx.init(params), alone.init(params)
    own = {n: nn.Parameter(p.clone()) for n, p in params.items()}
    optimizer = torchopt.Optimizer(own.items(), tx)
    net = nn.ParameterDict({n: p.clone() for n, p in params.items()})
    inner = torchopt.MetaOptimizer(net, tx)
    p, q = params, params
    for step in range(STEPS):
        g, extra = {n: nonzero(*x.shape) for n, x in params.items()}, given(params, step)
        p, state = tx.apply_gradients(g, state, p, inplace=False, **extra)
        q, expected = alone.apply_gradients(g, expected, q, inplace=False, **extra)
        for n, x in own.items():
            x.grad = g[n]
        optimizer.step(**extra)
        inner.step(sum((net[n] * g[n]).sum() for n in params), **extra)
    for n in params:
        assert_close([p[n], own[n].detach(), net[n].detach()], [q[n]] * 3)


def test_half_precision_keeps_the_average_in_float32() -> None:
    p = nn.Parameter(nonzero(3, dtype=torch.bfloat16))
    optimizer = torchopt.Sophia([p], lr=0.1)
    p.grad = nonzero(3, dtype=torch.bfloat16)
    estimate = nonzero(3, dtype=torch.bfloat16).abs()
    optimizer.step(hessian=[estimate])
    h = optimizer.state[p]["hessian"]
    assert h.dtype == torch.float32
    assert_close(h, estimate.float() * (1 - 0.99), times=4)


@needs_library
def test_all_of_it_is_fused_with_an_estimate_and_without() -> None:
    tx, params = torchopt.sophia(**NUMBERS), {"w": nonzero(2, 3)}
    assert not why(tx, params, params=params)
    assert not why(tx, params, params=params, hessian=params)


@pytest.mark.thorough
@pytest.mark.skipif(
    not tree._COMPILER_KNOWS_OPTREE, reason="an assertion of the compiler fails before torch 2.13"
)
def test_a_compiled_update_is_given_its_estimate() -> None:
    torch._dynamo.reset()
    tx, p = torchopt.sophia(**NUMBERS), {"w": nonzero(3), "b": nonzero(2)}
    counter = CompileCounterWithBackend("eager")

    @torch.compile(fullgraph=True, backend=counter)
    def update(g: Any, state: Any, p: Any, h: Any) -> Any:
        return tx.apply_gradients(g, state, p, inplace=False, hessian=h)

    state, q, expected, graphs = tx.init(p), p, tx.init(p), []
    for _ in range(4):
        g, h = ({n: nonzero(*x.shape) for n, x in p.items()} for _ in range(2))
        p, state = update(g, state, p, h)
        q, expected = tx.apply_gradients(g, expected, q, inplace=False, hessian=h)
        assert_close(p, q)
        graphs.append(counter.frame_count)
    assert graphs[2:] == graphs[1:2] * 2
    torch._dynamo.reset()


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "shape": ({"w": torch.ones(3)}, ValueError, r"hessian of 'w' has shape \(3,\).*expected \(2,"),
    "name": ({"v": torch.ones(2)}, ValueError, "hessian has no entry for parameter 'w'"),
    "number": ({"w": 1.0}, TypeError, "hessian of 'w' must be a tensor, got 1.0"),
    "complex": ({"w": torch.ones(2) * 1j}, ValueError, "complex64.*expected"),
}


@pytest.mark.parametrize("bad", BAD)
def test_estimates_that_do_not_fit_are_refused_by_name(bad: str) -> None:
    estimate, error, message = BAD[bad]
    p = nn.Parameter(torch.ones(2))
    optimizer = torchopt.Sophia([("w", p)], lr=0.1)
    for _ in range(2):
        p.grad = torch.ones(2)
        with refused(error, message, p, optimizer):
            optimizer.step(hessian=estimate)
        optimizer.step()
    tx, params = torchopt.sophia(), {"w": torch.ones(2)}
    state = tx.init(params)
    with refused(error, message, params, state):
        tx.update(params, state, params, hessian=estimate)
    net = nn.ParameterDict(params)
    inner = torchopt.MetaSophia(net)
    with refused(error, message, net, inner):
        inner.step(net["w"].sum(), hessian=estimate)
