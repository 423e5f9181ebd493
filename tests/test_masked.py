"""``masked`` applies a transformation where its mask is true."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import nonzero
from running import run
from tolerances import assert_close

import torchopt
from torchopt.base import tree


NESTED = {"body": {"w": torch.ones(2), "b": torch.ones(1)}, "head": [torch.ones(3)]}


MASKS = {
    "tree": {"body": {"w": True, "b": False}, "head": [True]},
    "prefix": {"body": True, "head": False},
    "prefix-and-leaf": {"body": {"w": False, "b": True}, "head": True},
    "rest": {"": True, "head": False},
    "true": True,
    "false": False,
    "function": lambda p: tree.tree_map(lambda x: x.numel() > 1, p),
    "function-prefix": lambda p: {name: name == "head" for name in p},
}


CHOSEN = {
    "tree": "body.w head.0",
    "prefix": "body.w body.b",
    "prefix-and-leaf": "body.b head.0",
    "rest": "body.w body.b",
    "true": "body.w body.b head.0",
    "false": "",
    "function": "body.w head.0",
    "function-prefix": "head.0",
}


@pytest.mark.parametrize("name", MASKS)
def test_masked_applies_where_the_mask_is_true(name: str) -> None:
    tx = torchopt.masked(torchopt.chain(torchopt.trace(0.5), torchopt.scale(2.0)), MASKS[name])
    us, state = run(tx, NESTED, [NESTED, NESTED])
    names, chosen = tree.leaf_names(NESTED), CHOSEN[name].split()
    for leaf, update in zip(names, tree.flatten(us[1])[0]):
        expected = 3.0 if leaf in chosen else 1.0
        assert torch.equal(update, torch.full_like(update, expected)), leaf
    if chosen:
        buffers = tree.flatten(state.momentum_buffer)[0]
        assert [n for n, x in zip(names, buffers) if x is not None] == [
            n for n in names if n in chosen
        ]
    else:
        assert state.slots == {}


BAD_MASKS = {
    "missing": ({"body": True}, ValueError, "no entry for parameter 'head.0'"),
    "misspelt": ({"body": True, "head": True, "haed": True}, ValueError, "names no parameter"),
    "number": ({"body": 1, "head": True}, TypeError, "'body.b' must be True or False, got 1"),
    "none": (None, TypeError, "must be True or False, got None"),
    "function": (lambda p: "yes", TypeError, "must be True or False, got 'yes'"),
    "tensor": ({"body": torch.tensor(True), "head": True}, TypeError, "must be True or False"),
}


@pytest.mark.parametrize(("mask", "error", "message"), BAD_MASKS.values(), ids=BAD_MASKS.keys())
def test_masked_refuses_masks_that_do_not_fit(mask: Any, error: type, message: str) -> None:
    tx = torchopt.masked(torchopt.scale(2.0), mask)
    with pytest.raises(error, match=message):
        tx.init(NESTED)


def test_masks_in_the_object_oriented_face() -> None:
    """There the parameters are a list; names work where they were given."""
    for named in (False, True):
        a, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
        mask: Any = {"a": True, "b": False} if named else [True, False]
        tx = torchopt.chain(torchopt.masked(torchopt.scale(0.0), mask), torchopt.sgd(1.0))
        optimizer = torchopt.Optimizer([("a", a), ("b", b)] if named else [a, b], tx)
        a.grad = b.grad = torch.ones(2)
        optimizer.step()
        assert a.tolist() == [1.0, 1.0]
        assert b.tolist() == [0.0, 0.0]


def test_masked_adam_leaves_no_state_for_the_others() -> None:
    a, b = (torch.nn.Parameter(nonzero(2)) for _ in range(2))
    tx = torchopt.chain(
        torchopt.masked(torchopt.scale_by_adam(), [True, False]), torchopt.scale(-1.0)
    )
    optimizer = torchopt.Optimizer([a, b], tx)
    a.grad = b.grad = nonzero(2)
    before = b.detach().clone()
    optimizer.step()
    assert "exp_avg" in optimizer.state[a]
    assert "exp_avg" not in optimizer.state[b]
    assert_close(b.detach(), before - b.grad)


def test_a_mask_function_sees_the_parameters_where_a_gradient_is_missing() -> None:
    params = {"w": nonzero(2, 3), "b": nonzero(3)}

    def matrices(tree: Any) -> Any:
        return {name: value.dim() > 1 for name, value in tree.items()}

    tx = torchopt.masked(torchopt.scale(2.0), matrices)
    grads = {"w": nonzero(2, 3), "b": None}
    updates, _ = tx.update(grads, tx.init(params), params, inplace=False)
    assert torch.equal(updates["w"], 2 * grads["w"])
    assert updates["b"] is None
    grads = {"w": None, "b": nonzero(3)}
    updates, _ = tx.update(grads, tx.init(params), params, inplace=False)
    assert updates["w"] is None
    assert torch.equal(updates["b"], grads["b"])
