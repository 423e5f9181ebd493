"""The step count is a leaf: what handles a state leaf by leaf keeps it whole."""

from __future__ import annotations

from typing import Any

import optree
import pytest
import torch
from fusing import needs_library
from torch.utils import _pytree as pytree

import torchopt
from tests.cases import Case, every_case
from tests.tolerances import assert_close


STEPS = 8


def some_params() -> dict[str, Any]:
    return {"w": 1 + torch.rand(3, 2, dtype=torch.float64), "b": 1 + torch.rand(2).double()}


def after_steps(tx: Any, params: Any, count: int = STEPS) -> Any:
    state = tx.init(params)
    for _ in range(count):
        grads = {name: 1 + torch.rand_like(p) for name, p in params.items()}
        params, state = tx.apply_gradients(grads, state, params, inplace=False)
    return params, state


def next_updates(tx: Any, state: Any, params: Any) -> list[torch.Tensor]:
    grads = {name: p.cos() for name, p in params.items()}
    updates, state = tx.update(grads, state, params, inplace=False)
    return [x.double() for x in [*updates.values(), *pytree.tree_leaves(state)]]


def copied_in_place(fresh: Any, saved: Any) -> Any:
    for a, b in zip(pytree.tree_leaves(fresh), pytree.tree_leaves(saved), strict=True):
        a.copy_(b)
    return fresh


def copied_by_optree(fresh: Any, saved: Any) -> Any:
    flat = [
        optree.tree_leaves(state, none_is_leaf=True, namespace="torchopt")
        for state in (fresh, saved)
    ]
    for a, b in zip(*flat, strict=True):
        a.copy_(b)
    return fresh


def loaded_by_path(fresh: Any, saved: Any) -> Any:
    stored = {pytree.keystr(path): x.clone() for path, x in pytree.tree_leaves_with_path(saved)}
    return pytree.tree_map_with_path(lambda path, _: stored[pytree.keystr(path)], fresh)


def mapped_over_both(fresh: Any, saved: Any) -> Any:
    return pytree.tree_map(lambda a, b: b + torch.zeros_like(a), fresh, saved)


WAYS = [copied_in_place, copied_by_optree, loaded_by_path, mapped_over_both]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@every_case
def test_a_state_handled_leaf_by_leaf_goes_on_as_it_was(case: Case, way: Any) -> None:
    tx = case.tx()
    params, saved = after_steps(tx, some_params())
    fresh = way(tx.init(params), saved)
    assert fresh.step == STEPS
    assert_close(next_updates(tx, fresh, params), next_updates(tx, saved, params))


@pytest.mark.parametrize("accelerated", [None, False])
def test_adam_is_not_taken_back_to_its_first_step(accelerated: bool | None) -> None:
    """A constant gradient moves every entry by the learning rate, whatever the count."""
    tx, p = torchopt.adam(0.1, eps=0.0, use_accelerated_op=accelerated), torch.ones(3)
    state = tx.init([p])
    for _ in range(STEPS):
        _, state = tx.update([torch.full((3,), 2.0)], state, inplace=False)
    fresh = copied_in_place(tx.init([p]), state)
    (update,), fresh = tx.update([torch.full((3,), 2.0)], fresh, inplace=False)
    assert_close(update, torch.full((3,), -0.1))
    assert fresh.step == STEPS + 1


def test_a_count_that_is_changed_in_place_counts() -> None:
    tx, params = torchopt.sgd(lambda count: 0.1 * (1 + count)), some_params()
    state = tx.init(params)
    pytree.tree_leaves(state)[-1].fill_(4)
    updates, state = tx.update(params, state, inplace=False)
    assert_close(updates["w"], -0.5 * params["w"])
    assert state.step == 5


def test_a_count_is_printed_as_a_number() -> None:
    state = torchopt.sgd().init({"w": torch.ones(2)})
    pytree.tree_leaves(state)
    assert repr(state) == "OptState(step=0)"


def test_counts_that_differ_are_leaves_each() -> None:
    tx, params = torchopt.adam(0.1), some_params()
    _, state = tx.update({**params, "b": None}, tx.init(params), params, inplace=False)
    again = pytree.tree_map(torch.clone, state)
    assert again.step == {"w": 1, "b": 0}
    assert all(isinstance(n, torch.Tensor) for n in again.step.values())
    assert_close(next_updates(tx, again, params), next_updates(tx, state, params))


def test_a_place_without_a_parameter_does_not_make_counts_differ() -> None:
    tx, params = torchopt.adam(0.1), {"w": torch.ones(2), "none": None}
    _, state = tx.update(params, tx.init(params), params, inplace=False)
    assert state.step == 1


@needs_library
def test_a_batch_of_states_is_read_where_all_counts_are_the_same() -> None:
    """So kernels serve an ensemble; the rules would see a batch of counts."""
    tx = torchopt.adam(0.1, use_accelerated_op=True)
    params = {name: torch.stack([p, 2 * p]) for name, p in some_params().items()}
    state = torch.vmap(tx.init)(params)
    assert state.step.tolist() == [0, 0]
    for count in (1, 2):
        grads = {name: p.sin() for name, p in params.items()}
        _, state = torch.vmap(lambda g, s: tx.update(g, s, inplace=False))(grads, state)
        assert state.step.tolist() == [count, count]


@pytest.mark.parametrize("recipe", [torchopt.adam, lambda lr: torchopt.sgd(lr, momentum=0.9)])
def test_a_batch_of_states_with_different_counts_is_a_loop_over_them(recipe: Any) -> None:
    tx = recipe(0.1)
    members = [after_steps(tx, some_params(), count) for count in (1, 5)]
    params, state = pytree.tree_map(lambda *xs: torch.stack(xs), *members)
    grads = {name: p.cos() for name, p in params.items()}
    step = lambda g, s, p: tx.update(g, s, p, inplace=False)  # noqa: E731
    updates, new = torch.vmap(step)(grads, state, params)
    assert new.step.tolist() == [2, 6]
    for k, (p, s) in enumerate(members):
        found = [x[k].double() for x in [*updates.values(), *pytree.tree_leaves(new)]]
        assert_close(found, next_updates(tx, s, p))


def test_the_state_of_a_batch_outside_of_vmap_is_refused() -> None:
    tx = torchopt.adam(0.1)
    state = torch.vmap(tx.init)(torch.ones(4, 3))
    with pytest.raises(ValueError, match=r"0-d tensor, got shape \(4,\).*vmap"):
        tx.update(torch.ones(4, 3), state)


def test_a_count_that_is_no_number_of_steps_is_refused() -> None:
    tx = torchopt.adam(0.1)
    state = torchopt.OptState(torch.tensor(0.5), tx.init([torch.ones(2)]).slots)
    with pytest.raises(ValueError, match=r"whole number, got 0\.5"):
        tx.update([torch.ones(2)], state)


def test_a_state_that_has_been_taken_apart_compiles() -> None:
    tx, params = torchopt.adam(0.1), some_params()
    params, state = after_steps(tx, params, 3)
    expected = next_updates(tx, state, params)
    state = pytree.tree_map(torch.clone, state)
    assert isinstance(state.step, torch.Tensor)
    torch._dynamo.reset()
    step = torch.compile(
        lambda g, s, p: tx.update(g, s, p, inplace=False), fullgraph=True, backend="aot_eager"
    )
    updates, new = step({name: p.cos() for name, p in params.items()}, state, params)
    assert_close([x.double() for x in [*updates.values(), *pytree.tree_leaves(new)]], expected)
