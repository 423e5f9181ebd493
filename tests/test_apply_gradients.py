"""A functional step in one call: the same as update and apply_updates, whatever the tree."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
from cases import Case, every_case, every_family, every_fused_case
from conftest import nonzero, nonzero_like
from fusing import kernel_calls_fixture, needs_library  # noqa: F401
from tolerances import assert_close
from torch import Tensor
from torch.func import grad, jvp, vmap

import torchopt
from torchopt.typing import PyTree


Pair = namedtuple("Pair", ["weight", "bias"])
flat = torch.utils._pytree.tree_leaves
tree_map = torch.utils._pytree.tree_map


def tensors_in(tree: PyTree) -> list[torch.Tensor]:
    return [x for x in flat(tree) if x is not None]


def in_two(tx: Any, g: PyTree, state: Any, p: PyTree, inplace: bool = False) -> tuple[Any, Any]:
    updates, state = tx.update(g, state, p, inplace=inplace)
    return torchopt.apply_updates(p, updates, inplace=inplace), state


def in_one(tx: Any, g: PyTree, state: Any, p: PyTree, inplace: bool = False) -> tuple[Any, Any]:
    return tx.apply_gradients(g, state, p, inplace=inplace)


def some_tree(dtype: torch.dtype = torch.float64) -> PyTree:
    return {
        "b": Pair(nonzero(3, 2, dtype=dtype), [nonzero(dtype=dtype)]),
        "a": nonzero(4).to(dtype),
    }


@pytest.mark.sampled(1, each=2)
@pytest.mark.parametrize("setting", [None, False], ids=["fused", "rules"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@every_case
def test_the_same_bits_as_in_two_calls(case: Case, dtype: torch.dtype, setting: Any) -> None:
    tx = case.tx().with_accelerated_op(setting)
    rounded = dtype == torch.bfloat16 and setting is None  # a kernel rounds the sum once, not twice
    steps, results = 1 if rounded else 4, []
    for step in (in_one, in_two):
        torch.manual_seed(1)
        p = some_tree(dtype)
        state = tx.init(p)
        for _ in range(steps):
            p, state = step(tx, some_tree(dtype), state, p)
        results.append((p, state))
    (p, state), (expected, expected_state) = results
    assert isinstance(p["b"], Pair)
    assert isinstance(state, torchopt.OptState)
    assert state.step == expected_state.step == steps
    if rounded:
        assert_close(flat(p), flat(expected))
    else:
        assert all(map(torch.equal, flat(p), flat(expected)))
    assert all(map(torch.equal, flat(state), flat(expected_state)))


@needs_library
@every_fused_case
def test_one_kernel_and_one_node_of_the_graph(case: Case, kernel_calls: list[int]) -> None:
    """Of the second step: of the first one some slots, and some updates, do not depend."""
    tx, p = case.tx(), [nonzero(3)]
    _, state = tx.update([nonzero(3)], tx.init(p), p, inplace=False)
    kernel_calls.clear()
    (new,), state = tx.apply_gradients([nonzero(3, requires_grad=True)], state, p, inplace=False)
    assert len(kernel_calls) == 1
    assert "Fused" in new.grad_fn.name()
    assert all(slot[0].grad_fn is new.grad_fn for slot in state.slots.values())


@every_case
def test_derivatives(case: Case) -> None:
    """By gradients, parameters and slots, of first and second order."""
    found = []
    for step in (in_one, in_two):
        torch.manual_seed(2)
        tx = case.smooth()
        g, p = some_tree(), some_tree()
        state = tx.init(p)
        state.step = 3
        for name, slot in nonzero_like(state.slots).items():
            state.slots[name] = tree_map(lambda x: x if x is None else x.square() + 1, slot)
        inputs = [x.requires_grad_() for x in tensors_in([g, p, state.slots])]
        new, state = step(tx, g, state, p)
        outputs = tensors_in([new, state.slots])
        total = sum(((k + 1) * x.sin()).sum() for k, x in enumerate(outputs))
        first = torch.autograd.grad(total, inputs, create_graph=True, materialize_grads=True)
        second = torch.autograd.grad(
            sum(x.sin().sum() for x in first), inputs, materialize_grads=True, allow_unused=True
        )
        found.append([*first, *second])
    assert_close(found[0], found[1], times=100)


@pytest.mark.parametrize("inplace", [False, True], ids=["pure", "in place"])
def test_parameters_without_gradient_stay(inplace: bool) -> None:
    tx = torchopt.adam(0.1)
    p = {"a": nonzero(3), "b": nonzero(2), "none": None}
    before, kept = p["a"].clone(), p["b"]
    state = tx.init(p)
    new, state = tx.apply_gradients(
        {"a": nonzero(3), "b": None, "none": None}, state, p, inplace=inplace
    )
    assert new["b"] is kept
    assert new["none"] is None
    assert not torch.equal(new["a"], before)
    assert state.step == {"a": 1, "b": 0, "none": 0}


@pytest.mark.parametrize("inplace", [False, True], ids=["pure", "in place"])
def test_a_gradient_without_its_parameter_is_refused(inplace: bool) -> None:
    tx, p = torchopt.sgd(0.5), {"a": None, "b": nonzero(3)}
    g, before = {"a": nonzero(2), "b": nonzero(3)}, p["b"].clone()
    with pytest.raises(ValueError, match="'a' has a gradient but its parameter is None"):
        tx.apply_gradients(g, tx.init(p), p, inplace=inplace)
    assert torch.equal(p["b"], before)
    for none in (None, {"a": None, "b": None}):
        with pytest.raises(TypeError, match="needs the parameters"):
            tx.apply_gradients(g, tx.init(g), none, inplace=inplace)
    nothing, state = tx.apply_gradients({}, tx.init({}), {}, inplace=inplace)
    assert nothing == {}
    assert state.step == 1


def test_in_place_changes_the_tensors_it_returns() -> None:
    tx = torchopt.sgd(0.1, momentum=0.9)
    p, g = [nonzero(3, requires_grad=True)], [nonzero(3)]
    (expected,), _ = tx.apply_gradients(g, tx.init(p), p, inplace=False)
    new, _ = tx.apply_gradients(g, tx.init(p), p)
    assert new[0] is p[0]
    assert torch.equal(p[0], expected)
    assert p[0].is_leaf


def test_the_structure_is_that_of_the_parameters() -> None:
    tx = torchopt.sgd(0.5)
    p = {"b": nonzero(2), "a": nonzero(3)}
    new, _ = tx.apply_gradients({"a": p["a"], "b": p["b"]}, tx.init(p), p, inplace=False)
    assert list(new) == ["b", "a"]
    assert_close([new["a"], new["b"]], [0.5 * p["a"], 0.5 * p["b"]])


@pytest.mark.parametrize("inplace", [False, True], ids=["pure", "in place"])
@pytest.mark.parametrize(
    ("grads", "error", "message"),
    [
        ([torch.ones(2, dtype=torch.float64)], ValueError, "does not fit"),
        ([torch.ones(3)], TypeError, "float32"),
        ({"w": torch.ones(3, dtype=torch.float64)}, ValueError, "do not match grads"),
    ],
    ids=["shape", "dtype", "structure"],
)
def test_what_does_not_fit_is_refused(grads: Any, error: Any, message: str, inplace: bool) -> None:
    tx, p = torchopt.adam(0.1), [nonzero(3)]
    state, before = tx.init(p), p[0].clone()
    with pytest.raises(error, match=message):
        tx.apply_gradients(grads, state, p, inplace=inplace)
    assert torch.equal(p[0], before)
    assert all(not slot[0].any() for slot in state.slots.values())


def test_in_place_through_a_recorded_gradient_is_refused() -> None:
    tx, p = torchopt.sgd(0.1), [nonzero(3)]
    before = p[0].clone()
    with pytest.raises(RuntimeError, match="inplace"):
        tx.apply_gradients([nonzero(3, requires_grad=True) * 2], tx.init(p), p)
    assert torch.equal(p[0], before)


def compiled(function: Any) -> Any:
    torch._dynamo.reset()  # it counts all that was ever compiled of one piece of code
    return torch.compile(function, fullgraph=True, backend="aot_eager")


TRANSFORMS = {
    "vmap": lambda f, p, g: vmap(f, in_dims=(None, 0))(p, g),
    "grad": lambda f, p, g: grad(lambda p: f(p, g[0]).sin().sum())(p),
    "vmap of grad": lambda f, p, g: vmap(grad(lambda p, g: f(p, g).sin().sum()), in_dims=(None, 0))(
        p, g
    ),
    "jvp": lambda f, p, g: jvp(f, (p, g[0]), (g[1], g[2])),
    "compiled": lambda f, p, g: compiled(f)(p, g[0]),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", TRANSFORMS)
@every_family
def test_transforms(case: Case, name: str) -> None:
    tx, p, g = case.tx(), nonzero(3), nonzero(4, 3)
    found = []
    for step in (in_one, in_two):

        def two_steps(p: Tensor, g: Tensor, step: Any = step) -> Tensor:
            params, state = step(tx, [g], tx.init([p]), [p])
            return step(tx, [g * params[0]], state, params)[0][0]

        found.append(flat(TRANSFORMS[name](two_steps, p, g)))
    assert_close(found[0], found[1])
