"""Trees where the compiler does not see through optree (below torch 2.13): the order of leaves."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Iterator
from typing import Any

import optree
import pytest
import torch
from conftest import nonzero, nonzero_like

import torchopt
from torchopt.base import tree


Pair = namedtuple("Pair", ("weight", "bias"))

TREES: dict[str, Any] = {
    "leaf": 1,
    "none": None,
    "unsorted": {"w": 1, "b": 2},
    "sorted": {"b": 1, "w": 2},
    "numbers": {10: 1, 9: 2},
    "mixed keys": {"w": 1, 3: 2, "b": 3},
    "nested": {"w": [1, {"z": 2, "a": (3, None)}], "b": Pair({"y": 4, "x": 5}, 6)},
    "ordered": OrderedDict(w=1, b=OrderedDict(z=2, a=3)),
    "default": defaultdict(list, {"w": 1, "b": 2}),
    "deque": deque([1, {"w": 2, "b": 3}]),
    "state": torchopt.OptState(3, {"v": {"w": 1, "b": 2}, "m": {"w": 3, "b": 4}}),
    "counts": torchopt.OptState({"w": 3, "b": 4}, {"m": {"w": 3, "b": 4}}),
    "empty": {"w": {}, "b": []},
}


@pytest.fixture(name="walks")
def walks_fixture(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A compiler that does not see through optree, whatever torch is here."""
    torch._dynamo.reset()
    monkeypatch.setattr(tree, "_COMPILER_KNOWS_OPTREE", False)
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("value", TREES.values(), ids=TREES.keys())
def test_walked_trees_are_those_of_optree(value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    options: Any = {"none_is_leaf": True, "namespace": "torchopt"}
    expected = optree.tree_leaves(value, **options)
    monkeypatch.setattr(tree, "compiler_is_old", lambda: True)
    leaves, spec = tree.flatten(value)
    assert leaves == expected
    assert tree.leaf_paths(value) == optree.tree_paths(value, **options)
    assert spec.num_leaves == len(expected)
    rebuilt = tree.unflatten(spec, leaves)
    assert type(rebuilt) is type(value)
    assert repr(rebuilt) == repr(value)  # which says the order of keys as well
    assert optree.tree_leaves(rebuilt, **options) == expected
    # what one call has walked, another one may finish
    monkeypatch.setattr(tree, "compiler_is_old", lambda: False)
    assert repr(tree.unflatten(spec, leaves)) == repr(value)
    assert tree.flatten_like(value, value, spec, "a", "b") == expected


def params_of(*names: str) -> dict[str, Any]:
    return {name: nonzero(2) for name in names}


@pytest.mark.usefixtures("walks")
@pytest.mark.parametrize("names", [("w", "b"), ("b", "w")], ids=lambda names: "".join(names))
def test_compiled_rates_reach_the_parameters_that_they_name(
    names: tuple[str, ...],
) -> None:
    """The update of gradient descent is minus the rate times the gradient."""
    rates = {"w": 1.0, "b": 0.001}
    tx, params = torchopt.sgd(rates), params_of(*names)
    grads = {name: nonzero(2) for name in reversed(params)}

    @torch.compile(fullgraph=True, backend="eager")
    def compiled(grads: Any, state: Any, params: Any) -> Any:
        return tx.update(grads, state, params, inplace=False)

    updates, _ = compiled(grads, tx.init(params), params)
    for name, rate in rates.items():
        torch.testing.assert_close(updates[name], -rate * grads[name])


MASKED: dict[str, Any] = {
    "tree": {"w": True, "b": False},
    "function": lambda params: {"w": True, "b": False},
}


@pytest.mark.usefixtures("walks")
@pytest.mark.parametrize("mask", MASKED.values(), ids=MASKED.keys())
def test_compiled_masks_and_slots_reach_the_parameters_that_they_name(mask: Any) -> None:
    """The values of a mask, momentum of the chosen one, and the gradient itself of the other."""
    tx = torchopt.chain(torchopt.masked(torchopt.trace(0.5), mask), torchopt.scale(-2.0))
    params = params_of("w", "b")

    @torch.compile(fullgraph=True, backend="eager")
    def compiled(grads: Any, state: Any, params: Any) -> Any:
        return tx.apply_gradients(grads, state, params, inplace=False)

    first, second = nonzero_like(params), nonzero_like(params)
    new, state = compiled(first, tx.init(params), params)
    new, state = compiled(second, state, new)
    moment = 0.5 * first["w"] + second["w"]
    torch.testing.assert_close(new["w"], params["w"] - 2 * (first["w"] + moment))
    torch.testing.assert_close(new["b"], params["b"] - 2 * (first["b"] + second["b"]))
    assert list(new) == ["w", "b"]
