"""The functional face: init, update and apply_updates over any pytree, and FuncOptimizer."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections import OrderedDict, namedtuple
from typing import Any

import optree
import pytest
import torch
from cases import every_case
from conftest import nonzero, nonzero_like
from tolerances import assert_close
from torch import Tensor
from torch.autograd import forward_ad

import torchopt
from torchopt.base import tree


Pair = namedtuple("Pair", ("weight", "bias"))


class Node:
    """A container that only optree knows, once it is registered."""

    def __init__(self, weight: Any, bias: Any) -> None:
        self.weight = weight
        self.bias = bias


class OwnNode(Node):
    """Registered under the namespace ``torchopt``."""


class GlobalNode(Node):
    """Registered in optree's global namespace."""


def _register(cls: type[Node], namespace: Any) -> None:
    optree.register_pytree_node(
        cls,
        lambda node: ((node.weight, node.bias), None, ("weight", "bias")),
        lambda _, children: cls(*children),
        namespace=namespace,
    )


_register(OwnNode, "torchopt")
_register(GlobalNode, optree.registry.__GLOBAL_NAMESPACE)


def w() -> Tensor:
    return nonzero(2, 3)


def b() -> Tensor:
    return nonzero(3)


TREES = {
    "tensor": lambda: w(),
    "scalar": lambda: nonzero(),
    "dict": lambda: {"w": w(), "b": b()},
    "nested": lambda: {"body": [{"w": w()}, {"w": w(), "b": b()}], "head": (b(), {"s": nonzero()})},
    "list": lambda: [w(), b()],
    "tuple": lambda: (w(), b()),
    "namedtuple": lambda: Pair(w(), b()),
    "OrderedDict": lambda: OrderedDict([("w", w()), ("b", b())]),
    "registered": lambda: OwnNode(w(), {"b": b()}),
    "registered-globally": lambda: [GlobalNode(w(), b()), b()],
    "none-leaf": lambda: {"w": w(), "nothing": None, "b": b()},
    "empty-containers": lambda: {"w": w(), "empty": {}, "also": []},
}
every_tree = pytest.mark.parametrize("make", TREES.values(), ids=TREES.keys())


def leaves_of(value: Any) -> list[Any]:
    return optree.tree_leaves(value, none_is_leaf=True, namespace="torchopt")


def structure_of(value: Any) -> Any:
    return optree.tree_structure(value, none_is_leaf=True, namespace="torchopt")


def random_like(value: Any) -> Any:
    """Return the tree with new random numbers, never zero."""
    return tree.tree_map(lambda x: nonzero(*x.shape, dtype=x.dtype), value)


def tensors_of(value: Any) -> list[Tensor]:
    return [x for x in leaves_of(value) if isinstance(x, Tensor)]


# Any tree ---------------------------------------------------------------------------------------


@every_tree
@every_case
def test_a_tree_is_updated_leaf_by_leaf(case: Any, make: Any) -> None:
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
def test_inplace_and_pure_agree(case: Any) -> None:
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


# None leaves --------------------------------------------------------------------------------------


@every_case
def test_a_missing_gradient_leaves_its_parameter_alone(case: Any) -> None:
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
        assert_close(values, {name: states[name].slots[slot] for name in states})


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


# Structures that do not match ---------------------------------------------------------------------

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
    with pytest.raises(ValueError, match=r"exp_avg.*do not match grads"):
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


@pytest.mark.parametrize("inplace", [True, False], ids=["inplace", "pure"])
def test_update_of_another_shape_is_refused_before_anything_changes(inplace: bool) -> None:
    params = {"a": torch.ones(2), "b": torch.ones(2)}
    with pytest.raises(ValueError, match=r"update of 'b' has shape \(1,\), the parameter \(2,\)"):
        torchopt.apply_updates(params, {"a": torch.ones(2), "b": torch.ones(1)}, inplace=inplace)
    assert torch.equal(params["a"], torch.ones(2))


# inplace=True and recorded tensors ----------------------------------------------------------------


RECORDED_HYPERPARAMETERS = {
    "lr": lambda x: torchopt.sgd(lr=x),
    "lr-of-one-parameter": lambda x: torchopt.sgd(lr={"w": x, "b": 0.1}),
    "betas": lambda x: torchopt.adam(betas=(x, 0.99)),
    "weight_decay": lambda x: torchopt.adamw(weight_decay=x),
    "clip": lambda x: torchopt.chain(torchopt.clip_grad_norm(x), torchopt.sgd()),
    "masked": lambda x: torchopt.masked(torchopt.scale(x), {"w": True, "b": False}),
}


@pytest.mark.parametrize(
    "make", RECORDED_HYPERPARAMETERS.values(), ids=RECORDED_HYPERPARAMETERS.keys()
)
def test_inplace_update_refuses_recorded_hyperparameters(make: Any) -> None:
    tx = make(torch.tensor(0.5, dtype=torch.float64, requires_grad=True))
    params = {"w": w(), "b": b()}
    state, grads = tx.init(params), nonzero_like(params)
    with pytest.raises(RuntimeError, match=r"recorded through hyperparameters.*inplace=False"):
        tx.update(grads, state, params)
    with torch.no_grad():
        updates, _ = tx.update(grads, state, params)
    assert not any(u.requires_grad for u in updates.values())
    updates, _ = tx.update(grads, state, params, inplace=False)
    assert any(u.requires_grad for u in updates.values())


@pytest.mark.parametrize("name", ["grads", "exp_avg", "exp_avg_sq", "params"])
def test_inplace_update_refuses_recorded_inputs(name: str) -> None:
    tx, params = torchopt.adam(), {"w": w()}
    state, grads = tx.init(params), {"w": w()}
    recorded = {"w": w().requires_grad_() * 1.0}
    if name == "grads":
        grads = recorded
    elif name == "params":
        params = recorded
    else:
        state = torchopt.OptState(0, {**state.slots, name: recorded})
    with pytest.raises(RuntimeError, match=f"recorded through {name}.*inplace=False"):
        tx.update(grads, state, params)
    updates, _ = tx.update(grads, state, params, inplace=False)
    assert updates["w"].requires_grad == (name != "params")  # adam without decay reads no params
    with torch.no_grad():
        updates, _ = tx.update(grads, state, params, inplace=True)
    assert not updates["w"].requires_grad


@pytest.mark.parametrize("name", ["params", "updates"])
def test_inplace_apply_updates_refuses_recorded_inputs(name: str) -> None:
    values = {"params": {"w": w()}, "updates": {"w": w()}}
    values[name] = {"w": w().requires_grad_() * 1.0}
    before = values["params"]["w"].detach().clone()
    with pytest.raises(RuntimeError, match=f"recorded through {name}.*inplace=False"):
        torchopt.apply_updates(values["params"], values["updates"])
    assert torch.equal(values["params"]["w"].detach(), before)
    result = torchopt.apply_updates(values["params"], values["updates"], inplace=False)
    assert result["w"].requires_grad
    assert torch.equal(values["params"]["w"].detach(), before)


def test_leaf_parameters_and_no_grad_are_allowed() -> None:
    tx = torchopt.adamw(0.1, weight_decay=0.1)
    params = {"w": w().requires_grad_()}
    before = params["w"].detach().clone()
    updates, _ = tx.update({"w": w()}, tx.init(params), params)
    torchopt.apply_updates(params, updates)
    assert not torch.equal(params["w"].detach(), before)
    assert params["w"].is_leaf
    assert params["w"].requires_grad
    product = params["w"] * 1.0
    with torch.no_grad():
        assert torchopt.apply_updates([product], [torch.ones_like(product)])[0] is product


@pytest.mark.parametrize("what", ["update", "apply_updates", "closed-over"])
@pytest.mark.parametrize("mode", ["func.grad", "func.vjp", "func.jvp", "forward_ad"])
def test_inplace_is_refused_under_every_mode_of_differentiation(mode: str, what: str) -> None:
    tx, x = torchopt.sgd(0.1, momentum=0.9), nonzero(3)
    state = tx.init([x])

    def function(y: Tensor) -> Tensor:
        if what == "apply_updates":
            return torchopt.apply_updates([y], [torch.ones_like(y)])[0].sum()
        if what == "closed-over":  # only the parameters carry the derivative
            updates, _ = tx.update([torch.ones_like(x)], state, [y * 1.0])
        else:
            updates, _ = tx.update([y], state)
        return updates[0].sum()

    with pytest.raises(RuntimeError, match="inplace=False"):  # noqa: PT012
        if mode == "func.grad":
            torch.func.grad(function)(x)
        elif mode == "func.vjp":
            torch.func.vjp(function, x)
        elif mode == "func.jvp":
            torch.func.jvp(function, (x,), (torch.ones_like(x),))
        else:
            with forward_ad.dual_level():
                function(forward_ad.make_dual(x, torch.ones_like(x)))


# Purity -------------------------------------------------------------------------------------------


@every_case
def test_inplace_false_is_pure(case: Any) -> None:
    """No version counter moves, no value changes, and no result shares memory with an input."""
    tx, params = case.tx(), {"w": w(), "b": b()}
    _, state = tx.update(nonzero_like(params), tx.init(params), params, inplace=False)
    grads = nonzero_like(params)
    inputs = tensors_of(params) + tensors_of(grads) + tensors_of(state.slots)
    versions, values = [x._version for x in inputs], [x.clone() for x in inputs]
    updates, new = tx.update(grads, state, params, inplace=False)
    result = torchopt.apply_updates(params, updates, inplace=False)
    assert [x._version for x in inputs] == versions
    assert all(torch.equal(x, y) for x, y in zip(inputs, values))
    pointers = {x.data_ptr() for x in inputs}
    outputs = tensors_of(result) + tensors_of(updates) + tensors_of(new.slots)
    assert not pointers & {x.data_ptr() for x in outputs}
    assert new.step == state.step + 1


def test_init_shares_nothing_with_the_parameters() -> None:
    params = {"w": w().requires_grad_()}
    state = torchopt.rmsprop(centered=True, momentum=0.9).init(params)
    pointers = {x.data_ptr() for x in tensors_of(state.slots)}
    assert len(pointers) == 3
    assert params["w"].data_ptr() not in pointers
    assert not any(x.requires_grad for x in tensors_of(state.slots))


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
def test_extra_values_are_ignored_by_the_others(case: Any) -> None:
    tx, params = case.tx(), [w()]
    grads = nonzero_like(params)
    plain, _ = tx.update(grads, tx.init(params), params, inplace=False)
    extra, _ = tx.update(grads, tx.init(params), params, inplace=False, value=1.0, batch=None)
    assert torch.equal(plain[0], extra[0])


# OptState -----------------------------------------------------------------------------------------


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


@every_case
def test_the_step_may_be_a_tensor(case: Any) -> None:
    """A count that a graph must not be specialised on gives the same numbers."""
    tx, params = case.tx(), {"w": w(), "b": b()}
    state = tx.init(params)
    counted = torchopt.OptState(torch.tensor(0), state.slots)
    for _ in range(4):
        grads = nonzero_like(params)
        expected, state = tx.update(grads, state, params, inplace=False)
        updates, counted = tx.update(grads, counted, params, inplace=False)
        assert_close(updates, expected)
    assert counted.step == state.step == 4


# FuncOptimizer ------------------------------------------------------------------------------------


def _loss(params: Any) -> Tensor:
    return (params["w"] ** 3).sum() + (params["w"].sum(0) * params["b"]).sum()


@pytest.mark.parametrize("inplace", [True, False], ids=["inplace", "pure"])
@every_case
def test_func_optimizer_is_update_and_apply(case: Any, inplace: bool) -> None:
    tx = case.tx()
    params = {"w": w().requires_grad_(), "b": b().requires_grad_()}
    expected = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
    originals, state = dict(params), tx.init(expected)
    optimizer = torchopt.FuncOptimizer(tx, inplace=inplace)
    for _ in range(3):
        params = optimizer.step(_loss(params), params)
        grads = dict(zip(expected, torch.autograd.grad(_loss(expected), list(expected.values()))))
        updates, state = tx.update(grads, state, expected, inplace=False)
        new = torchopt.apply_updates(expected, updates, inplace=False)
        expected = {name: p.detach().requires_grad_() for name, p in new.items()}
    assert_close(params, expected)
    assert optimizer.state.step == 3
    same = all(params[name] is originals[name] for name in params)
    assert same is inplace


def test_func_optimizer_is_differentiable() -> None:
    """Through two steps, to the initial parameters and the learning rate; central differences."""
    lr, start = torch.tensor(0.1, dtype=torch.float64, requires_grad=True), nonzero(3)

    def outer(x: Tensor, rate: Any) -> Tensor:
        optimizer = torchopt.FuncOptimizer(torchopt.sgd(rate, momentum=0.9))
        params = x if x.requires_grad else x.clone().requires_grad_()
        for _ in range(2):
            params = optimizer.step((params**3).sum(), params)
        return (params**2).sum()

    found = torch.autograd.grad(outer(start.requires_grad_(), lr), (start, lr))
    start = start.detach()
    h = 1e-6
    by_lr = (outer(start, 0.1 + h) - outer(start, 0.1 - h)) / (2 * h)
    rows = h * torch.eye(3, dtype=torch.float64)
    by_start = torch.stack(
        [(outer(start + e, 0.1) - outer(start - e, 0.1)) / (2 * h) for e in rows]
    )
    assert_close(found[0], by_start.detach(), times=1e6)
    assert_close(found[1], by_lr.detach(), times=1e6)


def test_func_optimizer_leaves_unused_and_frozen_parameters() -> None:
    params = {
        "w": w().requires_grad_(),
        "unused": b().requires_grad_(),
        "frozen": b(),
        "none": None,
    }
    optimizer = torchopt.FuncOptimizer(torchopt.adam(0.1))
    new = optimizer.step((params["w"] ** 2 * params["frozen"]).sum(), params)
    assert not torch.equal(new["w"], params["w"])
    assert new["unused"] is params["unused"]
    assert new["frozen"] is params["frozen"]
    assert new["none"] is None


def test_func_optimizer_goes_on_from_a_state_dict() -> None:
    start = {"w": w().requires_grad_(), "b": b().requires_grad_()}
    first, second = (torchopt.FuncOptimizer(torchopt.adam(0.1)) for _ in range(2))
    assert first.state_dict() is None
    params = first.step(_loss(start), start)
    second.load_state_dict(first.state_dict())
    one = first.step(_loss(params), params)
    two = second.step(_loss(params), params)
    assert_close(one, two)
    assert second.state.step == 2


def test_func_optimizer_refuses_the_state_of_another() -> None:
    optimizer = torchopt.FuncOptimizer(torchopt.adam(0.1))
    optimizer.init([w()])
    kept = optimizer.state
    with pytest.raises(ValueError, match="another optimizer"):
        optimizer.load_state_dict(torchopt.sgd(momentum=0.9).init([w()]))
    with pytest.raises(TypeError, match="expects an OptState, got dict"):
        optimizer.load_state_dict({"step": 1})
    assert optimizer.state is kept


def test_func_optimizer_loses_nothing_when_it_refuses() -> None:
    params = {"w": w().requires_grad_(), "b": b().requires_grad_()}
    optimizer = torchopt.FuncOptimizer(torchopt.adam(0.1))
    params = optimizer.step(_loss(params), params)
    kept, before = optimizer.state, {name: p.detach().clone() for name, p in params.items()}
    with pytest.raises((ValueError, RuntimeError), match="scalar"):
        optimizer.step(params["w"] ** 2, params)
    with pytest.raises((TypeError, ValueError, RuntimeError), match=r"graph|grad"):
        optimizer.step(torch.tensor(1.0), params)
    with pytest.raises(RuntimeError, match="inplace=False"):
        optimizer.step(_loss(params), params, inplace=True)  # these params carry a graph
    assert optimizer.state is kept
    assert_close(params, before)


def test_func_optimizer_expects_a_transformation() -> None:
    with pytest.raises(TypeError, match="FuncOptimizer expects a gradient transformation"):
        torchopt.FuncOptimizer(torchopt.adam)
