"""Each transformation against its closed form."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import nonzero
from running import double, not_bias, params, run
from tolerances import assert_close
from torch import Tensor

import torchopt


def test_identity() -> None:
    p, g = params(), params()
    (u,), state = run(torchopt.identity(), p, [g])
    assert_close(u, g)
    assert state.slots == {}


@pytest.mark.parametrize("factor", [-0.5, 0.0, 3, torch.tensor(0.25, dtype=torch.float64)], ids=str)
def test_scale(factor: Any) -> None:
    g = params()
    (u,), _ = run(torchopt.scale(factor), params(), [g])
    assert all(torch.equal(u[k], g[k] * float(factor)) for k in g)


def test_scale_by_a_tree() -> None:
    g = params()
    rows = torch.tensor([[2.0], [3.0]], dtype=torch.float64)
    (u,), _ = run(torchopt.scale({"w": rows, "b": -1.0}), params(), [g])
    assert_close(u, {"w": rows * g["w"], "b": -g["b"]})


def test_scale_by_schedule_counts_from_zero() -> None:
    g = params()
    us, state = run(torchopt.scale_by_schedule(lambda count: 10.0**count), params(), [g] * 4)
    for count, u in enumerate(us):
        assert_close(u, {k: 10.0**count * v for k, v in g.items()})
    assert state.step == 4


@pytest.mark.parametrize("bad", [0.1, torch.tensor(0.1), None, "linear"], ids=str)
def test_scale_by_schedule_expects_a_function(bad: Any) -> None:
    with pytest.raises(TypeError, match="expects a function count -> value"):
        torchopt.scale_by_schedule(bad)


def test_scale_by_learning_rate_descends() -> None:
    g = params()
    (u,), _ = run(torchopt.scale_by_learning_rate(0.3), params(), [g])
    assert_close(u, {k: -0.3 * v for k, v in g.items()})
    us, _ = run(torchopt.scale_by_learning_rate(lambda k: 1.0 / (k + 1)), params(), [g] * 3)
    for count, u in enumerate(us):
        assert_close(u, {k: -v / (count + 1) for k, v in g.items()})


def test_flip_sign() -> None:
    g = params()
    assert_close(run(torchopt.flip_sign(), g, [g])[0][0], {k: -v for k, v in g.items()})
    assert_close(run(torchopt.flip_sign(False), g, [g])[0][0], g)


@pytest.mark.parametrize("nesterov", [False, True], ids=["heavy-ball", "nesterov"])
def test_trace(nesterov: bool) -> None:
    mu, p, grads = 0.7, params(), [params() for _ in range(5)]
    us, state = run(torchopt.trace(mu, nesterov=nesterov), p, grads)
    for k in p:
        buffers = [sum(mu ** (t - i) * grads[i][k] for i in range(t + 1)) for t in range(5)]
        for t in range(5):
            expected = grads[t][k] + mu * buffers[t] if nesterov else buffers[t]
            assert_close(us[t][k], expected)
        assert_close(state.momentum_buffer[k], buffers[-1])


def test_trace_applies_dampening_from_the_second_step() -> None:
    mu, tau, grads = 0.7, 0.4, [nonzero(3) for _ in range(4)]
    us, _ = run(torchopt.trace(mu, tau), nonzero(3), grads)
    buffer = grads[0]
    assert_close(us[0], buffer)
    for t in (1, 2, 3):
        buffer = mu * buffer + (1 - tau) * grads[t]
        assert_close(us[t], buffer)


def test_trace_without_momentum_keeps_no_buffer() -> None:
    g = params()
    (u,), state = run(torchopt.trace(0.0), params(), [g])
    assert_close(u, g)
    assert state.slots == {}


def test_trace_refuses_nesterov_without_momentum_or_with_dampening() -> None:
    for arguments in ((0.0, 0.0, True), (0.9, 0.1, True)):
        with pytest.raises(ValueError, match="Nesterov momentum needs"):
            torchopt.trace(*arguments)


def test_add_decayed_weights() -> None:
    p, g = params(), params()
    (u,), _ = run(torchopt.add_decayed_weights(0.2), p, [g])
    assert_close(u, {k: g[k] + 0.2 * p[k] for k in p})
    with pytest.raises(ValueError, match="needs the parameters"):
        torchopt.add_decayed_weights(0.2).update(g, torchopt.OptState(0, {}))


DECAY_MASKS = {
    "tree": {"w": True, "b": False},
    "function": not_bias,
}


@pytest.mark.parametrize("mask", DECAY_MASKS.values(), ids=DECAY_MASKS.keys())
def test_add_decayed_weights_where_the_mask_is_true(mask: Any) -> None:
    p, g = params(), params()
    (u,), _ = run(torchopt.add_decayed_weights(0.2, mask), p, [g])
    assert_close(u, {"w": g["w"] + 0.2 * p["w"], "b": g["b"]})


@pytest.mark.parametrize("order", [1.0, 2.0, 3.0, 0.5, math.inf], ids="order-{}".format)
@pytest.mark.parametrize("size", ["too-large", "small"])
def test_clip_grad_norm_is_that_of_torch(order: float, size: str) -> None:
    g = params()
    leaves = [torch.nn.Parameter(x) for x in g.values()]
    for leaf in leaves:
        leaf.grad = leaf.detach().clone()
    norm = torch.nn.utils.get_total_norm(list(g.values()), order)
    bound = float(norm) * (0.3 if size == "too-large" else 3.0)
    torch.nn.utils.clip_grad_norm_(leaves, bound, order)
    (u,), _ = run(torchopt.clip_grad_norm(bound, order), params(), [g])
    assert_close(list(u.values()), [leaf.grad for leaf in leaves])
    found = torch.nn.utils.get_total_norm(list(u.values()), order)
    assert_close(found, 0.3 * norm if size == "too-large" else norm, times=1e7)


@pytest.mark.parametrize("bound", [0.3, 3.0])
def test_clip_by_global_norm_divides_by_the_norm_alone(bound: float) -> None:
    g = params()
    norm = torch.cat([x.flatten() for x in g.values()]).norm()
    (u,), _ = run(torchopt.clip_by_global_norm(bound * float(norm)), params(), [g])
    assert_close(u, {name: x * min(1.0, bound) for name, x in g.items()})


def test_clip_by_global_norm_of_zero_has_derivatives() -> None:
    zero = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    for bound in (0.0, 1.0):
        tx = torchopt.clip_by_global_norm(bound)
        u = tx.update([zero], tx.init([zero]), inplace=False)[0][0]
        assert not u.any()
        (g,) = torch.autograd.grad(u.sum(), zero, create_graph=True)
        assert torch.equal(g, torch.ones_like(g))


def test_clip_grad_norm_is_over_all_groups() -> None:
    tx = torchopt.chain(torchopt.clip_grad_norm(1.0), torchopt.sgd(1.0))
    a, b = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torchopt.Optimizer([{"params": [a]}, {"params": [b], "lr": 0.5}], tx)
    a.grad, b.grad = torch.tensor([3.0]), torch.tensor([4.0])
    optimizer.step()
    assert_close([a.detach(), b.detach()], [torch.tensor([-0.6]), torch.tensor([-0.4])])
    assert optimizer.param_groups[0]["max_norm"] == 1.0


def test_clip_grad_norm_is_differentiated() -> None:
    tx, g = torchopt.clip_grad_norm(0.5), nonzero(4, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        return tx.update([x], tx.init([x]), inplace=False)[0][0]

    jacobian = torch.autograd.functional.jacobian(function, g)
    norm = g.detach().norm()
    n = norm + 1e-6
    outer = torch.outer(g.detach(), g.detach())
    expected = 0.5 * (torch.eye(4).double() / n - outer / (norm * n**2))
    assert_close(jacobian, expected, times=10)


def test_clip_grad_norm_of_zero_and_of_no_gradients() -> None:
    tx = torchopt.clip_grad_norm(1.0)
    zero = [torch.zeros(3, requires_grad=True)]
    (u,), _ = tx.update(zero, tx.init(zero), inplace=False)
    (slope,) = torch.autograd.grad(u.sum(), zero)
    assert torch.equal(u, torch.zeros(3))
    assert torch.isfinite(slope).all()
    nothing, _ = tx.update([None], tx.init([torch.ones(1)]))
    assert nothing == [None]
    empty, _ = tx.update([torch.ones(0)], tx.init([torch.ones(0)]))
    assert empty[0].shape == (0,)


def test_clip_grad_norm_may_refuse_infinite_norms() -> None:
    tx = torchopt.clip_grad_norm(1.0, error_if_nonfinite=True)
    g = [torch.tensor([1.0, math.inf])]
    with pytest.raises(RuntimeError, match="not finite"):
        tx.update(g, tx.init(g))
    finite = [torch.tensor([3.0, 4.0])]
    assert_close(tx.update(finite, tx.init(finite))[0][0], torch.tensor([0.6, 0.8]))


@pytest.mark.parametrize("order", [0.0, -1.0, math.nan], ids=str)
def test_clip_grad_norm_refuses_an_order_that_is_no_norm(order: float) -> None:
    with pytest.raises(ValueError, match="norm_type must be > 0"):
        torchopt.clip_grad_norm(1.0, order)


def test_clip_grad_value() -> None:
    g = params()
    (u,), _ = run(torchopt.clip_grad_value(0.4), params(), [g])
    assert_close(u, {k: v.clamp(-0.4, 0.4) for k, v in g.items()})
    limit = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    (u,), _ = run(torchopt.clip_grad_value(limit), params(), [g])
    assert_close(u["w"].detach(), g["w"].clamp(-0.4, 0.4))
    (slope,) = torch.autograd.grad(u["w"].sum(), limit)
    assert slope.item() == g["w"][g["w"].abs() > 0.4].sign().sum().item()


def test_nan_to_num() -> None:
    g = [torch.tensor([math.nan, math.inf, -math.inf, 1.5])]
    (u,), _ = run(torchopt.nan_to_num(7.0, 8.0, -9.0), g, [g])
    assert u[0].tolist() == [7.0, 8.0, -9.0, 1.5]
    (u,), _ = run(torchopt.nan_to_num(), g, [g])
    largest = torch.finfo(torch.float32).max
    assert u[0].tolist() == [0.0, largest, -largest, 1.5]


def test_register_hook_sees_what_flows_back() -> None:
    seen: list[Tensor] = []
    tx = torchopt.chain(torchopt.register_hook(seen.append), torchopt.scale(3.0))
    g = nonzero(3).requires_grad_()
    (u,), _ = tx.update([g], tx.init([g]), inplace=False)
    assert not seen
    torch.autograd.grad(u.sum(), g)
    assert len(seen) == 1
    assert_close(seen[0], torch.full((3,), 3.0, dtype=torch.float64))
    tx = torchopt.register_hook(double)
    (u,), _ = tx.update([g], tx.init([g]), inplace=False)
    assert_close(torch.autograd.grad(u.sum(), g)[0], torch.full((3,), 2.0, dtype=torch.float64))
    (slope,) = torch.autograd.grad(g.sum(), g)  # the caller's own tensor has no hook
    assert_close(slope, torch.ones(3, dtype=torch.float64))


def test_register_hook_lets_plain_gradients_pass() -> None:
    g = params()
    (u,), _ = run(torchopt.register_hook(double), g, [g])
    assert_close(u, g)
    with pytest.raises(TypeError, match="expects a function of a gradient"):
        torchopt.register_hook(3)


@pytest.mark.parametrize("amsgrad", [False, True], ids=["adam", "amsgrad"])
@pytest.mark.parametrize("eps_root", [0.0, 0.1], ids=["", "eps_root"])
def test_scale_by_adam(amsgrad: bool, eps_root: float) -> None:
    (b1, b2), eps, grads = (0.7, 0.8), 1e-2, [(t + 1) % 3 * 0.5 * nonzero(4) for t in range(6)]
    tx = torchopt.scale_by_adam((b1, b2), eps, eps_root, amsgrad)
    us, state = run(tx, nonzero(4), grads)
    largest = torch.zeros(4, dtype=torch.float64)
    for t in range(1, 7):
        m = sum((1 - b1) * b1 ** (t - i) * grads[i - 1] for i in range(1, t + 1))
        v = sum((1 - b2) * b2 ** (t - i) * grads[i - 1] ** 2 for i in range(1, t + 1))
        largest = torch.maximum(largest, v)
        w = largest if amsgrad else v
        expected = m / (1 - b1**t) / ((w / (1 - b2**t) + eps_root).sqrt() + eps)
        assert_close(us[t - 1], expected, times=10)
    assert_close(state.exp_avg, m)
    assert_close(state.exp_avg_sq, v)
    assert ("max_exp_avg_sq" in state.slots) is amsgrad


@pytest.mark.parametrize("centered", [False, True], ids=["rms", "stddev"])
@pytest.mark.parametrize("start", [0.0, 1.0], ids="initial-{}".format)
def test_scale_by_rms_and_stddev(centered: bool, start: float) -> None:
    a, eps, grads = 0.8, 1e-2, [nonzero(4) for _ in range(5)]
    recipe = torchopt.scale_by_stddev if centered else torchopt.scale_by_rms
    us, state = run(recipe(a, eps, start), nonzero(4), grads)
    for t in range(1, 6):
        v = a**t * start + sum((1 - a) * a ** (t - i) * grads[i - 1] ** 2 for i in range(1, t + 1))
        mean = sum((1 - a) * a ** (t - i) * grads[i - 1] for i in range(1, t + 1))
        expected = grads[t - 1] / ((v - mean**2 if centered else v).sqrt() + eps)
        assert_close(us[t - 1], expected, times=10)
    assert_close(state.square_avg, v)
    assert ("grad_avg" in state.slots) is centered
