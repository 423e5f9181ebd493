"""A state part by part, as TorchOpt 0.7.3 showed it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from conftest import nonzero
from tolerances import assert_close

import torchopt
from torchopt.base import pytree
from torchopt.core import state_parts


def advanced(tx: Any, params: Any, count: int = 2) -> Any:
    state = tx.init(params)
    for _ in range(count):
        _, state = tx.update({name: nonzero(*p.shape) for name, p in params.items()}, state, params)
    return state


def params() -> dict[str, Any]:
    return {"w": nonzero(2, 3), "b": nonzero(3)}


@pytest.mark.parametrize(
    ("tx", "kind", "fields"),
    [
        (torchopt.adam(), "ScaleByAdamState", {"mu": "exp_avg", "nu": "exp_avg_sq"}),
        (torchopt.rmsprop(), "ScaleByRmsState", {"nu": "square_avg"}),
        (torchopt.adagrad(), "ScaleByRssState", {"sum_of_squares": "sum"}),
        (
            torchopt.rmsprop(centered=True),
            "ScaleByRStdDevState",
            {"mu": "grad_avg", "nu": "square_avg"},
        ),
        (torchopt.sgd(0.1, momentum=0.9), "TraceState", {"trace": "momentum_buffer"}),
    ],
)
def test_first_part_and_last(tx: Any, kind: str, fields: dict[str, str]) -> None:
    """``state[0].mu`` and ``state[-1].count``; each part is a named tuple."""
    state = advanced(tx, params())
    assert len(state) == 2
    assert type(state[0]) is getattr(state_parts, kind)
    for field, slot in fields.items():
        assert getattr(state[0], field) is state.slots[slot]
    assert state[-1].count == 2
    assert state[0:1] == (state[0],)
    with pytest.raises(IndexError):
        state[2]


def test_all_parts_of_a_chain() -> None:
    tx = torchopt.chain(
        torchopt.adam(amsgrad=True), torchopt.rmsprop(momentum=0.9), torchopt.scale_by_adam()
    )
    state = advanced(tx, params())
    names = [type(part).__name__ for part in state]
    assert names == [
        "ScaleByAdamState",
        "dict",
        "ScaleByRmsState",
        "TraceState",
        "ScaleByAdamState",
        "ScaleByScheduleState",
    ]
    assert state[1].keys() == {"max_exp_avg_sq"}
    assert state[4].mu is state.slots["exp_avg_2"]


def test_a_tuple_of_parts_is_a_state() -> None:
    """``state = tuple(detached(part) for part in state)``, and on; also nested, as 0.7.3's were."""
    p = params()
    tx = torchopt.chain(torchopt.clip_grad_norm(1.0), torchopt.rmsprop(0.1, momentum=0.9))
    state, grads = advanced(tx, p), {name: nonzero(*x.shape) for name, x in p.items()}
    wanted, after = tx.update(grads, state, p)
    detached = tuple(pytree.tree_map(copy.copy, part) for part in state)
    for given in (detached, list(detached), (torchopt.base.EmptyState(), detached)):
        updates, new = tx.update(grads, given, p)
        assert_close(updates, wanted)
        assert_close(new.slots, after.slots)
        assert new.step == after.step
    optimizer = torchopt.FuncOptimizer(tx)
    optimizer.load_state_dict(detached)
    assert isinstance(optimizer.state, torchopt.OptState)


def test_what_is_no_state_is_refused() -> None:
    p = params()
    tx = torchopt.adam()
    state = advanced(tx, p)
    with pytest.raises(TypeError):
        tx.update(p, (1, 2), p)
    first, last = state
    with pytest.raises(ValueError, match="different step counts"):
        tx.update(p, (first, last._replace(count=last.count + 1)), p)
    with pytest.raises(ValueError, match="another optimizer"):
        tx.update(p, (state_parts.TraceState(first.mu), last), p)


def test_new_counts_are_taken() -> None:
    """Bias correction begins anew where a script sets the counts to 0."""
    p = params()
    tx = torchopt.adam()
    state = advanced(tx, p)
    first, last = state
    zero = last.count * 0
    _, new = tx.update(p, (first._replace(count=zero), last._replace(count=zero)), p)
    assert new[-1].count == 1
