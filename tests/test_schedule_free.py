"""Schedule-free optimizers against the paper line by line; weights to evaluate with, of all."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from adapting import assert_derivative, batch, mlp, mse
from cases import CASES, Case
from conftest import nonzero, nonzero_like
from refusing import refused
from tolerances import assert_close
from torch import Tensor, nn
from torch.func import functional_call

import torchopt
from torchopt.core.evaluation import evaluates


ROWS = [case for case in CASES if evaluates(case.tx())]
every_row = pytest.mark.parametrize("case", ROWS, ids=lambda case: case.name)
every_schedule_free_row = pytest.mark.parametrize(
    "case", [case for case in ROWS if "z" in case.algorithm.slots], ids=lambda case: case.name
)
#: What stands in the way of the average's weights being equal.
SCHEDULES = {
    "plain": {},
    "warm-up": {"warmup_steps": 4},
    "powers": {"r": 1.5, "weight_lr_power": 0.5},
    "no-powers": {"weight_lr_power": 0.0},
    "decay": {"weight_decay": 0.3},
    "all": {"warmup_steps": 3, "r": 0.5, "weight_lr_power": 3.0, "weight_decay": 0.1},
}
STEPS = 6


def arguments(case: Case, more: dict[str, Any]) -> dict[str, Any]:
    return {**case.algorithm.defaults(), **case.kwargs, **more}


def by_the_paper(k: dict[str, Any], p: Tensor, grads: list[Tensor]) -> tuple[Tensor, ...]:
    """The algorithm, written out: gradients at y, plain steps of z, and x, their average."""
    x = y = z = p
    v, weight_sum, lr_max = torch.zeros_like(p), 0.0, 0.0
    beta = k["momentum"] if "momentum" in k else k["betas"][0]
    for t, g in enumerate(grads, start=1):
        lr = k["lr"] * min(1.0, t / k["warmup_steps"]) if k["warmup_steps"] else k["lr"]
        if "betas" in k:
            v = k["betas"][1] * v + (1 - k["betas"][1]) * g**2
            g = g / ((v / (1 - k["betas"][1] ** t)).sqrt() + k["eps"])
        z = z - lr * (g + k["weight_decay"] * y)
        lr_max = max(lr_max, lr)
        weight = t ** k["r"] * lr_max ** k["weight_lr_power"]
        weight_sum += weight
        c = weight / weight_sum
        x = (1 - c) * x + c * z
        y = (1 - beta) * z + beta * x
    return x, y, z


def start() -> dict[str, Tensor]:
    return {"w": nonzero(2, 3), "b": nonzero(3)}


# Values -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", SCHEDULES.values(), ids=SCHEDULES.keys())
@every_schedule_free_row
def test_every_face_follows_the_paper(case: Case, more: dict[str, Any]) -> None:
    k, params = {**case.kwargs, **more}, start()
    grads = [nonzero_like(params) for _ in range(STEPS)]
    expected = {
        n: by_the_paper(arguments(case, more), p, [g[n] for g in grads]) for n, p in params.items()
    }
    x, y, z = ({n: values[i] for n, values in expected.items()} for i in range(3))
    tx = case.recipe(**k)
    state, now = tx.init(params), params
    own = {n: nn.Parameter(p.clone()) for n, p in params.items()}
    optimizer = case.cls(own.items(), **k)
    net = nn.ParameterDict({n: p.clone() for n, p in params.items()})
    inner = case.meta(net, **k)
    for g in grads:
        now, state = tx.apply_gradients(g, state, now, inplace=False)
        for n, p in own.items():
            p.grad = g[n].clone()
        optimizer.step()
        inner.step(sum((net[n] * g[n]).sum() for n in params))
    for found in (now, own, dict(net.items())):
        assert_close({n: p.detach() for n, p in found.items()}, y, times=20)
    assert_close(state.z, z, times=20)
    assert_close({n: optimizer.state[p]["z"] for n, p in own.items()}, z, times=20)
    assert_close(tx.eval_params(state, now), x, times=20)
    assert_close({n: p.detach() for n, p in inner.eval_params().items()}, x, times=20)
    optimizer.eval()
    assert_close({n: p.detach() for n, p in own.items()}, x, times=20)
    optimizer.train()
    assert_close({n: p.detach() for n, p in own.items()}, y, times=20)
    assert all((x[n] - y[n]).abs().max() > 1e-3 for n in params)


@every_row
def test_a_rate_of_zero_moves_nothing(case: Case) -> None:
    for lr in (0.0, learned := torch.tensor(0.0, dtype=torch.float64, requires_grad=True)):
        tx, params = case.recipe(**{**case.kwargs, "lr": lr}), start()
        new, state = params, tx.init(params)
        for _ in range(2):
            new, state = tx.apply_gradients(nonzero_like(params), state, new, inplace=False)
        assert_close(new, params)
        found = tx.eval_params(state, new)
        assert_close(found, params)
    (slope,) = torch.autograd.grad(found["w"].sum() + new["w"].sum(), learned)
    assert slope.isfinite()


# Eval and train -----------------------------------------------------------------------------------


def trained(case: Case, steps: int = 3) -> tuple[Any, Any, Any]:
    net, data = mlp(), batch()
    optimizer = case.cls(net.parameters(), **case.kwargs)
    go_on(net, optimizer, data, steps)
    return net, optimizer, data


def go_on(net: Any, optimizer: Any, data: Any, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        mse(net, data).backward()
        optimizer.step()


def values(net: Any) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


@pytest.mark.usefixtures("float64_by_default")
@every_row
def test_a_step_at_the_weights_for_evaluation_is_refused(case: Case) -> None:
    net, optimizer, data = trained(case)
    twin, peer = copy.deepcopy((net, optimizer))
    optimizer.eval()
    mse(net, data).backward()
    with refused(RuntimeError, r"call optimizer\.train\(\)", *net.parameters(), optimizer):
        optimizer.step()
    before = values(net)
    optimizer.eval()  # once more changes nothing
    assert all(map(torch.equal, values(net), before))
    optimizer.train()
    optimizer.train()
    go_on(net, optimizer, data)
    go_on(twin, peer, data)
    assert_close(values(net), values(twin), times=100)


@every_row
def test_before_the_first_step_both_are_the_same(case: Case) -> None:
    net = mlp()
    optimizer, before = case.cls(net.parameters(), **case.kwargs), values(net)
    optimizer.eval()
    assert all(map(torch.equal, values(net), before))
    optimizer.train()
    assert all(map(torch.equal, values(net), before))
    params = start()
    tx = case.tx()
    assert_close(tx.eval_params(tx.init(params), params), params)
    found = case.meta(net, **case.kwargs).eval_params()
    assert all(map(torch.equal, found.values(), before))


@pytest.mark.usefixtures("float64_by_default")
@pytest.mark.parametrize("mode", ["eval", "train"])
@every_row
def test_a_checkpoint_of_either_mode_resumes(case: Case, mode: str) -> None:
    net, optimizer, data = trained(case)
    twin, peer = copy.deepcopy((net, optimizer))
    getattr(optimizer, mode)()
    file = io.BytesIO()
    torch.save((net.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    other = mlp()
    other.load_state_dict(weights)
    resumed = case.cls(other.parameters())
    resumed.load_state_dict(state)
    if mode == "eval":
        mse(other, data).backward()
        with pytest.raises(RuntimeError, match="train"):
            resumed.step()
    resumed.train()
    go_on(other, resumed, data)
    go_on(twin, peer, data)
    assert_close(values(other), values(twin), times=100)
    resumed.eval()
    peer.eval()
    assert_close(values(other), values(twin), times=100)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex64], ids=str)
@every_schedule_free_row
def test_the_weights_to_evaluate_have_the_dtype_of_the_parameters(
    case: Case, dtype: torch.dtype
) -> None:
    """The anchor is kept in the dtype of computation over the steps."""
    p = nn.Parameter(nonzero(3, dtype=dtype))
    net = nn.ParameterDict({"p": p.detach().clone()})
    optimizer, inner, tx = case.cls([p], **case.kwargs), case.meta(net, **case.kwargs), case.tx()
    now, start = p.detach().clone(), p.detach().clone()
    state = tx.init(now)
    for _ in range(3):
        p.grad = nonzero(3, dtype=dtype)
        now, state = tx.apply_gradients(p.grad, state, now, inplace=False)
        inner.step((net["p"] * p.grad.conj()).real.sum())
        optimizer.step()
    (own,) = inner.extract_state()
    wide = dtype if dtype.is_complex else torch.float32
    assert {x.dtype for x in (state.z, own.z["p"], optimizer.state[p]["z"])} == {wide}
    optimizer.eval()
    found = [tx.eval_params(state, now), inner.eval_params()["p"].detach(), p.detach()]
    assert {x.dtype for x in found} == {dtype}
    for x in found:
        assert_close(x, found[0], times=4)
        assert (x - start).abs().max() > 1e-2


def test_others_have_no_other_weights() -> None:
    net = mlp()
    optimizer = torchopt.Adam(net.parameters())
    mse(net, batch()).backward()
    optimizer.step()
    before = values(net)
    optimizer.eval()
    assert all(map(torch.equal, values(net), before))
    optimizer.step()
    tx, params = torchopt.adam(), start()
    assert tx.eval_params(tx.init(params), params)["w"] is params["w"]


# Parts of a network -------------------------------------------------------------------------------

WHERE = {
    "partition": lambda tx: torchopt.partition(
        {"free": tx, "rest": torchopt.adam(0.1)}, {"0": "free", "2": "rest"}
    ),
    "partition-turned": lambda tx: torchopt.partition(
        {"free": tx, "rest": torchopt.adam(0.1)}, {"0": "rest", "2": "free"}
    ),
    "masked": lambda tx: torchopt.chain(
        torchopt.masked(tx, {"0": True, "2": False}), torchopt.freeze({"0": False, "2": True})
    ),
}


@pytest.mark.usefixtures("float64_by_default")
@pytest.mark.parametrize("where", WHERE)
@every_row
def test_a_part_of_a_network(case: Case, where: str) -> None:
    """On every face its weights are those of the part alone, and the others stay what they are."""
    net, data = mlp(), batch()
    alone, twin = copy.deepcopy(net), copy.deepcopy(net)
    part = "2" if where == "partition-turned" else "0"
    tx, own = WHERE[where](case.tx()), dict(net.named_parameters())
    optimizer = torchopt.Optimizer(net.named_parameters(), tx)
    inner = torchopt.MetaOptimizer(twin, tx)
    params = {n: p.detach().clone() for n, p in own.items()}
    state = tx.init(params)
    names = [n for n in own if n.startswith(part)]
    single = case.cls([dict(alone.named_parameters())[n] for n in names], **case.kwargs)
    for _ in range(4):
        inner.step(mse(twin, data))
        optimizer.zero_grad()
        mse(net, data).backward()
        grads = {n: p.grad.clone() for n, p in own.items()}
        for n in names:
            dict(alone.named_parameters())[n].grad = grads[n].clone()
        single.step()
        optimizer.step()
        params, state = tx.apply_gradients(grads, state, params, inplace=False)
    trained_at = {n: p.detach().clone() for n, p in own.items()}
    optimizer.eval()
    single.eval()
    found = {
        "functional": tx.eval_params(state, params),
        "object": {n: p.detach() for n, p in own.items()},
        "differentiable": {n: p.detach() for n, p in inner.eval_params().items()},
    }
    for face, evaluated in found.items():
        for n, p in evaluated.items():
            expected = dict(alone.named_parameters())[n].detach() if n in names else trained_at[n]
            assert_close(p, expected, times=100, what=f"{face} {n}")
            assert (n in names) == (not torch.equal(p, trained_at[n]) and n in names)
    optimizer.train()
    assert_close({n: p.detach() for n, p in own.items()}, trained_at, times=100)


@every_schedule_free_row
def test_parameters_without_a_gradient_are_evaluated_as_they_are(case: Case) -> None:
    params, tx = start(), case.tx()
    state, now = tx.init(params), params
    own = {n: nn.Parameter(p.clone()) for n, p in params.items()}
    optimizer = case.cls(own.items(), **case.kwargs)
    used = {"w": nonzero(2, 3)}
    for step in range(4):
        grads = {"w": used["w"], "b": nonzero(3) if step == 2 else None}
        now, state = tx.apply_gradients(grads, state, now, inplace=False)
        for n, p in own.items():
            p.grad = grads[n]
        optimizer.step()
        if step == 1:
            assert_close(tx.eval_params(state, now)["b"], params["b"])
            assert not torch.equal(tx.eval_params(state, now)["w"], now["w"])
            optimizer.eval()
            assert torch.equal(own["b"], params["b"])
            optimizer.train()
    assert state.step == {"w": 4, "b": 1}
    assert state.weight_sum["w"] != state.weight_sum["b"]
    assert optimizer.state[own["b"]]["weight_sum"] == state.weight_sum["b"]
    optimizer.eval()
    expected = tx.eval_params(state, now)
    assert_close({n: p.detach() for n, p in own.items()}, expected, times=20)


# Derivatives of the weights to evaluate with ------------------------------------------------------


@pytest.mark.usefixtures("float64_by_default")
@every_row
def test_derivatives_by_initial_parameters_and_numbers(case: Case) -> None:
    net, support, query = mlp(), batch(), batch()
    larger = case.larger_eps()
    for name in ("parameters", *case.tunable):
        if name == "parameters":
            changed, tensors = larger, list(net.parameters())
        else:
            value = larger.get(name, case.value(name))
            tensors = [torch.tensor(value, requires_grad=True)]
            changed = {**larger, name: tensors[0]}

        def function(changed: Any = changed) -> Tensor:
            with torchopt.inner_loop(net, case.tx(changed)) as inner:
                for _ in range(4):
                    inner.step(mse(net, support))
                found = functional_call(net, inner.eval_params(), query[0])
            return (found - query[1]).square().mean()

        assert_derivative(function, tensors)


@pytest.mark.usefixtures("float64_by_default")
@every_row
def test_derivatives_of_the_functional_face(case: Case) -> None:
    params, weights = start(), start()
    tx = case.smooth()

    def function(params: Any) -> Tensor:
        state = tx.init(params)
        for _ in range(3):
            grads = {n: p**3 - p for n, p in params.items()}
            params, state = tx.apply_gradients(grads, state, params, inplace=False)
        found = tx.eval_params(state, params)
        return torch.stack([(found[n] * weights[n]).sum() for n in found]).sum()

    flat = [p.clone().requires_grad_() for p in params.values()]
    assert_derivative(lambda: function(dict(zip(params, flat))), flat)
    reverse = torch.func.jacrev(function)(params)
    assert_close(torch.func.jacfwd(function)(params), reverse, times=10)
