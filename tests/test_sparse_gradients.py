"""Sparse gradients are taken where the rule is right for them, and refused elsewhere."""

from __future__ import annotations

import pytest
import torch
from cases import Case, every_dense_case, every_sparse_case
from conftest import nonzero
from refusing import ready, refused, trained, with_last
from tolerances import assert_close
from torch import nn

import torchopt


@every_dense_case
def test_step_refuses_sparse_gradients_by_name(case: Case) -> None:
    """Few have a sparse rule; others name the parameter and the cure."""
    optimizer, params = trained(case)
    params[1].grad = nonzero(2, 3).to_sparse()
    with refused(TypeError, r"\['params'\]\[1\].*is sparse.*to_dense", optimizer):
        optimizer.step()


@every_dense_case
def test_update_refuses_sparse_gradients_by_name(case: Case) -> None:
    tx, params, grads, state = ready(case)
    grads = with_last(grads, nonzero(2, 3).to_sparse())
    with refused(TypeError, "'w' is sparse.*to_dense", tx, params, grads, state):
        tx.update(grads, state, params)


@every_sparse_case
@pytest.mark.parametrize("maximize", [False, True], ids=["minimize", "maximize"])
def test_sparse_gradients_are_taken_as_torch_does(case: Case, maximize: bool) -> None:
    ours, theirs = (nn.Embedding(6, 2, sparse=True, dtype=torch.float64) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    options = {**case.kwargs, "maximize": maximize}
    twin = case.torch_cls or case.algorithm.twin_of_sparse
    pairs = [
        (ours, case.cls(ours.parameters(), **options)),
        (theirs, twin(theirs.parameters(), **options)),
    ]
    before = ours.weight.detach().clone()
    for index in (torch.tensor([1, 1, 4]), torch.tensor([0, 4])):
        for net, optimizer in pairs:
            optimizer.zero_grad()
            (net(index) ** 3).sum().backward()
            assert net.weight.grad.is_sparse
            optimizer.step()
    assert_close(ours.weight.detach(), theirs.weight.detach())
    changed = (ours.weight != before).any(1)
    assert changed.tolist() == [True, True, False, False, True, False]


@every_sparse_case
def test_sparse_gradients_in_the_functional_face(case: Case) -> None:
    dense = torch.zeros(2, 3, dtype=torch.float64)
    dense[1] = nonzero(3)
    start = nonzero(2, 3)
    for inplace in (False, True):
        results = []
        for g in (dense.clone(), dense.to_sparse()):
            tx, params = case.tx(), {"w": start.clone()}
            updates, _ = tx.update({"w": g}, tx.init(params), params, inplace=inplace)
            results.append(torchopt.apply_updates(params, updates, inplace=inplace)["w"])
        assert_close(results[1], results[0])
        assert not torch.equal(results[1], start)


def test_scaling_takes_sparse_gradients() -> None:
    tx = torchopt.chain(torchopt.flip_sign(), torchopt.scale(2.0))
    dense = torch.tensor([0.0, 3.0])
    updates, _ = tx.update([dense.to_sparse()], tx.init([dense]))
    assert updates[0].is_sparse
    assert updates[0].to_dense().tolist() == [0.0, -6.0]
