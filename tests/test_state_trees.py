"""States of random trees: extracted, recovered, stopped, refused."""

from collections import OrderedDict, namedtuple

import pytest
import torch
from extracting import assert_same_tree, leaves_of
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import torchopt


pytestmark = pytest.mark.usefixtures("float64_by_default")


Point = namedtuple("Point", "x y")


def tensors():
    shapes = st.sampled_from([(), (1,), (3,), (2, 2)])
    dtypes = st.sampled_from([torch.float64, torch.float32, torch.int64])

    @st.composite
    def build(draw):
        shape, dtype = draw(shapes), draw(dtypes)
        values = torch.tensor(
            [draw(st.integers(1, 9)) for _ in range(int(torch.Size(shape).numel()))]
        )
        tensor = values.reshape(shape).to(dtype)
        if dtype.is_floating_point:
            tensor.requires_grad_(draw(st.booleans()))
        return tensor

    return build()


def containers(children):
    keys = st.sampled_from(["a", "b", "weight", "0"])
    return st.one_of(
        st.lists(children, max_size=3),
        st.lists(children, max_size=3).map(tuple),
        st.dictionaries(keys, children, max_size=3),
        st.dictionaries(keys, children, max_size=3).map(OrderedDict),
        st.builds(Point, children, children),
        st.builds(
            lambda step, slots: torchopt.OptState(step, slots),
            st.integers(0, 9),
            st.dictionaries(st.sampled_from(["exp_avg", "buffer"]), children, max_size=2),
        ),
    )


trees = st.recursive(
    st.one_of(tensors(), tensors(), st.none(), st.integers(0, 9)), containers, max_leaves=8
)


quick = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def change(tree):
    """Replace what is in mutable containers and change every tensor in place."""
    if isinstance(tree, torch.Tensor):
        with torch.no_grad():
            tree.add_(1)
    elif isinstance(tree, torchopt.OptState):
        tree.step = tree.step + 1
        change(tree.slots)
    elif isinstance(tree, dict):
        for value in tree.values():
            change(value)
        for key, value in tree.items():
            if isinstance(value, torch.Tensor):
                tree[key] = value.detach() * 3
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            change(value)


@quick
@given(tree=trees, by=st.sampled_from(["copy", "deepcopy", "clone", "deepclone"]))
def test_round_trip_of_random_trees(tree, by):
    wanted = torchopt.extract_state_dict(tree, by="deepcopy")
    state = torchopt.extract_state_dict(tree, by=by)
    assert_same_tree(state, wanted)
    change(tree)
    assert_same_tree(state, wanted)
    back = torchopt.recover_state_dict(tree, state)
    assert_same_tree(back, wanted)
    assert_same_tree(torchopt.extract_state_dict(back), wanted)


@quick
@given(tree=trees)
def test_by_reference_keeps_every_object(tree):
    found = torchopt.extract_state_dict(tree)
    ours, theirs = leaves_of(tree), leaves_of(found)
    assert len(ours) == len(theirs)
    assert all(a is b for a, b in zip(ours, theirs))
    assert_same_tree(found, tree)


@quick
@given(tree=trees)
def test_stop_gradient_of_random_trees_keeps_values(tree):
    moved = torchopt.extract_state_dict(tree, by="copy")
    wanted = torchopt.extract_state_dict(tree, by="deepcopy")
    assert torchopt.stop_gradient(moved) is moved
    assert all(t.grad_fn is None for t in leaves_of(moved))
    assert_same_tree(moved, wanted)


def slots(**of):
    return torchopt.OptState(0, {"exp_avg": of})


@quick
@given(tree=trees, other=trees)
@example(tree=slots(a=torch.ones(()), b=None), other=slots(a=torch.ones(())))
@example(tree=slots(a=torch.ones(())), other=slots(a=torch.ones(()), b=None))
@example(tree=slots(a=[torch.ones(()), None]), other=slots(a=[torch.ones(())]))
@example(tree=slots(a=None), other=slots(a={}))
def test_a_random_tree_of_another_structure_is_refused(tree, other):
    def outline(value):
        if isinstance(value, torch.Tensor):
            return tuple(value.shape)
        if isinstance(value, torchopt.OptState):
            return {slot: outline(v) for slot, v in value.slots.items()}
        if isinstance(value, dict):
            return {key: outline(v) for key, v in value.items()}
        if isinstance(value, Point):
            return {"x": outline(value.x), "y": outline(value.y)}
        if isinstance(value, (list, tuple)):
            return {str(k): outline(v) for k, v in enumerate(value)}
        return "value"

    def paths(value):
        if not isinstance(value, dict):
            return {(): value}
        return {(k, *p): leaf for k, v in value.items() for p, leaf in paths(v).items()}

    if paths(outline(tree)) == paths(outline(other)):
        return
    wanted = torchopt.extract_state_dict(tree, by="deepcopy")
    with pytest.raises((ValueError, TypeError)):
        torchopt.recover_state_dict(tree, other)
    assert_same_tree(tree, wanted)


@pytest.mark.parametrize(("target", "state"), [({"a": {}}, {}), ({"a": 1, "b": []}, {"a": 1})])
def test_empty_containers_count(target, state):
    with pytest.raises(ValueError, match=r"The state does not match: .*'[ab]'"):
        torchopt.recover_state_dict(target, state)
