"""The functional face: init, update and apply_updates over any pytree."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from typing import Any

import pytest
import torch
from any_trees import b, every_tree, leaves_of, random_like, structure_of, tensors_of, w
from cases import Case, every_case, every_independent_case
from conftest import nonzero, nonzero_like
from tolerances import assert_close

import torchopt
from torchopt.base import tree


@pytest.mark.sampled(3)
@every_tree
@every_case
def test_a_tree_is_updated_leaf_by_leaf(case: Case, make: Any) -> None:
    """Three updates of a tree are those of its tensors as a plain list."""
    tx, params = case.tx(), make()
    flat = [x.clone() for x in tensors_of(params)]
    state, flat_state = tx.init(params), tx.init(flat)
    structure = structure_of(params)
    for _ in range(3):
        grads = random_like(params)
        updates, state = tx.update(grads, state, params, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)
        flat_updates, flat_state = tx.update(tensors_of(grads), flat_state, flat, inplace=False)
        flat = torchopt.apply_updates(flat, flat_updates, inplace=False)
        assert structure_of(updates) == structure_of(params) == structure
        assert_close(tensors_of(params), flat)
    steps = [state.step] if isinstance(state.step, int) else leaves_of(state.step)
    assert max(steps) == flat_state.step == 3
    assert set(state.slots) == set(flat_state.slots)
    for name, slot in state.slots.items():
        assert structure_of(slot) == structure
        assert_close(tensors_of(slot), tensors_of(flat_state.slots[name]))


@every_tree
def test_inplace_changes_the_tensors_of_the_tree(make: Any) -> None:
    params = make()
    tensors = tensors_of(params)
    expected = [x - 0.5 * 2.0 for x in tensors]
    grads = tree.tree_map(lambda x: torch.full_like(x, 2.0), params)
    tx = torchopt.sgd(0.5)
    updates, _ = tx.update(grads, tx.init(params), params)
    result = torchopt.apply_updates(params, updates)
    assert structure_of(result) == structure_of(params)
    assert all(x is y for x, y in zip(tensors_of(result), tensors))
    assert_close(tensors, expected)


def test_inplace_is_the_default() -> None:
    for function in (torchopt.GradientTransformation.update, torchopt.apply_updates):
        parameter = inspect.signature(function).parameters["inplace"]
        assert parameter.default is True
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY


@every_case
def test_inplace_and_pure_agree(case: Case) -> None:
    tx = case.tx()
    pure = {"w": w(), "b": b()}
    inplace = {name: x.clone() for name, x in pure.items()}
    states = [tx.init(pure), tx.init(inplace)]
    for _ in range(4):
        grads = nonzero_like(pure)
        updates, states[0] = tx.update(grads, states[0], pure, inplace=False)
        pure = torchopt.apply_updates(pure, updates, inplace=False)
        copies = {name: g.clone() for name, g in grads.items()}
        updates, states[1] = tx.update(copies, states[1], inplace, inplace=True)
        inplace = torchopt.apply_updates(inplace, updates, inplace=True)
    assert_close(inplace, pure)
    assert_close(states[1].slots, states[0].slots)


def test_an_empty_tree() -> None:
    tx = torchopt.adam()
    updates, state = tx.update({}, tx.init({}), {})
    assert updates == {}
    assert torchopt.apply_updates({}, updates) == {}
    assert isinstance(state, torchopt.OptState)


def test_a_tuple_of_grads_fits_a_list_of_params() -> None:
    """What ``torch.autograd.grad`` returns need not be converted."""
    tx = torchopt.adam(0.1)
    params = [w().requires_grad_(), b().requires_grad_()]
    state, twin = tx.init(params), tx.init(params)
    for _ in range(2):
        loss = sum((p**3).sum() for p in params)
        grads = torch.autograd.grad(loss, params)
        assert isinstance(grads, tuple)
        updates, state = tx.update(grads, state, params, inplace=False)
        expected, twin = tx.update(list(grads), twin, params, inplace=False)
        assert_close(list(updates), expected)
        params = torchopt.apply_updates(params, updates, inplace=False)
        assert isinstance(params, list)


def test_the_state_keeps_the_structure_of_the_params() -> None:
    tx = torchopt.adam(0.1)
    params = [w(), b()]
    _, state = tx.update((w(), b()), tx.init(params), params)
    assert isinstance(state.exp_avg, list)


def test_dicts_match_by_key_whatever_their_order() -> None:
    params = OrderedDict([("z", w()), ("a", b())])
    grads = {"a": b(), "z": w()}
    tx = torchopt.sgd(0.5, momentum=0.9)
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(grads, state, params, inplace=False)
    new = torchopt.apply_updates(params, updates, inplace=False)
    assert list(new) == ["z", "a"]
    for name in params:
        assert_close(new[name], params[name] - 0.5 * 1.9 * grads[name], what=name)


@every_independent_case
def test_a_missing_gradient_leaves_its_parameter_alone(case: Case) -> None:
    """Every parameter behaves as if it had an optimizer of its own that counts its own steps."""
    tx = case.tx()
    params = {"a": w(), "b": b(), "c": nonzero()}
    single = dict(params)
    state = tx.init(params)
    states = {name: tx.init(p) for name, p in params.items()}
    for present in ("abc", "a", "bc", "", "ac", "abc"):
        grads = {k: nonzero(*p.shape) if k in present else None for k, p in params.items()}
        updates, state = tx.update(grads, state, params, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)
        for name in single:
            if name not in present:
                assert updates[name] is None
                continue
            u, states[name] = tx.update(grads[name], states[name], single[name], inplace=False)
            single[name] = torchopt.apply_updates(single[name], u, inplace=False)
    assert state.step == {"a": 4, "b": 3, "c": 4}
    assert_close(params, single)
    for slot, values in state.slots.items():
        assert_close(values, {name: states[name].slots.get(slot) for name in states})


def test_the_step_is_one_number_again_once_the_counts_agree() -> None:
    tx, params = torchopt.adam(), {"a": w(), "b": b()}
    _, state = tx.update({"a": w(), "b": None}, tx.init(params), params)
    assert state.step == {"a": 1, "b": 0}
    _, state = tx.update({"a": None, "b": b()}, state, params)
    assert state.step == 1


def test_none_params_stay_none() -> None:
    tx = torchopt.adamw(0.1, weight_decay=0.1)
    params = {"a": w(), "none": None, "b": b()}
    state = tx.init(params)
    assert state.exp_avg["none"] is None
    for _ in range(2):
        grads = random_like(params)
        updates, state = tx.update(grads, state, params, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)
    assert params["none"] is None
    assert updates["none"] is None
    assert state.exp_avg_sq["none"] is None
    assert params["a"].shape == (2, 3)


def test_apply_updates_skips_none_on_either_side() -> None:
    params = {"a": torch.tensor([1.0]), "b": torch.tensor([2.0]), "c": None}
    updates = {"a": torch.tensor([0.5]), "b": None, "c": None}
    for inplace in (False, True):
        result = torchopt.apply_updates(params, updates, inplace=inplace)
        assert result["a"].item() == 1.5
        assert result["b"].item() == 2.0
        assert result["c"] is None


X = torch.ones(1)


MISMATCHES = {
    "missing-key": ({"a": X, "b": X, "c": X}, {"a": X, "c": X}, "'b' is missing"),
    "misspelt-key": ({"a": X, "bias": X}, {"a": X, "bais": X}, "'bias' is missing"),
    "extra-key": ({"a": X}, {"a": X, "z": X}, "'z' was not expected"),
    "nested": ({"a": {"b": [X, X]}}, {"a": {"b": [X]}}, "'a.b.1' is missing"),
    "leaf-for-tree": ({"a": {"b": X}}, {"a": X}, "'a.b' is missing"),
    "tree-for-leaf": ({"a": X}, {"a": {"b": X}}, "'a' is missing"),
    "short-list": ([X, X, X], [X, X], "'2' is missing"),
    "long-list": ([X], [X, X], "'1' was not expected"),
    "none-for-tree": ({"a": {"b": X}, "c": X}, {"a": None, "c": X}, "'a.b' is missing"),
}


every_mismatch = pytest.mark.parametrize(
    ("expected", "given", "message"), MISMATCHES.values(), ids=MISMATCHES.keys()
)


@every_mismatch
def test_a_state_of_other_params_is_refused(expected: Any, given: Any, message: str) -> None:
    tx = torchopt.adam()
    with pytest.raises(ValueError, match=r"exp_avg.*does not match grads"):
        tx.update(given, tx.init(expected))


@every_mismatch
def test_params_must_match_grads(expected: Any, given: Any, message: str) -> None:
    tx = torchopt.sgd()
    with pytest.raises(ValueError, match=f"params do not match grads: {message}"):
        tx.update(expected, tx.init(expected), given)


@every_mismatch
@pytest.mark.parametrize("inplace", [True, False], ids=["inplace", "pure"])
def test_updates_must_match_params(expected: Any, given: Any, message: str, inplace: bool) -> None:
    with pytest.raises(ValueError, match=f"updates do not match params: {message}"):
        torchopt.apply_updates(expected, given, inplace=inplace)
    assert X.item() == 1.0


# Extra values -------------------------------------------------------------------------------------


@torchopt.transformation
class ScaleByLoss(torchopt.GradientTransformation):
    """A user's transformation that reads an extra value."""

    def step(self, leaves: Any) -> Any:
        return [g * leaves.call.extra["loss"] for g in leaves.g], leaves.slots


def test_extra_values_reach_the_transformations_that_read_them() -> None:
    tx = torchopt.chain(torchopt.scale(2.0), ScaleByLoss(), torchopt.trace(0.5))
    grads = [w()]
    updates, state = tx.update(grads, tx.init(grads), loss=torch.tensor(3.0), unused="ignored")
    assert_close(updates, [6.0 * grads[0]])
    assert state.step == 1


@every_case
def test_extra_values_are_ignored_by_the_others(case: Case) -> None:
    tx, params = case.tx(), [w()]
    grads = nonzero_like(params)
    plain, _ = tx.update(grads, tx.init(params), params, inplace=False)
    extra, _ = tx.update(grads, tx.init(params), params, inplace=False, value=1.0, batch=None)
    assert torch.equal(plain[0], extra[0])
