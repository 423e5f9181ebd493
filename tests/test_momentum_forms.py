"""Momentum with sparse gradients as torch has it, and what Nesterov momentum asks for."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from conftest import nonzero
from tolerances import assert_close
from torch import Tensor, nn

import torchopt


SHAPE = (6, 2)


def sparse_gradient(seed: int) -> Tensor:
    """As an embedding makes it: rows that occur several times."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, SHAPE[0], (1, 5), generator=draw)
    return torch.sparse_coo_tensor(
        rows, torch.randn(5, 2, generator=draw, dtype=torch.float64), SHAPE
    )


def gradient(kind: str, seed: int) -> Tensor:
    return sparse_gradient(seed) if kind == "s" else sparse_gradient(seed).to_dense()


OPTIONS = ({}, {"dampening": 0.25}, {"nesterov": True}, {"maximize": True})


def run(cls: Any, kinds: str, **options: Any) -> tuple[Any, nn.Parameter]:
    torch.manual_seed(8)
    p = nn.Parameter(nonzero(*SHAPE))
    optimizer = cls([p], lr=0.1, momentum=0.9, **options)
    for k, kind in enumerate(kinds):
        p.grad = None
        p.grad = gradient(kind, k)
        optimizer.step()
    return optimizer, p


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_sparse_gradients_as_torch(options: dict[str, Any]) -> None:
    ours, p = run(torchopt.SGD, "ssss", **options)
    theirs, q = run(torch.optim.SGD, "ssss", **options)
    assert_close(p.detach(), q.detach())
    buffer = ours.state[p]["momentum_buffer"]
    assert buffer.layout is theirs.state[q]["momentum_buffer"].layout is torch.sparse_coo
    assert buffer.coalesce()._nnz() <= SHAPE[0]
    assert buffer._nnz() <= SHAPE[0] + 5  # it does not grow with the steps, as torch's does


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kinds", ["ssss", "dsds", "sdss", "ssd"])
@pytest.mark.parametrize("setting", [None, False], ids=["fused", "rules"])
def test_sparse_and_dense_gradients_are_one_thing(kinds: str, options: Any, setting: Any) -> None:
    options = {**options, "use_accelerated_op": setting}
    _, p = run(torchopt.SGD, kinds, **options)
    _, q = run(torchopt.SGD, "d" * len(kinds), **options)
    assert_close(p.detach(), q.detach(), times=4)


def test_a_sparse_buffer_is_saved_and_goes_back() -> None:
    optimizer, p = run(torchopt.SGD, "sss")
    snapshot, weights = optimizer.state_dict(), p.detach().clone()
    file = io.BytesIO()
    torch.save(snapshot, file)
    file.seek(0)
    results = []
    for state in (snapshot, torch.load(file, weights_only=True)):
        optimizer.load_state_dict(state)
        with torch.no_grad():
            p.copy_(weights)
        p.grad = sparse_gradient(9)
        optimizer.step()
        results.append(p.detach().clone())
    assert torch.equal(*results)
    assert_close(results[0], run(torchopt.SGD, "sss")[1].detach() + (results[0] - weights))


def test_the_functional_face_takes_sparse_gradients() -> None:
    tx = torchopt.sgd(0.1, momentum=0.9)
    start = nonzero(*SHAPE)
    results = []
    for kind in "sd":
        params, state = [start.clone()], tx.init([start])
        for k in range(3):
            params, state = tx.apply_gradients([gradient(kind, k)], state, params)
        results.append(params[0])
    assert_close(*results)


def test_weight_decay_has_no_sparse_rule() -> None:
    with pytest.raises(TypeError, match="AddDecayedWeights has no sparse rule"):
        run(torchopt.SGD, "s", weight_decay=0.1)


# Nesterov -----------------------------------------------------------------------------------------


def zero(count: int) -> float:
    return 0.0


ZEROS = {
    "tensor": torch.tensor(0.0, dtype=torch.float64),
    "dict": {"a": 0.0, "b": 0},
    "dict-of-tensor": {"a": torch.zeros(()), "b": 0.0},
    "schedule": zero,
}


@pytest.mark.parametrize("dampening", ZEROS.values(), ids=ZEROS.keys())
def test_nesterov_takes_a_zero_dampening_in_any_form(dampening: Any) -> None:
    params = {"a": nonzero(2), "b": nonzero(3)}
    grads = [{k: nonzero(*p.shape) for k, p in params.items()} for _ in range(3)]
    results = []
    for value in (dampening, 0.0):
        tx = torchopt.sgd(0.1, momentum=0.9, dampening=value, nesterov=True)
        new, state = params, tx.init(params)
        for g in grads:
            new, state = tx.apply_gradients(g, state, new, inplace=False)
        results.append(new)
    assert_close(*results)


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.0},
        {"momentum": {"a": 0.0}},
        {"momentum": {"a": 0.9, "b": 0}},
        {"momentum": [0.9, 0.0]},
        {"momentum": 0.9, "dampening": 0.5},
        {"momentum": 0.9, "dampening": {"a": 0.0, "b": 0.5}},
    ],
    ids=str,
)
def test_nesterov_refuses_no_momentum_and_dampening_in_any_form(options: Any) -> None:
    with pytest.raises(ValueError, match="Nesterov momentum needs momentum > 0 and dampening = 0"):
        torchopt.sgd(0.1, nesterov=True, **options)
