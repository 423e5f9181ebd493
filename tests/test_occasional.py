"""Wrappers that run a transformation at some calls: MultiSteps, conditions, Lookahead."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch
from conftest import nonzero
from tolerances import META_GRADIENT, assert_close, relative_error

import torchopt
from torchopt import schedules


F64 = torch.float64
RATE = schedules.linear(0.3, 0.05, 4)

#: With a counter, a schedule, decoupled decay, a state for all parameters, another evaluation.
INSIDE: dict[str, Any] = {
    "momentum": lambda: torchopt.sgd(RATE, momentum=0.9, weight_decay=0.1),
    "adamw": lambda: torchopt.adamw(RATE),
    "nadam": lambda: torchopt.nadam(RATE),
    "clipped": lambda: torchopt.chain(torchopt.clip_grad_norm(0.5), torchopt.adam(RATE)),
    "schedule-free": lambda: torchopt.schedule_free_sgd(0.3, momentum=0.8),
    "masked": lambda: torchopt.chain(
        torchopt.masked(torchopt.trace(0.7), {"w": True, "b": False}), torchopt.scale(-0.1)
    ),
    "pair": lambda: torchopt.chain(counting(), torchopt.sgd(0.1)),
}
every_inside = pytest.mark.parametrize("name", INSIDE)


def counting() -> torchopt.GradientTransformation:
    """A pair of functions that divides by the number of its calls."""

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        return {k: u / (1 + state) for k, u in updates.items()}, state + 1

    return torchopt.GradientTransformation(lambda params: 0, update)


def start() -> dict[str, torch.Tensor]:
    return {"w": nonzero(2, 3), "b": nonzero(3)}


def steps(tx: Any, p: Any, grads: list[Any]) -> tuple[list[Any], Any]:
    """Return the parameters after every call, and the last state."""
    state, path = tx.init(p), []
    for g in grads:
        p, state = tx.apply_gradients(g, state, p, inplace=False)
        path.append(p)
    return path, state


def mean(grads: list[Any]) -> dict[str, torch.Tensor]:
    return {k: sum(g[k] for g in grads) / len(grads) for k in grads[0]}


# MultiSteps ---------------------------------------------------------------------------------------


@every_inside
def test_multi_steps_is_the_inside_with_the_mean_gradients(name: str) -> None:
    p, grads = start(), [start() for _ in range(7)]
    path, state = steps(torchopt.MultiSteps(INSIDE[name](), 3), p, grads)
    expected, inner = steps(INSIDE[name](), p, [mean(grads[:3]), mean(grads[3:6])])
    assert_close([path[2], path[5]], expected, times=10)
    assert all(torch.equal(path[n][k], path[n - 1][k]) for n in (3, 4, 6) for k in p)
    for slot, value in inner.slots.items():
        assert_close(state.slots[slot], value, times=10) if slot != "state" else None
    tx = torchopt.MultiSteps(INSIDE[name](), 3)
    evaluated = INSIDE[name]().eval_params(inner, expected[-1])
    assert_close(tx.eval_params(state, path[5]), evaluated, times=10)


def test_multi_steps_runs_the_inside_only_when_it_is_due() -> None:
    calls: list[int] = []

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        calls.append(1)
        return updates, state

    inside = torchopt.GradientTransformation(lambda params: (), update)
    steps(torchopt.MultiSteps(inside, 4), start(), [start() for _ in range(9)])
    assert len(calls) == 2


def test_multi_steps_with_sums_and_a_number_that_changes() -> None:
    p, grads = start(), [start() for _ in range(9)]
    tx = torchopt.MultiSteps(torchopt.nadam(RATE), lambda step: 1 + step, use_grad_mean=False)
    path, _ = steps(tx, p, grads)  # steps at calls 1, 3, 6
    sums = [{k: sum(g[k] for g in grads[a:b]) for k in p} for a, b in ((0, 1), (1, 3), (3, 6))]
    expected, _ = steps(torchopt.nadam(RATE), p, sums)
    assert_close([path[0], path[2], path[5]], expected, times=10)
    assert_close(path[8], path[5])


def test_multi_steps_leaves_out_what_is_not_finite() -> None:
    p, grads = start(), [start() for _ in range(6)]
    tx = torchopt.MultiSteps(torchopt.nadam(0.1), 2, should_skip_update_fn=torchopt.skip_not_finite)
    bad = {"w": torch.full((2, 3), math.nan, dtype=F64), "b": grads[0]["b"]}
    path, state = steps(tx, p, [grads[0], bad, grads[1], bad, bad, grads[2], grads[3]])
    expected, _ = steps(torchopt.nadam(0.1), p, [mean(grads[:2]), mean(grads[2:4])])
    assert_close([path[2], path[6]], expected, times=10)
    assert_close(path[5], path[2])
    assert state.skipped["w"].item() == 3


@every_inside
def test_a_meta_gradient_reaches_every_accumulated_gradient(name: str) -> None:
    p, grads = start(), torch.stack([nonzero(9) for _ in range(5)])

    def trained(grads: Any) -> Any:
        trees = [{"w": g[:6].reshape(2, 3), "b": g[6:]} for g in grads]
        path, _ = steps(torchopt.MultiSteps(INSIDE[name](), 2), p, trees)
        return sum(x.square().sum() for x in path[-1].values())

    grads.requires_grad_()
    (found,) = torch.autograd.grad(trained(grads), grads)
    assert not found[4].any()
    h, expected = 1e-6, torch.zeros_like(grads)
    with torch.no_grad():
        for index in [(i, j) for i in range(4) for j in (0, 4, 8)]:
            e = torch.zeros_like(grads)
            e[index] = h
            expected[index] = (trained(grads + e) - trained(grads - e)) / (2 * h)
            assert found[index].item() != 0
    known = expected != 0
    assert relative_error(found[known], expected[known]) < META_GRADIENT


def test_multi_steps_in_the_other_faces() -> None:
    net, meta_net = (torch.nn.Linear(3, 2).double() for _ in range(2))
    meta_net.load_state_dict(net.state_dict())
    p = {name: x.detach().clone() for name, x in net.named_parameters()}
    tx = torchopt.MultiSteps(torchopt.nadam(RATE), 2)
    optimizer = torchopt.Optimizer(net.parameters(), tx)
    meta = torchopt.MetaOptimizer(meta_net, tx)
    grads = [{"weight": nonzero(2, 3), "bias": nonzero(2)} for _ in range(5)]
    path, _ = steps(tx, p, grads)
    rates = []
    for n, g in enumerate(grads):
        if n == 3:  # in the middle
            saved = pickle.loads(pickle.dumps(optimizer.state_dict()))
            optimizer = torchopt.Optimizer(net.parameters(), tx)
            optimizer.load_state_dict(saved)
        for name, x in net.named_parameters():
            x.grad = g[name].clone()
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        meta.step(sum((x * g[name]).sum() for name, x in meta_net.named_parameters()))  # pyright: ignore[reportArgumentType]
    assert_close(dict(net.named_parameters()), path[-1], times=10)
    assert_close(dict(meta_net.named_parameters()), path[-1], times=10)
    assert rates == pytest.approx([RATE(0), RATE(0), RATE(1), RATE(1), RATE(2)])


def test_parameters_without_gradients_wait_for_their_own_turn() -> None:
    p, g = start(), start()
    tx = torchopt.MultiSteps(torchopt.sgd(1.0), 2)
    path, _ = steps(tx, p, [g, {"w": g["w"], "b": None}, g])
    assert_close(path[1], {"w": p["w"] - g["w"], "b": p["b"]}, times=10)
    assert_close(path[2]["b"], p["b"] - g["b"], times=10)


# Conditions ---------------------------------------------------------------------------------------


def at_odd_calls(count: int, **extra: Any) -> bool:
    return bool(count % 2)


@pytest.mark.parametrize("forward", [False, True], ids=["by-count", "by-values"])
@every_inside
def test_conditionally_transform_and_mask(name: str, forward: bool) -> None:
    p, grads = start(), [start() for _ in range(6)]
    if forward and name not in ("schedule-free", "masked", "pair"):
        pytest.skip("schedules count all calls there")
    state, other = (
        wrap(INSIDE[name](), at_odd_calls, forward).init(p)
        for wrap in (torchopt.conditionally_transform, torchopt.conditionally_mask)
    )
    through = torchopt.conditionally_transform(INSIDE[name](), at_odd_calls, forward)
    nothing = torchopt.conditionally_mask(INSIDE[name](), at_odd_calls, forward)
    inside, inner = INSIDE[name](), INSIDE[name]().init(p)
    for n, g in enumerate(grads):
        found, state = through.update(g, state, p, inplace=False)
        masked, other = nothing.update(g, other, p, inplace=False)
        if n % 2:
            expected, inner = inside.update(g, inner, p, inplace=False)
            assert_close([found, masked], [expected, expected], times=10)
        else:
            assert_close(found, g)
            assert not any(u.any() for u in masked.values())


def test_a_condition_reads_extra_values() -> None:
    tx = torchopt.conditionally_transform(
        torchopt.scale(-1.0), lambda step, *, loss: loss > 1.0, forward_extra_args=True
    )
    g = start()
    state = tx.init(g)
    for loss, sign in ((0.5, 1), (2.0, -1)):
        u, state = tx.update(g, state, g, loss=loss, inplace=False)
        assert_close(u, {k: sign * x for k, x in g.items()})


def test_apply_if_finite_leaves_calls_out_as_optax_does() -> None:
    """Up to two in a row; the third is taken as it is, and nan stays in the moments."""
    p, grads = start(), [start() for _ in range(3)]
    bad = {"w": torch.full((2, 3), math.inf, dtype=F64), "b": grads[0]["b"]}
    tx, inside = torchopt.apply_if_finite(torchopt.nadam(0.1), 2), torchopt.nadam(0.1)
    path, state = steps(tx, p, [grads[0], bad, bad, grads[1], bad, grads[2]])
    expected, inner = steps(inside, p, grads)
    assert_close([path[0], path[3], path[5]], expected, times=10)
    assert_close([path[2], path[4]], [path[0], path[3]])
    assert_close(state.exp_avg, inner.exp_avg, times=10)
    counts = [state.slots[n]["b"].item() for n in ("notfinite_count", "total_notfinite")]
    assert counts == [0, 3]
    path, state = steps(tx, p, [grads[0], bad, bad, bad])
    assert not path[3]["w"].isfinite().any()
    assert state.notfinite_count["w"].item() == 3


def test_a_meta_gradient_is_finite_where_a_call_was_left_out() -> None:
    tx, p = torchopt.apply_if_finite(torchopt.adam(0.1), 2), start()
    good, bad = nonzero(3), torch.tensor([1.0, math.nan, 2.0], dtype=F64)
    for g in (good, bad):
        g.requires_grad_()
    path, _ = steps(tx, p["b"], [good, bad, good])
    found = torch.autograd.grad(
        path[-1].sum(), [good, bad], allow_unused=True, materialize_grads=True
    )
    assert found[0].isfinite().all()
    assert not found[1].any()


# Lookahead ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reset", [False, True], ids=["keeping", "resetting"])
@every_inside
def test_lookahead_is_the_algorithm_of_the_paper(name: str, reset: bool) -> None:
    if name == "pair" and reset:
        pytest.skip("the state of a pair is its own")
    p, grads = start(), [start() for _ in range(7)]
    path, state = steps(torchopt.lookahead(INSIDE[name](), 3, 0.4, reset), p, grads)
    tx = INSIDE[name]()
    scheduled = any(x is RATE for x in tx.hyperparameters().values())
    fast, slow, inner = p, p, tx.init(p)
    for n, g in enumerate(grads, 1):
        fast, inner = tx.apply_gradients(g, inner, fast, inplace=False)
        if n % 3 == 0:
            slow = {k: slow[k] + 0.4 * (fast[k] - slow[k]) for k in p}
            fast, inner = slow, tx.init(slow) if reset else inner
        if n <= 3 or not (reset and scheduled):  # a schedule goes on counting in the wrapper
            assert_close(path[n - 1], fast, times=10)
    if not reset:
        assert_close(state.slow, slow, times=10)


@pytest.mark.parametrize("face", ["object-oriented", "differentiable"])
def test_lookahead_in_the_other_faces(face: str) -> None:
    tx = torchopt.lookahead(torchopt.sgd(0.3, momentum=0.9), 2, 0.4)
    net = torch.nn.Linear(3, 2).double()
    p = {name: x.detach().clone() for name, x in net.named_parameters()}
    grads = [{"weight": nonzero(2, 3), "bias": nonzero(2)} for _ in range(5)]
    path, _ = steps(tx, p, grads)
    make = torchopt.MetaOptimizer if face == "differentiable" else torchopt.Optimizer
    optimizer: Any = make(net if face == "differentiable" else net.parameters(), tx)  # pyright: ignore[reportArgumentType]
    for g in grads:
        if face == "differentiable":
            optimizer.step(sum((x * g[name]).sum() for name, x in net.named_parameters()))
            continue
        for name, x in net.named_parameters():
            x.grad = g[name].clone()
        optimizer.step()
    assert_close(dict(net.named_parameters()), path[-1], times=10)


# Bad arguments ------------------------------------------------------------------------------------

SGD = torchopt.sgd(0.1)
BAD: dict[str, Any] = {
    "k": (lambda: torchopt.MultiSteps(SGD, 0), ValueError, "every_k_schedule must be >= 1, got 0"),
    "k-float": (lambda: torchopt.MultiSteps(SGD, 2.5), TypeError, "must be an integer, or a funct"),  # pyright: ignore[reportArgumentType]
    "skip": (lambda: torchopt.MultiSteps(SGD, 2, True, 3), TypeError, "should_skip_update_fn must"),  # pyright: ignore[reportArgumentType]
    "opt": (lambda: torchopt.MultiSteps(torchopt.SGD, 2), TypeError, "MultiSteps"),  # pyright: ignore[reportArgumentType]
    "errors": (lambda: torchopt.apply_if_finite(SGD, -1), ValueError, "integer >= 0, got -1"),
    "function": (
        lambda: torchopt.conditionally_transform(SGD, 3),  # pyright: ignore[reportArgumentType]
        TypeError,
        "conditionally_transform expects a function",
    ),
    "period": (lambda: torchopt.lookahead(SGD, 0), ValueError, "sync_period must be an integer"),
    "slow": (lambda: torchopt.lookahead(SGD, 2, 1.5), ValueError, "slow_step_size must be >= 0"),
    "twice": (
        lambda: torchopt.lookahead(torchopt.lookahead(SGD, 2), 2),
        ValueError,
        "has a hyperparameter 'slow_step_size', and so has",
    ),
    "pairs": (lambda: torchopt.named_chain(SGD), TypeError, "named_chain expects pairs"),  # pyright: ignore[reportArgumentType]
    "names": (
        lambda: torchopt.named_chain(("a", SGD), ("a", SGD)),
        ValueError,
        "names of a named_chain must differ",
    ),
}


@pytest.mark.parametrize(("make", "error", "message"), BAD.values(), ids=BAD.keys())
def test_bad_arguments_are_refused(make: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@every_inside
def test_named_chain_is_the_chain_with_other_names(name: str) -> None:
    p, grads = start(), [start() for _ in range(4)]
    named = torchopt.named_chain(("inner", INSIDE[name]()), ("last", torchopt.scale(0.5)))
    chained = torchopt.chain(INSIDE[name](), torchopt.scale(0.5))
    found, state = steps(named, p, grads)
    expected, plain = steps(chained, p, grads)
    assert_close(found, expected, times=10)
    kept = {**plain.slots, **plain.counters}
    assert {f"inner.{slot}" for slot in kept} == {*state.slots, *state.counters}
    assert named.hyperparameters()["last.step_size"] == 0.5


def test_complex_parameters_where_no_slot_is_one_number() -> None:
    p, grads = torch.randn(3, dtype=torch.complex128), torch.randn(4, 3, dtype=torch.complex128)
    path, _ = steps(torchopt.MultiSteps(torchopt.adam(0.1), 2), p, list(grads))
    expected, _ = steps(torchopt.adam(0.1), p, [grads[:2].mean(0), grads[2:].mean(0)])
    assert_close([path[1], path[3]], expected, times=10)
    path, _ = steps(torchopt.lookahead(torchopt.sgd(0.1), 2), p, list(grads))
    assert_close(path[1], p - 0.05 * grads[:2].sum(0), times=10)
    for tx in (torchopt.MultiSteps(torchopt.nadam(0.1), 2), torchopt.apply_if_finite(SGD, 2)):
        with pytest.raises(TypeError, match="complex"):
            steps(tx, p, list(grads))
