"""SAM and ASAM: both gradients, in all APIs; meta-gradients through both; what else runs twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapting import assert_derivative
from conftest import nonzero
from tolerances import all_finite, assert_close
from torch import Tensor, nn

import torchopt


F64 = {"dtype": torch.float64}
Trees = dict[str, Tensor]

#: Weights after four steps of ``optax.contrib.sam(base, chain(normalize(), sgd(0.3)),
#: opaque_mode=True)`` of Optax 0.2.8 in float64, by the base.
OPTAX = {
    "sgd(0.1, 0.8)": (
        torchopt.sgd(0.1, 0.8),
        [0.7565224161978654, 0.06249661491425458, 0.4465437047481183],
    ),
    "adam(0.1, 0.8, 0.9)": (
        torchopt.adam(0.1, (0.8, 0.9)),
        [0.8861782395994009, -0.6132129719648868, 1.6323780910602106],
    ),
}
BASES: dict[str, Callable[[], torchopt.GradientTransformation]] = {
    "sgd": lambda: torchopt.sgd(0.1, 0.8),
    "adam": lambda: torchopt.adam(0.05, (0.8, 0.9), eps=1e-2),
    "clipped": lambda: torchopt.chain(torchopt.clip_grad_norm(0.5), torchopt.sgd(0.3)),
    "nadam": lambda: torchopt.nadam(0.05, eps=1e-2),  # which has a counter
}
every_base = pytest.mark.parametrize("base", BASES.values(), ids=BASES.keys())
every_kind = pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])


def loss_of(w: Any) -> Tensor:
    a, b = w["a"], w["b"]
    return 0.1 * (a**4).sum() + 0.5 * (a.sum() * b - 1).square().sum()


def start() -> Trees:
    return {"a": nonzero(3), "b": nonzero(2)}


@pytest.mark.parametrize("call", OPTAX)
def test_values_of_optax(call: str) -> None:
    base, expected = OPTAX[call]
    tx = torchopt.sam(base, rho=0.3)
    w = {"a": torch.tensor([0.5, -1.0], **F64), "b": torch.tensor([2.0], **F64)}
    state, grad = tx.init(w), torch.func.grad(loss_of)
    for _ in range(4):
        w, state = tx.apply_gradients(grad(w), state, w, inplace=False, grad_fn=grad)
    assert_close(torch.cat([w["a"], w["b"]]), torch.tensor(expected, **F64))


def by_hand(
    base: torchopt.GradientTransformation, w: Trees, rho: Any, adaptive: bool, eta: Any, steps: int
) -> Trees:
    """The two papers, line by line."""
    state = base.init(w)
    for _ in range(steps):
        leaves = {n: x if x.requires_grad else x.clone().requires_grad_() for n, x in w.items()}
        g = dict(
            zip(w, torch.autograd.grad(loss_of(leaves), list(leaves.values()), create_graph=True))
        )
        size = {n: x.abs() + eta if adaptive else torch.ones_like(x) for n, x in leaves.items()}
        norm = torch.stack([(size[n] * x).square().sum() for n, x in g.items()]).sum().sqrt()
        there = {n: x + rho * size[n] ** 2 * g[n] / norm for n, x in leaves.items()}
        found = torch.autograd.grad(loss_of(there), list(there.values()), create_graph=True)
        updates, state = base.update(dict(zip(w, found)), state, leaves, inplace=False)
        w = {n: x + updates[n] for n, x in leaves.items()}
    return w


def closure_of(optimizer: Any, w: Any) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(w)
        loss.backward()
        return loss

    return closure


@every_kind
@every_base
def test_every_api_follows_the_papers(base: Any, adaptive: bool) -> None:
    k: dict[str, Any] = {"rho": 0.4, "adaptive": adaptive, "eta": 0.05}
    weights, steps = start(), 3
    expected = {n: x.detach() for n, x in by_hand(base(), weights, steps=steps, **k).items()}
    ends: dict[str, Any] = {}

    tx, now = torchopt.sam(base(), **k), weights
    state, grad = tx.init(now), torch.func.grad(loss_of)
    for _ in range(steps):
        now, state = tx.apply_gradients(grad(now), state, now, inplace=False, grad_fn=grad)
    ends["functional"] = now

    ends["closure"] = own = {n: nn.Parameter(x.clone()) for n, x in weights.items()}
    optimizer = torchopt.SAM(own.values(), base(), **k)
    first = loss_of(weights)
    assert_close(optimizer.step(closure_of(optimizer, own)).detach(), first)
    for _ in range(steps - 1):
        optimizer.step(closure_of(optimizer, own))

    ends["two passes"] = own = {n: nn.Parameter(x.clone()) for n, x in weights.items()}
    optimizer = torchopt.SAM(own.items(), base(), **k)
    for _ in range(steps):
        loss_of(own).backward()
        optimizer.first_step()
        loss_of(own).backward()
        optimizer.second_step()
        optimizer.zero_grad()

    ends["plain optimizer"] = own = {n: nn.Parameter(x.clone()) for n, x in weights.items()}
    plain = torchopt.Optimizer(own.values(), torchopt.sam(base(), **k))
    for _ in range(steps):
        plain.step(closure_of(plain, own))

    for track in (True, False):
        net = nn.ParameterDict({n: x.clone() for n, x in weights.items()})
        inner = torchopt.MetaSAM(net, base(), **k)
        with torch.set_grad_enabled(track):
            for _ in range(steps):
                inner.step(lambda net=net: loss_of(net))
        ends[f"meta {track}"] = dict(net.items())

    for inplace in (False, True):
        adapting = torchopt.FuncOptimizer(torchopt.sam(base(), **k), inplace=inplace)
        params: Any = {n: x.clone().requires_grad_() for n, x in weights.items()}
        for _ in range(steps):
            params = adapting.step(loss_of, params)
        ends[f"func {inplace}"] = params

    for name, end in ends.items():
        assert_close({n: x.detach() for n, x in end.items()}, expected, times=10, what=name)


# Derivatives --------------------------------------------------------------------------------------


@every_kind
@every_base
def test_meta_gradients_go_through_both_gradients(base: Any, adaptive: bool) -> None:
    """By first weights, radius, ``eta``, and what the loss itself depends on."""
    net = nn.ParameterDict(start())
    rho, eta, scale = (torch.tensor(x, **F64).requires_grad_() for x in (0.4, 0.05, 1.2))
    inputs = [*net.values(), rho, scale, *([eta] if adaptive else [])]

    def function() -> Tensor:
        with torchopt.inner_loop(net, torchopt.sam(base(), rho, adaptive, eta)) as inner:
            for _ in range(3):
                inner.step(lambda: scale * loss_of(net))
            return (net["a"] ** 2).sum() + (net["b"] ** 3).sum()

    assert_derivative(function, inputs)


@every_kind
def test_learned_rates_of_the_base(adaptive: bool) -> None:
    net, lr = nn.ParameterDict(start()), torch.tensor(0.1, **F64).requires_grad_()

    def function() -> Tensor:
        with torchopt.inner_loop(net, torchopt.sam(torchopt.sgd(lr), 0.3, adaptive)) as inner:
            for _ in range(3):
                inner.step(lambda: loss_of(net))
            return (net["a"] ** 2).sum()

    assert_derivative(function, [lr])


@every_kind
def test_reverse_forward_and_batched_derivatives_agree(adaptive: bool) -> None:
    tx, grad = torchopt.sam(torchopt.adam(0.05, eps=1e-2), 0.3, adaptive), torch.func.grad(loss_of)

    def function(w: Any) -> Tensor:
        state = tx.init(w)
        for _ in range(2):
            w, state = tx.apply_gradients(grad(w), state, w, inplace=False, grad_fn=grad)
        return (w["a"] ** 2).sum() + (w["b"] ** 3).sum()

    w = start()
    reverse = torch.func.grad(function)(w)
    assert_close(torch.func.jacfwd(function)(w), reverse, times=10)
    batch = torch.func.vmap(torch.func.grad(function))(
        {n: torch.stack([x, x + 0.1]) for n, x in w.items()}
    )
    assert_close({n: x[0] for n, x in batch.items()}, reverse, times=10)


def test_first_order_meta_gradients_take_both_gradients_as_constants() -> None:
    net = nn.ParameterDict(start())
    first, inner = dict(net.items()), torchopt.MetaSAM(net, torchopt.sgd(0.1), rho=0.3)
    inner.step(lambda: loss_of(net), create_graph=False)
    total = torch.stack([w.sum() for w in net.values()]).sum()
    found = torch.autograd.grad(total, list(first.values()))
    assert_close(found, tuple(torch.ones_like(w) for w in first.values()))


@every_kind
def test_a_gradient_that_is_zero_moves_nothing(adaptive: bool) -> None:
    tx = torchopt.sam(torchopt.sgd(0.1), 0.3, adaptive)
    w = {"a": torch.zeros(3, **F64), "b": nonzero(2)}

    def flat(w: Any) -> Tensor:
        return (w["a"] ** 2).sum() + 0.0 * (w["b"] ** 2).sum()

    def function(w: Any) -> Any:
        grad = torch.func.grad(flat)
        return tx.apply_gradients(grad(w), tx.init(w), w, inplace=False, grad_fn=grad)[0]

    assert_close(function(w), w)
    assert all_finite(*torch.func.grad(lambda w: function(w)["a"].sum())(w).values())
    assert all_finite(*(x for row in torch.func.jacfwd(function)(w).values() for x in row.values()))


# Parameters ---------------------------------------------------------------------------------------


def test_groups_have_radii_of_their_own_and_one_norm() -> None:
    weights = start()
    own = {n: nn.Parameter(x.clone()) for n, x in weights.items()}
    groups = [{"params": [own["a"]], "rho": 0.1}, {"params": [own["b"]], "lr": 0.02}]
    optimizer = torchopt.SAM(groups, torchopt.sgd(0.1), rho=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    optimizer.step(closure_of(optimizer, own))
    scheduler.step()
    grad = torch.func.grad(loss_of)
    g = grad(weights)
    norm = torch.cat(list(g.values())).norm()
    there = grad({"a": weights["a"] + 0.1 * g["a"] / norm, "b": weights["b"] + 0.5 * g["b"] / norm})
    assert_close(own["a"].detach(), weights["a"] - 0.1 * there["a"])
    assert_close(own["b"].detach(), weights["b"] - 0.02 * there["b"])
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.01]


@pytest.mark.parametrize("api", ["object", "functional", "differentiable"])
def test_under_a_mask_only_the_chosen_go_up(api: str) -> None:
    weights, grad = start(), torch.func.grad(loss_of)
    mask = {"a": True, "b": False}
    tx = torchopt.chain(
        torchopt.masked(torchopt.sam(torchopt.sgd(0.1), 0.5), mask),
        torchopt.freeze({"a": False, "b": True}),
    )
    if api == "functional":
        found = tx.apply_gradients(
            grad(weights), tx.init(weights), weights, inplace=False, grad_fn=grad
        )[0]
    elif api == "object":
        found = {n: nn.Parameter(x.clone()) for n, x in weights.items()}
        optimizer = torchopt.Optimizer(found.items(), tx)
        optimizer.step(closure_of(optimizer, found))
    else:
        found = nn.ParameterDict({n: x.clone() for n, x in weights.items()})
        torchopt.MetaOptimizer(found, tx).step(lambda: loss_of(found))
    g = grad(weights)["a"]
    there = grad({"a": weights["a"] + 0.5 * g / g.norm(), "b": weights["b"]})
    assert_close(found["a"].detach(), weights["a"] - 0.1 * there["a"])
    assert_close(found["b"].detach(), weights["b"])


def test_a_parameter_without_a_gradient_stays() -> None:
    own = {"a": nn.Parameter(nonzero(3)), "idle": nn.Parameter(nonzero(2))}
    before = own["idle"].detach().clone()
    optimizer = torchopt.SAM(own.values(), torchopt.adam(0.1))
    calls = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        calls.append(1)
        loss = own["a"].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.first_step(zero_grad=False)
    optimizer.second_step()
    assert torch.equal(own["idle"], before)
    assert own["idle"] not in optimizer.state
    assert len(calls) == 2


def test_no_gradient_at_the_second_point_is_a_zero_gradient() -> None:
    tx = torchopt.sam(torchopt.sgd(0.1))
    w = start()
    found = tx.update(w, tx.init(w), w, inplace=False, grad_fn=lambda w: {"a": w["a"], "b": None})
    assert not found[0]["b"].any()
    assert found[0]["a"].all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex64], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    """Half precision goes up in float32, and is asked for gradients in its own dtype."""
    start_at = nonzero(4, dtype=dtype)
    seen = []

    def loss(p: Tensor) -> Tensor:
        seen.append(p.dtype)
        return (p * p.conj()).real.float().square().sum()

    ends = []
    for two in (False, True):
        p = nn.Parameter(start_at.clone())
        optimizer = torchopt.SAM([p], torchopt.sgd(0.1), rho=0.5)

        def closure(optimizer: Any = optimizer, p: Any = p) -> Tensor:
            optimizer.zero_grad()
            value = loss(p)
            value.backward()
            return value

        if two:
            closure()
            optimizer.first_step()
            closure()
            optimizer.second_step()
        else:
            optimizer.step(closure)
        ends.append(p.detach())
    net = nn.ParameterDict({"p": start_at.clone()})
    torchopt.MetaSAM(net, torchopt.sgd(0.1), rho=0.5).step(lambda: loss(net["p"]))
    wide = start_at.to(torch.complex64 if dtype.is_complex else torch.float32).requires_grad_()
    (g,) = torch.autograd.grad(loss(wide), wide)
    there = (wide + 0.5 * g / g.norm()).detach().requires_grad_()
    (g,) = torch.autograd.grad(loss(there), there)
    for end in (*ends, net["p"].detach()):
        assert end.dtype == dtype
        assert_close(end, (wide - 0.1 * g).detach().to(dtype), times=8)
    assert set(seen[:6]) == {dtype}
