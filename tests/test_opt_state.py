"""``OptState``: a tree that prints, copies and travels."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import optree
import pytest
import torch
from any_trees import b, random_like, w
from tolerances import assert_close
from torch import Tensor

import torchopt
from torchopt.base import tree


def test_a_state_prints_readably() -> None:
    params = {"w": torch.ones(2, 3), "b": None}
    assert repr(torchopt.adam().init(params)) == (
        "OptState(step=0, exp_avg={'w': float32[2, 3], 'b': None}, "
        "exp_avg_sq={'w': float32[2, 3], 'b': None})"
    )
    assert repr(torchopt.sgd().init(params)) == "OptState(step=0)"
    tx = torchopt.sgd(momentum=0.9)
    grads = [torch.ones(2, dtype=torch.float64, requires_grad=True) * 2.0]
    _, state = tx.update(grads, tx.init(grads), inplace=False)
    assert repr(state) == "OptState(step=1, momentum_buffer=[float64[2] with graph])"


def test_slots_are_attributes() -> None:
    state = torchopt.adam().init([w()])
    assert state.exp_avg is state.slots["exp_avg"]
    with pytest.raises(AttributeError, match=r"no attribute or slot 'momentum_buffer'.*exp_avg_sq"):
        _ = state.momentum_buffer
    assert not hasattr(state, "max_exp_avg_sq")


def _state() -> torchopt.OptState:
    tx, params = torchopt.adam(), {"w": w(), "n": None, "b": [b(), b()]}
    _, state = tx.update(random_like(params), tx.init(params), params)
    return state


def _differing_steps() -> torchopt.OptState:
    tx, params = torchopt.adam(), {"w": w(), "b": b()}
    _, state = tx.update({"w": w(), "b": None}, tx.init(params), params)
    return state


def _tensor_step() -> torchopt.OptState:
    return torchopt.OptState(torch.tensor(3), {"exp_avg": {"w": w(), "b": b()}})


STATES = {"int-step": _state, "tensor-step": _tensor_step, "differing-steps": _differing_steps}


every_state = pytest.mark.parametrize("make", STATES.values(), ids=STATES.keys())


@every_state
def test_a_state_is_an_optree_node(make: Any) -> None:
    state = make()
    leaves, spec = optree.tree_flatten(state, none_is_leaf=True, namespace="torchopt")
    assert len(leaves) > 1
    doubled = optree.tree_unflatten(spec, [x if x is None else 2 * x for x in leaves])
    assert isinstance(doubled, torchopt.OptState)
    assert_close(doubled.exp_avg["w"], 2 * state.exp_avg["w"])
    assert optree.tree_structure(doubled, none_is_leaf=True, namespace="torchopt") == spec
    assert "exp_avg.w" in tree.leaf_names(state)


@every_state
def test_a_state_is_a_torch_pytree(make: Any) -> None:
    state = make()
    doubled = torch.utils._pytree.tree_map_only(Tensor, lambda x: 2 * x, state)
    assert isinstance(doubled, torchopt.OptState)
    assert_close(doubled.exp_avg["w"], 2 * state.exp_avg["w"])
    assert doubled.step == tree.tree_map(lambda n: 2 * n, state.step)
    pairs = torch.utils._pytree.tree_flatten_with_path(state)[0]
    assert ".exp_avg['w']" in {torch.utils._pytree.keystr(path) for path, _ in pairs}


@every_state
@pytest.mark.parametrize("clone", ["pickle", "deepcopy"])
def test_a_state_survives_copies(make: Any, clone: str) -> None:
    state = make()
    new = pickle.loads(pickle.dumps(state)) if clone == "pickle" else copy.deepcopy(state)
    assert new.step == state.step
    assert repr(new) == repr(state)
    assert torch.equal(new.exp_avg["w"], state.exp_avg["w"])
    assert new.exp_avg["w"].data_ptr() != state.exp_avg["w"].data_ptr()
