"""Live optimizers of torch as functional transformations: the same steps; nothing else changes."""

import copy
import io
from typing import Any

import pytest
import torch
from adapting import batch, mlp, mse
from conftest import nonzero
from tolerances import assert_close
from torch import nn

import torchopt


pytestmark = pytest.mark.usefixtures("float64_by_default")

CASES = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
    "Adam": {"lr": 0.1, "amsgrad": True, "weight_decay": 0.1},
    "Adam-foreach": {"lr": 0.1, "foreach": True},
    "Adam-fused": {"lr": 0.1, "fused": True},
    "AdamW": {"lr": 0.1},
    "Adagrad": {"lr": 0.1, "lr_decay": 0.1},
    "Adadelta": {"lr": 0.5},
    "Adamax": {"lr": 0.1},
    "ASGD": {"lr": 0.1, "t0": 2},
    "NAdam": {"lr": 0.1},
    "RAdam": {"lr": 0.1},
    "RMSprop": {"lr": 0.1, "momentum": 0.5, "centered": True},
    "Rprop": {"lr": 0.1},
}


def made(name, params, **options):
    return getattr(torch.optim, name.partition("-")[0])(params, **{**CASES[name], **options})


def gradients(params):
    return {n: (3 * p).sin() + 0.1 * k for k, (n, p) in enumerate(params.items())}


def fresh():
    # not in alphabetical order, as networks have it
    return {"weight": nonzero(3, 2), "bias": nonzero(2), "a": nonzero(1)}


def stepped(optimizer, params, steps):
    for _ in range(steps):
        for p, g in zip(params.values(), gradients(params).values()):
            p.grad = g.detach()
        optimizer.step()


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_steps_as_the_optimizer_does(name, inplace):
    params = fresh()
    live = {n: p.clone() for n, p in params.items()}
    optimizer = made(name, list(live.values()))
    tx = torchopt.from_torch(optimizer)
    state = tx.init(params)
    for _ in range(8):
        given = copy.deepcopy(state)
        before = {n: p.clone() for n, p in params.items()}
        updates, new = tx.update(gradients(params), state, params, inplace=inplace)
        torch.testing.assert_close(state, given, rtol=0, atol=0)
        assert all(torch.equal(params[n], before[n]) for n in params)
        params = torchopt.apply_updates(params, updates, inplace=False)
        state = new
        stepped(optimizer, live, 1)
        for n in params:
            assert_close(params[n], live[n])
    for n, p in live.items():
        assert state[n].keys() == optimizer.state[p].keys()
        for slot, x in optimizer.state[p].items():
            torch.testing.assert_close(state[n][slot], x, rtol=1e-9, atol=1e-12)


def test_goes_on_where_the_optimizer_stands_and_leaves_it_alone():
    params = fresh()
    optimizer = made("Adam", list(params.values()))
    stepped(optimizer, params, 3)
    at, saved = {n: p.clone() for n, p in params.items()}, copy.deepcopy(optimizer.state_dict())
    tx = torchopt.from_torch(optimizer)
    state, p = tx.init(at), dict(at)
    for _ in range(3):
        p, state = tx.apply_gradients(gradients(p), state, p, inplace=False)
    torch.testing.assert_close(optimizer.state_dict(), saved, rtol=0, atol=0)
    assert all(torch.equal(params[n], at[n]) for n in params)
    stepped(optimizer, params, 3)
    for n in params:
        assert_close(p[n], params[n])


@pytest.mark.parametrize("named", [True, False])
def test_groups_have_their_own_numbers(named):
    params = fresh()
    live = {n: p.clone() for n, p in params.items()}
    items = list(live.items())
    groups = [items[:1], items[1:]]
    optimizer = torch.optim.SGD(
        [
            {"params": part if named else [p for _, p in part], "lr": lr}
            for part, lr in zip(groups, (0.1, 0.4))
        ]
    )
    tx = torchopt.from_torch(optimizer)
    given = dict(reversed(params.items())) if named else params
    state = tx.init(given)
    grads = dict(sorted(gradients(params).items()))
    updates, _ = tx.update(grads, state, {n: params[n] for n in sorted(params)})
    for n in params:
        assert_close(updates[n], -(0.1 if n == "weight" else 0.4) * grads[n])


def test_a_scheduler_of_the_optimizer_drives_it():
    params = fresh()
    optimizer = torch.optim.SGD(list(params.values()), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    tx = torchopt.from_torch(optimizer)
    state, grads, rates = tx.init(params), gradients(params), []
    for _ in range(3):
        updates, state = tx.update(grads, state, params)
        rates.append((-updates["a"] / grads["a"]).item())
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([1.0, 0.5, 0.25])


def test_parameters_without_a_gradient_stay():
    params = fresh()
    tx = torchopt.from_torch(torch.optim.Adam(list(params.values()), weight_decay=0.5))
    grads = {**gradients(params), "bias": None}
    updates, state = tx.update(grads, tx.init(params), params)
    assert updates["bias"] is None
    assert state["bias"] == {}
    assert state["a"]["step"] == 1


def test_any_tree_if_there_is_neither_a_state_nor_groups():
    tx = torchopt.from_torch(torch.optim.SGD([torch.zeros(())], lr=0.1, momentum=0.9))
    params = {"b": [nonzero(2), nonzero(3)], "a": (nonzero(1),)}
    _, state = tx.update(params, tx.init(params), params)
    updates, _ = tx.update(params, state, params)
    assert_close(updates["b"][1], -0.19 * params["b"][1])


@pytest.mark.parametrize("name", ["SGD", "RMSprop", "Rprop"])
def test_in_the_object_oriented_api_and_in_chains(name):
    net, data = mlp(), batch()
    twin = copy.deepcopy(net)
    peer = made(name, twin.parameters())
    tx = torchopt.from_torch(made(name, net.parameters()))
    optimizer = torchopt.Optimizer(net.parameters(), torchopt.chain(torchopt.scale(0.5), tx))
    for k in range(4):
        for one, own in ((optimizer, net), (peer, twin)):
            own.zero_grad()
            (mse(own, data) * (0.5 if one is peer else 1)).backward()
            one.step()
        if k == 1:
            stream = io.BytesIO()
            torch.save(optimizer.state_dict(), stream)
            stream.seek(0)
            optimizer = torchopt.Optimizer(
                net.parameters(), torchopt.chain(torchopt.scale(0.5), tx)
            )
            optimizer.load_state_dict(torch.load(stream))
    for p, q in zip(net.parameters(), twin.parameters()):
        assert_close(p.detach(), q.detach())


def test_under_a_mask():
    params = fresh()
    tx = torchopt.masked(
        torchopt.from_torch(torch.optim.SGD([torch.zeros(1)], lr=0.1)),
        {"weight": True, "bias": False, "a": True},
    )
    grads = gradients(params)
    updates, _ = tx.update(grads, tx.init(params), params)
    assert_close(updates["weight"], -0.1 * grads["weight"])
    assert torch.equal(updates["bias"], grads["bias"])


def test_differentiable_api_without_a_derivative():
    net, data = mlp(), batch()
    twin = copy.deepcopy(net)
    peer = made("Adam", twin.parameters())
    tx = torchopt.from_torch(made("Adam", net.parameters()))
    inner = torchopt.MetaOptimizer(net, tx)
    start = list(net.parameters())
    with pytest.raises(RuntimeError, match=r"has no derivative.*through grads.*no_grad"):
        inner.step(mse(net, data))
    with pytest.raises(RuntimeError, match=r"has no derivative.*through params.*torchopt\.adam"):
        inner.step(mse(net, data), create_graph=False)
    assert all(p is q for p, q in zip(net.parameters(), start))
    for _ in range(3):
        loss = mse(net, data)
        with torch.no_grad():
            inner.step(loss)
        peer.zero_grad()
        mse(twin, data).backward()
        peer.step()
    for p, q in zip(net.parameters(), twin.parameters()):
        assert_close(p.detach(), q.detach())


def test_refuses_derivatives():
    w = nonzero(3)
    optimizer = torch.optim.SGD([w], lr=0.1, momentum=0.9)
    tx: Any = torchopt.from_torch(optimizer)
    params, grads = {"w": w}, {"w": nonzero(3)}
    _, state = tx.update(grads, tx.init(params), params)
    learned = {"w": nonzero(3, requires_grad=True)}
    for inplace in (True, False):
        with pytest.raises(RuntimeError, match="through grads"):
            tx.update(learned, state, params, inplace=inplace)
        with pytest.raises(RuntimeError, match="through state"):
            tx.update(grads, {"w": {"momentum_buffer": learned["w"]}}, params, inplace=inplace)
        with torch.no_grad():
            tx.update(learned, state, learned, inplace=inplace)
    tx.update(grads, state, learned)  # parameters are leaves that require grad
    with pytest.raises(RuntimeError, match="through params"):
        tx.update(grads, state, learned, inplace=False)
    with pytest.raises(RuntimeError, match="through grads"):
        torch.func.grad(lambda g: tx.update({"w": g}, state, params)[0]["w"].sum())(grads["w"])
    with pytest.raises(RuntimeError, match="through grads"):
        torch.func.jvp(
            lambda g: tx.update({"w": g}, state, params, inplace=False)[0]["w"],
            (grads["w"],),
            (grads["w"],),
        )
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1, requires_grad=True)
    with pytest.raises(RuntimeError, match="through hyperparameters"):
        tx.update(grads, state, params)


class NoStep(torch.optim.Optimizer):
    """A third party's: state by itself, and a closure that it does not need."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})
        self.power = 2

    def step(self, closure=None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    count = self.state[p].setdefault("count", 0)
                    self.state[p]["count"] = count + 1
                    p.data.sub_(group["lr"] * p.grad.data / (count + 1) ** self.power)


def test_a_third_partys():
    params = fresh()
    tx = torchopt.from_torch(NoStep(list(params.values()), lr=0.5))
    state, grads = tx.init(params), gradients(params)
    _, state = tx.update(grads, state, params)
    updates, state = tx.update(grads, state, params)
    assert_close(updates["a"], -grads["a"] / 8)
    assert state["a"] == {"count": 2}


def test_refused():
    net = nn.Linear(2, 1)
    with pytest.raises(TypeError, match=r"expects an optimizer.*got the class Adam"):
        torchopt.from_torch(torch.optim.Adam)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"optimizer\.transformation"):
        torchopt.from_torch(torchopt.Adam(net.parameters()))
    with pytest.raises(ValueError, match=r"LBFGS needs a closure.*torchopt\.solvers"):
        torchopt.from_torch(torch.optim.LBFGS(net.parameters()))
    tx: Any = torchopt.from_torch(torch.optim.Adagrad(net.parameters()))
    with pytest.raises(ValueError, match="has a state for parameters of shapes"):
        tx.init([torch.ones(3)])
    params = dict(net.named_parameters())
    state = tx.init(params)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(params, state)
    with torch.no_grad(), pytest.raises(ValueError, match="what init returned"):
        tx.update(params, {"weight": {}}, params)
