"""Smaller steps on plateaus: beside Optax and torch, in all APIs, and their derivatives."""

import copy
import io
from typing import Any

import pytest
import torch
from adapting import assert_derivative, batch, close, mlp, mse
from conftest import nonzero
from tolerances import assert_close

import torchopt


pytestmark = pytest.mark.usefixtures("float64_by_default")

VALUES = [3.0, 2.0, 2.0, 1.99985, 2.5, 2.0, 1.9, 1.9, 1.9, 1.9, 1.9, 1.7, 1.7, 1.7, 1.8, 1.7]
VALUES += [1.6999, 1.2, 1.3, 1.4]
#: Arguments, how often each scale follows, and the state at the end (``STATE``): of
#: ``optax.contrib.reduce_on_plateau(**arguments)`` of Optax 0.2.8, in float64, over ``VALUES``.
STATE = ("scale", "best_value", "plateau_count", "cooldown_count", "count", "avg_value")
OPTAX = (
    (
        {"factor": 0.5, "patience": 2},
        "1 1 1 .5 .5 .25 .25 .25 .125 .125 .0625 .0625 .0625 .03125 .03125 .015625 .015625 "
        ".015625 .015625 .0078125",
        (0.0078125, 1.2, 0, 0, 0, 0),
    ),
    (
        {"factor": 0.3, "patience": 2, "cooldown": 2},
        "1 1 1 .3 .3 .3 .3 .3 .09 .09 .09 .09 .09 .027 .027 .027 .027 .027 .027 .0081",
        (0.0081, 1.2, 0, 2, 0, 0),
    ),
    (
        {"factor": 0.5, "patience": 1, "accumulation_size": 3, "rtol": 0.1},
        "1 1 1 1 1 .5 .5 .5 .5 .5 .5 .25 .25 .25 .125 .125 .125 .125 .125 .125",
        (0.125, 1.5333, 0, 0, 2, 1.35),
    ),
    (
        {"factor": 0.5, "patience": 1, "rtol": 0.0, "atol": 0.25, "min_scale": 0.2},
        "1 1 .5 .25 .2 .2 .2 .2 .2 .2 .2 .2 .2 .2 .2 .2 .2 .2 .2 .2",
        (0.2, 1.2, 0, 0, 0, 0),
    ),
    (
        {"factor": 0.1, "patience": 3, "rtol": 0.05, "cooldown": 1, "accumulation_size": 2},
        "1 1 1 1 1 1 1 1 1 .1 .1 .1 .1 .1 .1 .1 .1 .1 .1 .1",
        (0.1, 1.35, 0, 0, 0, 0),
    ),
)


def scales(tx, values):
    g = [torch.ones(2)]
    state, found = tx.init(g), []
    for value in values:
        updates, state = tx.update(g, state, value=value)
        found.append(updates[0][0].item())
    return found, state


@pytest.mark.parametrize("form", [float, torch.tensor], ids=["number", "tensor"])
@pytest.mark.parametrize("row", OPTAX, ids=str)
def test_values_of_optax(row, form):
    arguments, expected, end = row
    found, state = scales(torchopt.reduce_on_plateau(**arguments), map(form, VALUES))
    assert found == pytest.approx(list(map(float, expected.split())), rel=1e-12)
    for name, value in zip(STATE, end):
        assert torchopt.tree_get(state, name).item() == pytest.approx(value, rel=1e-12)


def test_a_negative_loss_that_stays_is_a_plateau():
    for mode, value in (("min", -1.0), ("max", 1.0), ("min", 1.0), ("max", -1.0)):
        tx = torchopt.reduce_on_plateau(0.5, patience=1, mode=mode)
        assert scales(tx, [value] * 4)[0] == [1.0, 0.5, 0.25, 0.125]


def test_maxima():
    tx = torchopt.reduce_on_plateau(0.5, patience=2, mode="max")
    least = torchopt.reduce_on_plateau(0.5, patience=2)
    assert scales(tx, [-v for v in VALUES])[0] == scales(least, VALUES)[0]


def test_nan_is_no_better():
    tx = torchopt.reduce_on_plateau(0.5, patience=2)
    assert scales(tx, [float("nan"), 1.0, float("nan"), 0.9, 1.0, float("nan")])[0] == [
        *[1.0] * 5,
        0.5,
    ]


def test_the_scheduler_of_torch_waits_for_one_more():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    for patience, cooldown in ((1, 0), (3, 0), (2, 1)):
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=0.5, patience=patience - 1, cooldown=cooldown
        )
        optimizer.param_groups[0]["lr"] = 1.0
        expected = []
        for value in VALUES:
            scheduler.step(value)
            expected.append(optimizer.param_groups[0]["lr"])
        tx = torchopt.reduce_on_plateau(0.5, patience=patience, cooldown=cooldown)
        assert scales(tx, VALUES)[0] == expected


def test_derivatives():
    factor, floor = (torch.tensor(x, requires_grad=True) for x in (0.6, 0.3))
    start = nonzero(3, requires_grad=True)

    def run():
        tx = torchopt.chain(
            torchopt.sgd(0.1, momentum=0.5),
            torchopt.reduce_on_plateau(factor, patience=1, min_scale=floor),
        )
        p, state = start, tx.init(start)
        for value in (1.0, 1.0, 1.0, 0.5, 1.0):
            p, state = tx.apply_gradients(p.sin(), state, p, inplace=False, value=value)
        return p.square().sum()

    assert_derivative(run, [factor, floor, start], directions=3)


def plateau(**k):
    return torchopt.chain(
        torchopt.sgd(0.1, momentum=0.5), torchopt.reduce_on_plateau(0.5, patience=1, rtol=0.2, **k)
    )


def by_hand(net, data, steps, tx):
    """The functional API, with the loss as value."""
    params = {n: p.detach().clone() for n, p in net.named_parameters()}
    state = tx.init(params)
    for _ in range(steps):
        live = {n: p.requires_grad_() for n, p in params.items()}
        loss = (torch.func.functional_call(net, live, data[0]) - data[1]).square().mean()
        grads = dict(zip(live, torch.autograd.grad(loss, list(live.values()))))
        params = {n: p.detach() for n, p in live.items()}
        params, state = tx.apply_gradients(grads, state, params, inplace=False, value=loss)
    return params, state


def test_object_oriented_with_checkpoints():
    net, data = mlp(), batch()
    expected, state = by_hand(net, data, 6, plateau())
    assert torchopt.tree_get(state, "scale") < 0.5
    optimizer = torchopt.Optimizer(net.parameters(), plateau())

    def closure():
        optimizer.zero_grad()
        loss = mse(net, data)
        loss.backward()
        return loss

    for k in range(6):
        if k == 4:
            stream = io.BytesIO()
            torch.save(optimizer.state_dict(), stream)
            stream.seek(0)
            optimizer = torchopt.Optimizer(net.parameters(), plateau())
            optimizer.load_state_dict(torch.load(stream))
        assert optimizer.step(closure).requires_grad
    for n, p in net.named_parameters():
        close(p.detach(), expected[n])
    assert optimizer.param_groups[0]["factor"] == 0.5
    close(torchopt.tree_get(optimizer.state_dict(), "scale"), torchopt.tree_get(state, "scale"))
    mse(net, data).backward()
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(ValueError, match=r"needs the value.*got none.*step\(closure\)"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before))


@pytest.mark.parametrize("given", [False, True], ids=["loss", "grads"])
def test_differentiable(given):
    net, data = mlp(), batch()
    expected, _ = by_hand(net, data, 6, plateau())
    inner = torchopt.MetaOptimizer(net, plateau())
    start = list(net.parameters())
    for k in range(6):
        if k == 3:
            saved = torchopt.extract_state_dict(inner), torchopt.extract_state_dict(net)
            inner.step(mse(net, data))
            torchopt.recover_state_dict(inner, saved[0])
            torchopt.recover_state_dict(net, saved[1])
        loss = mse(net, data)
        if not given:
            inner.step(loss)
            continue
        grads = torch.autograd.grad(loss, list(net.parameters()), create_graph=True)
        inner.step(grads=grads, value=loss)
    for n, p in net.named_parameters():
        close(p.detach(), expected[n])
    assert not torchopt.tree_get(torchopt.extract_state_dict(inner), "best_value").requires_grad
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(mse(net, data), start))
    twin = copy.deepcopy(inner)
    assert torch.equal(*(torchopt.tree_get(x.state_dict(), "scale") for x in (inner, twin)))


def test_of_parts_of_a_network():
    params = {"a": torch.ones(1), "b": torch.ones(1)}
    half = torchopt.chain(torchopt.scale(1.0), torchopt.reduce_on_plateau(0.5, patience=1))
    masked = torchopt.masked(half, {"a": True, "b": False})
    parts = torchopt.partition(
        {"x": half, "y": torchopt.reduce_on_plateau(0.1, patience=2)}, {"a": "x", "b": "y"}
    )
    twice = torchopt.chain(half, half)
    ends = {}
    for name, tx in (("masked", masked), ("parts", parts), ("twice", twice)):
        state = tx.init(params)
        for value in (1.0, 1.0, 1.0):
            updates, state = tx.update(params, state, params, value=value)
        ends[name] = (updates["a"].item(), updates["b"].item())
    assert ends == {
        "masked": (0.25, 1.0),
        "parts": (0.25, pytest.approx(0.1)),
        "twice": (1 / 16,) * 2,
    }


def test_mapped_over_losses():
    tx = plateau()
    params = [torch.ones(2)]
    state = tx.init(params)
    values = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.5, 0.2]])

    def run(values):
        p, s = params, state
        for value in values:
            p, s = tx.apply_gradients(params, s, p, inplace=False, value=value)
        return p[0], torchopt.tree_get(s, "scale")

    found, scale = torch.func.vmap(run)(values)
    assert scale.tolist() == [0.25, 1.0]
    for k in range(2):
        assert_close(found[k], run(values[k])[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_stay(dtype):
    tx, g = torchopt.reduce_on_plateau(0.5, patience=1), [torch.ones(2, dtype=dtype)]
    updates, state = tx.update(g, tx.init(g), value=torch.tensor(1.0, dtype=torch.float32))
    updates, state = tx.update(g, state, value=torch.tensor(1.0, dtype=torch.float32))
    assert updates[0].dtype == dtype
    assert updates[0].tolist() == [0.5, 0.5]
    assert torchopt.tree_get(state, "scale").dtype == torch.float64


HALF: Any = 1.5
REFUSED = {
    "factor": (lambda: torchopt.reduce_on_plateau(1.0), ValueError, "factor must be > 0 and < 1"),
    "patience": (lambda: torchopt.reduce_on_plateau(patience=0), ValueError, "patience .*>= 1"),
    "half": (lambda: torchopt.reduce_on_plateau(patience=HALF), TypeError, "whole number"),
    "rtol": (lambda: torchopt.reduce_on_plateau(rtol=1.5), ValueError, "rtol must be"),
    "mode": (lambda: torchopt.reduce_on_plateau(mode="least"), ValueError, "'min' or 'max'"),
    "none": (lambda: scales(plateau(), [None]), ValueError, "value=loss"),
    "vector": (lambda: scales(plateau(), [torch.ones(2)]), ValueError, "single number"),
    "each": (
        lambda: scales(torchopt.reduce_on_plateau([0.1, 0.2]), [1.0]),
        ValueError,
        "factor",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    make, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        make()


def test_refused_numbers_that_differ():
    tx = torchopt.reduce_on_plateau({"a": 0.1, "b": 0.2})
    params = {"a": torch.ones(1), "b": torch.ones(1)}
    with pytest.raises(ValueError, match="factor of reduce_on_plateau is of all parameters"):
        tx.update(params, tx.init(params), value=1.0)
