"""Each transformation against its closed form; chains; printing, comparing, hashing, copying."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from conftest import nonzero, nonzero_like
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_close
from torch import Tensor

import torchopt
from torchopt.base import tree


def params() -> dict[str, Tensor]:
    return {"w": nonzero(2, 3), "b": nonzero(3)}


def run(
    tx: torchopt.GradientTransformation, p: Any, grads: list[Any], inplace: bool = False
) -> tuple[list[Any], Any]:
    """Return the updates of every step for fixed parameters, and the last state."""
    state, result = tx.init(p), []
    for g in grads:
        updates, state = tx.update(g, state, p, inplace=inplace)
        result.append(updates)
    return result, state


def double(g: Tensor) -> Tensor:
    """A hook that pickles."""
    return 2 * g


def not_bias(p: Any) -> Any:
    """A mask that pickles: everything but parameters named ``b``."""
    return {name: name != "b" for name in p}


# Closed forms ---------------------------------------------------------------------------------


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


def test_clip_grad_norm_is_clip_by_global_norm() -> None:
    assert torchopt.clip_grad_norm is torchopt.clip_by_global_norm


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


# masked -------------------------------------------------------------------------------------------

NESTED = {"body": {"w": torch.ones(2), "b": torch.ones(1)}, "head": [torch.ones(3)]}
MASKS = {
    "tree": {"body": {"w": True, "b": False}, "head": [True]},
    "prefix": {"body": True, "head": False},
    "prefix-and-leaf": {"body": {"w": False, "b": True}, "head": True},
    "rest": {"": True, "head": False},
    "true": True,
    "false": False,
    "function": lambda p: tree.tree_map(lambda x: x.numel() > 1, p),
    "function-prefix": lambda p: {name: name == "head" for name in p},
}
CHOSEN = {
    "tree": "body.w head.0",
    "prefix": "body.w body.b",
    "prefix-and-leaf": "body.b head.0",
    "rest": "body.w body.b",
    "true": "body.w body.b head.0",
    "false": "",
    "function": "body.w head.0",
    "function-prefix": "head.0",
}


@pytest.mark.parametrize("name", MASKS)
def test_masked_applies_where_the_mask_is_true(name: str) -> None:
    tx = torchopt.masked(torchopt.chain(torchopt.trace(0.5), torchopt.scale(2.0)), MASKS[name])
    us, state = run(tx, NESTED, [NESTED, NESTED])
    names, chosen = tree.leaf_names(NESTED), CHOSEN[name].split()
    for leaf, update in zip(names, tree.flatten(us[1])[0]):
        expected = 3.0 if leaf in chosen else 1.0
        assert torch.equal(update, torch.full_like(update, expected)), leaf
    if chosen:
        buffers = tree.flatten(state.momentum_buffer)[0]
        assert [n for n, x in zip(names, buffers) if x is not None] == [
            n for n in names if n in chosen
        ]
    else:
        assert state.slots == {}


BAD_MASKS = {
    "missing": ({"body": True}, ValueError, "no entry for parameter 'head.0'"),
    "misspelt": ({"body": True, "head": True, "haed": True}, ValueError, "names no parameter"),
    "number": ({"body": 1, "head": True}, TypeError, "'body.b' must be True or False, got 1"),
    "none": (None, TypeError, "must be True or False, got None"),
    "function": (lambda p: "yes", TypeError, "must be True or False, got 'yes'"),
    "tensor": ({"body": torch.tensor(True), "head": True}, TypeError, "must be True or False"),
}


@pytest.mark.parametrize(("mask", "error", "message"), BAD_MASKS.values(), ids=BAD_MASKS.keys())
def test_masked_refuses_masks_that_do_not_fit(mask: Any, error: type, message: str) -> None:
    tx = torchopt.masked(torchopt.scale(2.0), mask)
    with pytest.raises(error, match=message):
        tx.init(NESTED)


def test_masked_expects_a_transformation() -> None:
    with pytest.raises(TypeError, match="masked expects a gradient transformation"):
        torchopt.masked(torchopt.scale, True)


def test_masks_in_the_object_oriented_face() -> None:
    """There the parameters are a list; names work where they were given."""
    for named in (False, True):
        a, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
        mask: Any = {"a": True, "b": False} if named else [True, False]
        tx = torchopt.chain(torchopt.masked(torchopt.scale(0.0), mask), torchopt.sgd(1.0))
        optimizer = torchopt.Optimizer([("a", a), ("b", b)] if named else [a, b], tx)
        a.grad = b.grad = torch.ones(2)
        optimizer.step()
        assert a.tolist() == [1.0, 1.0]
        assert b.tolist() == [0.0, 0.0]


def test_masked_adam_leaves_no_state_for_the_others() -> None:
    a, b = (torch.nn.Parameter(nonzero(2)) for _ in range(2))
    tx = torchopt.chain(
        torchopt.masked(torchopt.scale_by_adam(), [True, False]), torchopt.scale(-1.0)
    )
    optimizer = torchopt.Optimizer([a, b], tx)
    a.grad = b.grad = nonzero(2)
    before = b.detach().clone()
    optimizer.step()
    assert "exp_avg" in optimizer.state[a]
    assert "exp_avg" not in optimizer.state[b]
    assert_close(b.detach(), before - b.grad)


# chain --------------------------------------------------------------------------------------------


def test_a_chain_of_none_and_of_one() -> None:
    assert torchopt.chain() == torchopt.identity()
    one = torchopt.scale(2.0)
    assert torchopt.chain(one) is one
    assert one.chain(torchopt.trace(0.5)) == torchopt.chain(one, torchopt.trace(0.5))


def test_a_chain_applies_in_order() -> None:
    g = [torch.tensor([3.0])]
    clip_last = torchopt.chain(torchopt.scale(10.0), torchopt.clip_grad_value(2.0))
    clip_first = torchopt.chain(torchopt.clip_grad_value(2.0), torchopt.scale(10.0))
    assert run(clip_last, g, [g])[0][0][0].item() == 2.0
    assert run(clip_first, g, [g])[0][0][0].item() == 20.0


def test_clashing_names_get_a_suffix() -> None:
    tx = torchopt.chain(
        torchopt.scale(2.0), torchopt.trace(0.5), torchopt.scale(3.0), torchopt.trace(0.25)
    )
    assert list(tx.hyperparameters().items()) == [
        ("step_size", 2.0),
        ("momentum", 0.5),
        ("dampening", 0.0),
        ("nesterov", False),
        ("step_size_2", 3.0),
        ("momentum_2", 0.25),
        ("dampening_2", 0.0),
        ("nesterov_2", False),
    ]
    assert tx.slot_names() == ("momentum_buffer", "momentum_buffer_2")
    g = [torch.ones(1)]
    us, state = run(tx, g, [g, g])
    # buffers: 2, 2 * 1.5 and 6, 9 + 6 / 4
    assert [u[0].item() for u in us] == [6.0, 10.5]
    assert state.momentum_buffer[0].item() == 3.0
    assert state.momentum_buffer_2[0].item() == 10.5
    third = torchopt.chain(tx, torchopt.scale(1.0))
    assert list(third.hyperparameters())[-1] == "step_size_3"


def test_suffixed_hyperparameters_are_live_in_param_groups() -> None:
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = torchopt.Optimizer([p], torchopt.chain(torchopt.scale(2.0), torchopt.scale(3.0)))
    optimizer.param_groups[0]["step_size_2"] = 5.0
    p.grad = torch.ones(1)
    optimizer.step()
    assert p.item() == 10.0


@pytest.mark.parametrize(
    "bad",
    [torchopt.scale, torchopt.adam, torchopt.GradientTransformation, 0.1, None, "adam"],
    ids=["recipe", "optimizer-recipe", "class", "number", "none", "string"],
)
def test_chain_expects_transformations(bad: Any) -> None:
    with pytest.raises(TypeError, match="chain expects a gradient transformation such as"):
        torchopt.chain(torchopt.scale(1.0), bad)


# Printing, comparing, hashing, copying ------------------------------------------------------------

LINEAR = torchopt.schedules.linear(0.1, 0.0, 5)
TRANSFORMS = {
    "identity": (torchopt.identity, "chain()"),
    "scale": (lambda: torchopt.scale(-0.5), "Scale(step_size=-0.5)"),
    "scale-tensor": (
        lambda: torchopt.scale(torch.ones(3)),
        "Scale(step_size=float32[3])",
    ),
    "scale-tree": (
        lambda: torchopt.scale({"w": 1.0, "b": torch.ones(3)}),
        "Scale(step_size={'w': 1.0, 'b': float32[3]})",
    ),
    "scale_by_schedule": (
        lambda: torchopt.scale_by_schedule(LINEAR),
        f"ScaleBySchedule(step_size={LINEAR!r})",
    ),
    "scale_by_learning_rate": (
        lambda: torchopt.scale_by_learning_rate(0.1),
        "ScaleByLearningRate(lr=0.1)",
    ),
    "flip_sign": (torchopt.flip_sign, "FlipSign(maximize=True)"),
    "trace": (
        lambda: torchopt.trace(0.5, nesterov=True),
        "Trace(momentum=0.5, dampening=0.0, nesterov=True)",
    ),
    "add_decayed_weights": (
        lambda: torchopt.add_decayed_weights(0.1),
        "AddDecayedWeights(weight_decay=0.1)",
    ),
    "add_decayed_weights-mask": (
        lambda: torchopt.add_decayed_weights(0.1, {"w": True, "b": False}),
        "Masked(inner=AddDecayedWeights(weight_decay=0.1), mask={'w': True, 'b': False})",
    ),
    "clip_grad_norm": (
        lambda: torchopt.clip_grad_norm(1.0, math.inf),
        "ClipGradNorm(max_norm=1.0, norm_type=inf, error_if_nonfinite=False)",
    ),
    "clip_grad_value": (lambda: torchopt.clip_grad_value(1.0), "ClipGradValue(clip_value=1.0)"),
    "nan_to_num": (lambda: torchopt.nan_to_num(1.0), "NanToNum(nan=1.0, posinf=None, neginf=None)"),
    "masked": (
        lambda: torchopt.masked(torchopt.scale(0.0), not_bias),
        f"Masked(inner=Scale(step_size=0.0), mask={not_bias!r})",
    ),
    "partition": (
        lambda: torchopt.partition(
            {"a": torchopt.scale(0.5), "b": torchopt.set_to_zero()}, {"w": "a", "b": "b"}
        ),
        "Partition(transforms={'a': Scale(step_size=0.5), 'b': SetToZero()}, "
        "labels={'w': 'a', 'b': 'b'})",
    ),
    "set_to_zero": (torchopt.set_to_zero, "SetToZero()"),
    "freeze": (
        lambda: torchopt.freeze({"w": True, "b": False}),
        "Masked(inner=SetToZero(), mask={'w': True, 'b': False})",
    ),
    "register_hook": (lambda: torchopt.register_hook(double), f"RegisterHook(hook={double!r})"),
    "scale_by_adam": (
        lambda: torchopt.scale_by_adam((0.5, 0.75), amsgrad=True),
        "ScaleByAdam(betas=(0.5, 0.75), eps=1e-08, eps_root=0.0, amsgrad=True)",
    ),
    "scale_by_rms": (
        lambda: torchopt.scale_by_rms(0.5),
        "ScaleByRms(alpha=0.5, eps=1e-08, centered=False, initial_scale=0.0)",
    ),
    "scale_by_stddev": (
        lambda: torchopt.scale_by_stddev(0.5),
        "ScaleByRms(alpha=0.5, eps=1e-08, centered=True, initial_scale=0.0)",
    ),
    "chain": (
        lambda: torchopt.chain(torchopt.scale(2.0), torchopt.flip_sign()),
        "chain(Scale(step_size=2.0), FlipSign(maximize=True))",
    ),
    "adam": (
        lambda: torchopt.adam(LINEAR, betas=(torch.tensor(0.5), 0.75)),
        "chain(FlipSign(maximize=False), AddDecayedWeights(weight_decay=0.0), "
        "ScaleByAdam(betas=(float32[], 0.75), eps=1e-08, eps_root=0.0, amsgrad=False), "
        f"ScaleByLearningRate(lr={LINEAR!r}))",
    ),
}
every_transform = pytest.mark.parametrize(
    ("make", "shown"), TRANSFORMS.values(), ids=TRANSFORMS.keys()
)


def test_every_exported_transform_is_in_the_table() -> None:
    recipes = {
        name
        for name in dir(torchopt)
        if callable(getattr(torchopt, name))
        and getattr(getattr(torchopt, name), "__module__", "").startswith("torchopt.transforms")
    } | {"scale_by_adam", "scale_by_rms", "scale_by_stddev", "chain"}
    recipes -= {"clip_by_global_norm"}  # another name of clip_grad_norm
    assert recipes <= set(TRANSFORMS)


@every_transform
def test_repr(make: Any, shown: str) -> None:
    assert repr(make()) == shown


@every_transform
def test_equality_and_hash(make: Any, shown: str) -> None:
    one, two = make(), make()
    assert one == two
    assert hash(one) == hash(two)
    assert len({one, two}) == 1
    assert one != torchopt.scale(123.0)
    assert (one == 3) is False


@every_transform
def test_equality_tells_every_transform_from_the_others(make: Any, shown: str) -> None:
    equal = [name for name, (other, _) in TRANSFORMS.items() if other() == make()]
    assert len(equal) == 1


@every_transform
@pytest.mark.parametrize("clone", ["pickle", "deepcopy", "copy"])
def test_copies_are_equal_and_work(make: Any, shown: str, clone: str) -> None:
    tx = make()
    _ = tx.plan  # a plan made before must not get in the way
    if clone == "pickle":
        new = pickle.loads(pickle.dumps(tx))
    else:
        new = getattr(copy, clone)(tx)
    assert new == tx
    assert repr(new) == shown
    p = {"w": nonzero(2, 3), "b": nonzero(3)}
    grads = [nonzero_like(p) for _ in range(2)]
    expected, state = run(tx, p, grads)
    found, new_state = run(new, p, grads)
    assert_close(found, expected)
    assert_close(new_state.slots, state.slots)


@every_transform
def test_transformations_are_frozen(make: Any, shown: str) -> None:
    tx = make()
    for name in tx.__dataclass_fields__:
        with pytest.raises(AttributeError, match="cannot assign"):
            setattr(tx, name, 3)
    assert repr(tx) == shown


def test_tensors_compare_by_value_and_dtype() -> None:
    assert torchopt.scale(torch.ones(2)) == torchopt.scale(torch.ones(2))
    assert torchopt.scale(torch.ones(2)) != torchopt.scale(torch.zeros(2))
    assert torchopt.scale(torch.ones(2)) != torchopt.scale(torch.ones(2).double())
    assert torchopt.scale(torch.tensor(1.0)) != torchopt.scale(1.0)


def test_schedules_with_tensors_compare() -> None:
    def make(value: float) -> torchopt.GradientTransformation:
        return torchopt.sgd(torchopt.schedules.linear(torch.full((2,), value), 0.0, 5))

    assert make(1.0) == make(1.0)
    assert make(1.0) != make(2.0)


# Properties ---------------------------------------------------------------------------------------

PARTS = st.sampled_from(
    [
        torchopt.scale(-0.5),
        torchopt.scale(1.5),
        torchopt.trace(0.5),
        torchopt.trace(0.9, nesterov=True),
        torchopt.add_decayed_weights(0.1),
        torchopt.clip_grad_norm(0.7),
        torchopt.clip_grad_value(0.6),
        torchopt.scale_by_adam(),
        torchopt.scale_by_adam(amsgrad=True),
        torchopt.scale_by_stddev(),
        torchopt.flip_sign(),
        torchopt.identity(),
        torchopt.scale_by_schedule(LINEAR),
        torchopt.masked(torchopt.trace(0.3), lambda p: tree.tree_map(lambda x: x.dim() == 1, p)),
    ]
)
KEYS = st.text("abcxyz", min_size=1, max_size=3)
SHAPES = st.lists(st.integers(1, 3), max_size=2).map(tuple)
SHAPE_TREES = st.recursive(
    SHAPES.map(lambda shape: ("leaf", shape)),
    lambda children: (
        st.dictionaries(KEYS, children, max_size=3).map(lambda x: ("dict", x))
        | st.lists(children, max_size=3).map(lambda x: ("list", x))
        | st.lists(children, max_size=3).map(lambda x: ("tuple", tuple(x)))
    ),
    max_leaves=6,
)


def build(shapes: Any) -> Any:
    """Make a tree of random tensors from a drawn description."""
    kind, value = shapes
    if kind == "leaf":
        return nonzero(*value)
    if kind == "dict":
        return {key: build(child) for key, child in value.items()}
    return type(value)(build(child) for child in value)


@settings(max_examples=60, deadline=None, database=None)
@given(shapes=SHAPE_TREES, parts=st.lists(PARTS, max_size=4))
def test_trees_of_any_structure(shapes: Any, parts: list[Any]) -> None:
    """Slots, updates and new parameters have the structure and shapes of the parameters."""
    tx, p = torchopt.chain(*parts), build(shapes)
    leaves, spec = tree.flatten(p)
    state = tx.init(p)
    assert set(state.slots) <= set(tx.slot_names())
    grads = tree.tree_map(lambda x: nonzero(*x.shape), p)
    updates, new = tx.update(grads, state, p, inplace=False)
    result = torchopt.apply_updates(p, updates, inplace=False)
    for value in (updates, result, *state.slots.values(), *new.slots.values()):
        found, structure = tree.flatten(value)
        assert structure == spec
        assert all(
            x is None or (x.shape == y.shape and x.dtype == y.dtype) for x, y in zip(found, leaves)
        )
    for before, after, u in zip(leaves, tree.flatten(result)[0], tree.flatten(updates)[0]):
        assert torch.equal(after, before + u)
    assert new.step == 1


@settings(max_examples=60, deadline=None, database=None)
@given(a=PARTS, b=PARTS, c=PARTS)
def test_chain_is_associative(a: Any, b: Any, c: Any) -> None:
    left, right = torchopt.chain(torchopt.chain(a, b), c), torchopt.chain(a, torchopt.chain(b, c))
    assert left == right == torchopt.chain(a, b, c)
    assert hash(left) == hash(right)
    assert left.hyperparameters().keys() == right.hyperparameters().keys()
    assert left.slot_names() == right.slot_names()
    assert torchopt.chain(torchopt.identity(), left) == left
    p = [nonzero(3), nonzero(2, 2)]
    grads = [nonzero_like(p) for _ in range(2)]
    found, expected = run(left, p, grads)[0], run(right, p, grads)[0]
    assert all(torch.equal(x, y) for one, two in zip(found, expected) for x, y in zip(one, two))


@settings(max_examples=60, deadline=None, database=None)
@given(parts=st.lists(PARTS, min_size=1, max_size=4))
def test_a_chain_is_its_parts_one_after_the_other(parts: list[Any]) -> None:
    p = [nonzero(3), nonzero(2, 2)]
    grads = [nonzero_like(p) for _ in range(3)]
    found = run(torchopt.chain(*parts), p, grads)[0]
    states = [tx.init(p) for tx in parts]
    for step, g in enumerate(grads):
        for k, tx in enumerate(parts):
            g, states[k] = tx.update(g, states[k], p, inplace=False)
        assert_close(found[step], g, times=10)


def test_a_mask_function_sees_the_parameters_where_a_gradient_is_missing(nonzero: Any) -> None:
    params = {"w": nonzero(2, 3), "b": nonzero(3)}

    def matrices(tree: Any) -> Any:
        return {name: value.dim() > 1 for name, value in tree.items()}

    tx = torchopt.masked(torchopt.scale(2.0), matrices)
    grads = {"w": nonzero(2, 3), "b": None}
    updates, _ = tx.update(grads, tx.init(params), params, inplace=False)
    assert torch.equal(updates["w"], 2 * grads["w"])
    assert updates["b"] is None
    grads = {"w": None, "b": nonzero(3)}
    updates, _ = tx.update(grads, tx.init(params), params, inplace=False)
    assert updates["w"] is None
    assert torch.equal(updates["b"], grads["b"])
