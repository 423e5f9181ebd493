"""Adagrad: where its sum of squares starts, and sparse gradients, against torch.optim."""

from __future__ import annotations

import pytest
import torch
from adapting import assert_derivative
from cases import F64
from conftest import nonzero
from tolerances import assert_close
from torch import Tensor, nn

import torchopt


OPTIONS = {"lr": 0.1, "lr_decay": 0.2, "initial_accumulator_value": 0.3, "eps": 1e-3}


def test_both_parts_of_a_complex_sum_start_at_the_value() -> None:
    start = torch.randn(3, dtype=torch.complex128)
    ours, theirs = (nn.Parameter(start.clone()) for _ in range(2))
    pairs = [
        (ours, torchopt.Adagrad([ours], **OPTIONS)),
        (theirs, torch.optim.Adagrad([theirs], **OPTIONS)),
    ]
    for _ in range(30):
        g = torch.randn(3, dtype=torch.complex128)
        for p, optimizer in pairs:
            p.grad = g.clone()
            optimizer.step()
    assert_close(torch.view_as_real(ours.detach()), torch.view_as_real(theirs.detach()))


def test_a_number_as_start_is_that_of_both_parts() -> None:
    """So it is for every slot that starts as a number, that of RMSprop too."""
    tx = torchopt.scale_by_rms(initial_scale=0.5)
    state = tx.init([torch.ones(2, dtype=torch.complex128)])
    assert_close(torch.view_as_real(state.square_avg[0]), torch.full((2, 2), 0.5, **F64))


@pytest.mark.parametrize("shape", [(), (3,)], ids=["one", "per-entry"])
def test_the_start_is_learned(shape: tuple[int, ...]) -> None:
    """Through two steps of one parameter, whose slots could be packed."""
    value = (0.3 + torch.rand(shape, **F64)).requires_grad_()
    p, grads = nonzero(2, 3), [nonzero(2, 3) for _ in range(2)]

    def function() -> Tensor:
        tx = torchopt.adagrad(0.1, initial_accumulator_value=value)
        state, q = tx.init([p]), [p]
        for g in grads:
            updates, state = tx.update([g], state, q, inplace=False)
            q = torchopt.apply_updates(q, updates, inplace=False)
        return (q[0] ** 3).sum()

    assert_derivative(function, [value])


def test_a_group_has_a_start_of_its_own() -> None:
    a, b = (nn.Parameter(torch.zeros(1, **F64)) for _ in range(2))
    groups = [{"params": [a]}, {"params": [b], "initial_accumulator_value": 8.0}]
    optimizer = torchopt.Adagrad(groups, lr=1.0, eps=0.0)
    a.grad, b.grad = torch.ones(1, **F64), torch.ones(1, **F64)
    optimizer.step()
    assert_close(a.detach(), torch.tensor([-1.0], **F64))
    assert_close(b.detach(), torch.tensor([-1 / 3], **F64))


def test_sparse_gradients_over_many_steps() -> None:
    """Rows that occur several times are summed before they are squared; sums of others stay."""
    ours, theirs = (nn.Embedding(6, 2, sparse=True, dtype=torch.float64) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    pairs = [
        (ours, torchopt.Adagrad(ours.parameters(), **OPTIONS)),
        (theirs, torch.optim.Adagrad(theirs.parameters(), **OPTIONS)),
    ]
    for step in range(30):
        index = torch.tensor([step % 5, 1, 1])
        for net, optimizer in pairs:
            optimizer.zero_grad()
            (net(index) ** 3).sum().backward()
            optimizer.step()
    assert_close(ours.weight.detach(), theirs.weight.detach())
    sums = [optimizer.state[net.weight]["sum"] for net, optimizer in pairs]
    assert_close(*sums)
    assert (sums[0][5] == 0.3).all()
