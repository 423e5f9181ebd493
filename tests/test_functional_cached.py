"""Functional updates like earlier ones take a short way; whatever differs must still be seen."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from conftest import nonzero
from fusing import needs_library
from tolerances import assert_close

import torchopt
from torchopt.core import engine
from torchopt.kernels import cached_call, fused


pytestmark = needs_library

SHAPES = {"w": (3, 4), "b": (4,), "deep": (2, 2, 2)}
RECIPES = {
    "adam": lambda use: torchopt.adam(0.05, weight_decay=0.1, use_accelerated_op=use),
    "amsgrad": lambda use: torchopt.adam(0.05, amsgrad=True, use_accelerated_op=use),
    "sgd": lambda use: torchopt.sgd(0.05, use_accelerated_op=use),
    "momentum": lambda use: torchopt.sgd(0.05, momentum=0.9, use_accelerated_op=use),
    "nadam": lambda use: torchopt.nadam(0.05, use_accelerated_op=use),  # a counter
    "schedule": lambda use: torchopt.adam(lambda t: 0.1 / (t + 1), use_accelerated_op=use),
}


@pytest.fixture
def cached(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each fused update was like an earlier one."""
    cached_call.executable.cache_clear()
    seen: list[bool] = []
    original = fused.take_cached

    def watched(*args: Any) -> Any:
        result = original(*args)
        seen.append(result is not None)
        return result

    monkeypatch.setattr(engine.accelerator, "take_cached", watched)
    return seen


def tensors(seed: int, dtype: torch.dtype = torch.float64, grad: bool = False) -> dict[str, Any]:
    torch.manual_seed(seed)
    return {n: nonzero(*s).to(dtype).requires_grad_(grad) for n, s in SHAPES.items()}


def steps(tx: Any, count: int, change: Any = None, grad: bool = False) -> list[Any]:
    """Return everything that some steps make, and the derivative by what went in."""
    params, state = tensors(0, grad=grad), None
    start, made, given = params, [], []
    state = tx.init(params)
    for k in range(count):
        g = tensors(10 + k, grad=grad)
        given.append(g)
        if change is not None and k == 3:
            params, state, g = change(params, state, g)
        params, state = tx.apply_gradients(g, state, params, inplace=False)
        made.append((params, state.slots))
    if grad:
        loss: Any = sum((p * p).sum() for p in params.values())
        inputs = [x for tree in (start, *given) for x in tree.values()]
        made.append(torch.autograd.grad(loss, inputs, allow_unused=True))
    return made


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", RECIPES)
def test_cached_updates_are_those_of_the_rules(cached: list[bool], name: str, grad: bool) -> None:
    fast = steps(RECIPES[name](None), 6, grad=grad)
    assert cached[3:] == [True] * 3
    slow = steps(RECIPES[name](False), 6, grad=grad)
    for a, b in zip(fast, slow):
        assert_close(a, b)


def a_gradient_is_missing(params: Any, state: Any, g: Any) -> Any:
    return params, state, {**g, "b": None}


def a_gradient_is_transposed(params: Any, state: Any, g: Any) -> Any:
    return params, state, {**g, "w": nonzero(4, 3).double().t()}


def a_gradient_is_a_negative(params: Any, state: Any, g: Any) -> Any:
    lazy = torch.complex(g["w"], -g["w"]).conj().imag  # a view with the negative bit
    assert lazy.is_neg()
    return params, state, {**g, "w": lazy}


def a_gradient_is_expanded(params: Any, state: Any, g: Any) -> Any:
    return params, state, {**g, "w": nonzero(1, 4).double().expand(3, 4)}


def a_slot_is_in_another_layout(params: Any, state: Any, g: Any) -> Any:
    slots = {
        name: {**slot, "w": slot["w"].t().contiguous().t()} for name, slot in state.slots.items()
    }
    return params, torchopt.OptState(state.step, slots, state.counters), g


def counts_differ(params: Any, state: Any, g: Any) -> Any:
    return params, torchopt.OptState({"w": 3, "b": 7, "deep": 3}, state.slots, state.counters), g


def a_shape_differs(params: Any, state: Any, g: Any) -> Any:
    return (
        {**params, "w": params["w"][:2]},
        torchopt.OptState(
            state.step,
            {name: {**slot, "w": slot["w"][:2]} for name, slot in state.slots.items()},
            state.counters,
        ),
        {**g, "w": g["w"][:2]},
    )


@pytest.mark.parametrize("name", ["adam", "sgd", "momentum"])
@pytest.mark.parametrize(
    "change",
    [
        a_gradient_is_missing,
        a_gradient_is_transposed,
        a_gradient_is_a_negative,
        a_gradient_is_expanded,
        a_slot_is_in_another_layout,
        counts_differ,
        a_shape_differs,
    ],
)
def test_what_differs_at_one_step_is_seen(name: str, change: Any) -> None:
    fast, slow = (steps(RECIPES[name](use), 4, change) for use in (None, False))
    for a, b in zip(fast, slow):
        assert_close(a, b)


def test_several_trees_and_dtypes_in_turn(cached: list[bool]) -> None:
    results = []
    for use in (None, False):
        tx = RECIPES["adam"](use)
        runs: list[Any] = []
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            params = tensors(1, dtype)
            runs.append((params, tx.init(params)))
        for k in range(5):
            runs = [
                tx.apply_gradients(
                    tensors(20 + k, next(iter(p.values())).dtype), s, p, inplace=False
                )
                for p, s in runs
            ]
        results.append([p for p, _ in runs])
    assert cached[9:15] == [True] * 6
    for fast, slow, dtype in zip(*results, (torch.float64, torch.float32, torch.bfloat16)):
        assert_close(fast, slow, dtype)


def test_without_parameters(cached: list[bool]) -> None:
    made: list[Any] = []
    for use in (None, False):
        tx = torchopt.adam(0.1, use_accelerated_op=use)
        state, updates = tx.init(tensors(0)), None
        for k in range(4):
            updates, state = tx.update(tensors(k), state, inplace=False)
        made.append((updates, state.slots))
    assert cached[3]
    assert_close(*made)


def test_under_vmap_and_grad(cached: list[bool]) -> None:
    """A batch of trainings, each differentiated by its start and its learning rate."""

    def outcome(w: Any, lr: Any, x: Any, use: Any) -> Any:
        tx = torchopt.adam(lr, use_accelerated_op=use)
        params = {"w": w}
        state = tx.init(params)
        for _ in range(4):
            g = torch.func.grad(lambda p: (x @ p["w"]).sin().sum())(params)
            params, state = tx.apply_gradients(g, state, params, inplace=False)
        return params["w"].square().sum()

    torch.manual_seed(0)
    w, lr, x = nonzero(5, 3).double(), nonzero(5).abs().double() * 0.1, nonzero(5, 2, 3).double()

    def all_of(batch: tuple[Any, ...], use: Any, *fixed: Any) -> Any:
        def one(*given: Any) -> Any:
            w, lr, x = (given[0], *fixed, *given[1:])
            return outcome(w, lr, x, use)

        return torch.func.vmap(torch.func.grad(one, tuple(range(len(batch) - 1))))(*batch)

    assert_close(all_of((w, lr, x), None), all_of((w, lr, x), False))
    cached.clear()
    for _ in range(2):
        assert_close(all_of((w, x), None, 0.1), all_of((w, x), False, 0.1))
    assert any(cached)


def test_hyperparameters_changed_from_call_to_call(cached: list[bool]) -> None:
    """New numbers are arguments of a known update; a flag makes another one."""
    made = []
    for use in (None, False):
        params = tensors(0)
        state = torchopt.adam(0.1).init(params)
        for k in range(6):
            tx = torchopt.adam(0.1 + k / 100, maximize=k == 5, use_accelerated_op=use)
            params, state = tx.apply_gradients(tensors(k), state, params, inplace=False)
        made.append((params, state.slots))
    assert cached[2:5] == [True] * 3
    assert_close(*made)


def test_no_graph_is_kept_by_a_transformation() -> None:
    """A learned rate may be made anew at each step; its graph goes with whoever holds it."""
    made: list[weakref.ref[Any]] = []

    def schedule(step: Any) -> Any:
        rate = (torch.tensor(0.1, dtype=torch.float64, requires_grad=True) * 2).sqrt()
        made.append(weakref.ref(rate))
        return rate

    tx = torchopt.adam(schedule)
    params = tensors(0)
    state = tx.init(params)
    for k in range(4):
        params, state = tx.apply_gradients(tensors(k), state, params, inplace=False)
    del params, state
    gc.collect()
    assert len(made) >= 4
    assert {reference() for reference in made} == {None}


def test_numbers_of_a_call_that_another_one_interrupts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As another thread may: each goes on with the numbers of its own step."""
    tx = torchopt.adam(lambda step: 0.1 / (step + 1))
    others = tensors(1), tx.init(tensors(1))

    def run() -> Any:
        params = tensors(0)
        state = tx.init(params)
        for k in range(6):
            params, state = tx.apply_gradients(tensors(k), state, params, inplace=False)
        return params

    alone, interrupted = run(), []
    original = cached_call.CachedCall._group

    def group(*given: Any) -> Any:
        if not interrupted or interrupted[-1]:
            interrupted.append(False)
            tx.apply_gradients(tensors(9), others[1], others[0], inplace=False)
            interrupted.append(True)
        return original(*given)

    monkeypatch.setattr(cached_call.CachedCall, "_group", group)
    assert_close(run(), alone)
    assert interrupted.count(True) >= 3
