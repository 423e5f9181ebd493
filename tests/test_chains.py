"""``chain``: order, names, and its properties over any tree and any parts."""

from __future__ import annotations

from typing import Any

import torch
from cases import CASES
from conftest import nonzero, nonzero_like
from hypothesis import given, settings
from hypothesis import strategies as st
from running import run
from tolerances import assert_close

import torchopt
from torchopt.base import tree


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
        torchopt.scale_by_schedule(torchopt.schedules.linear(0.1, 0.0, 5)),
        *(case.tx() for case in CASES if not case.algorithm.shapes),
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
