"""Solvers whose iterations are taken again: the derivative of recorded ones, or a clear refusal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from equations import F64
from test_solver_derivatives import ROWS, START, loss, objective, parameters
from tolerances import relative_error
from torch import Tensor

import torchopt
from torchopt import diff
from torchopt.diff import Checkpointed, FirstOrder, Forward, Implicit, Mixed, Unrolled
from torchopt.solvers import GradientDescent, Newton, minimize


REPLAYED = [
    "sgd",
    "nesterov",
    "adagrad",
    "newton",
    "newton-cg",
    "gauss-newton",
    "squares-by-newton",
    "newton-root",
    "iteration",
]
ADJOINTS = [
    Checkpointed(),
    Checkpointed("log"),
    diff.Truncated(last=1000),
    diff.Offloaded(),
    diff.Auto(memory="1GiB"),
]


@pytest.mark.parametrize("name", REPLAYED)
def test_iterations_taken_again_have_the_derivative_of_recorded_ones(name: str) -> None:
    row, a = ROWS[name], parameters().requires_grad_()
    plain: Any = row.run(row.fn, row.solver, START, a, adjoint=None)
    recorded: Any = row.run(row.fn, row.solver, START, a, adjoint=Unrolled())
    (wanted,) = torch.autograd.grad(recorded.params.sin().sum() + recorded.value, a)
    for adjoint in ADJOINTS:
        found: Any = row.run(row.fn, row.solver, START, a, adjoint=adjoint)
        assert torch.equal(found.params, plain.params)
        assert torch.as_tensor(found.value).item() == plain.value
        counts = (found.iterations, found.evaluations, found.outcome, found.grad_norm)
        assert counts == (plain.iterations, plain.evaluations, plain.outcome, plain.grad_norm)
        (g,) = torch.autograd.grad(found.params.sin().sum() + found.value, a)
        assert relative_error(g, wanted) < 1e-12


def test_second_derivatives_the_start_and_hyperparameters() -> None:
    def outer(tensors: Sequence[Tensor], adjoint: Any) -> Tensor:
        start, a, lr = tensors
        solver = GradientDescent(torchopt.sgd(lr), max_iter=4, tolerance_change=0.0)
        params: Any = minimize(objective, solver, start, a, adjoint=adjoint).params
        return params.sin().sum()

    inputs = [START + 0.1, parameters(), torch.tensor(0.3, **F64)]
    results = []
    for adjoint in (Unrolled(), Checkpointed("sqrt")):
        leaves = [x.clone().requires_grad_() for x in inputs]
        grads = torch.autograd.grad(outer(leaves, adjoint), leaves, create_graph=True)
        seconds = torch.autograd.grad(torch.stack([g.square().sum() for g in grads]).sum(), leaves)
        results.append((*grads, *seconds))
    for found, wanted in zip(*results):
        assert relative_error(found, wanted) < 1e-12
    with torch.no_grad():
        assert not outer(inputs, Checkpointed()).requires_grad


def test_no_iterations_leave_the_start() -> None:
    a = parameters()
    start = minimize(objective, Newton(), START, a, adjoint=None).params.requires_grad_()  # pyright: ignore[reportAttributeAccessIssue]
    solution: Any = minimize(objective, Newton(), start, a, adjoint=Checkpointed())
    assert solution.iterations == 0
    assert torch.equal(torch.autograd.grad(solution.params.sum(), start)[0], torch.ones(3, **F64))


def test_first_order_is_that_of_the_loop() -> None:
    """Gradients are constants: only the way of the weights is left, here that of a decay."""
    rate = torch.tensor(0.1, **F64, requires_grad=True)
    solver = GradientDescent(torchopt.sgd(0.5, weight_decay=rate), max_iter=1)
    solution: Any = minimize(lambda p: p.square().sum(), solver, START + 1, adjoint=FirstOrder())
    (found,) = torch.autograd.grad(solution.params.sum(), rate)
    assert abs(found.item() + 1.5) < 1e-12  # of 1 - 0.5 * (2 + rate)


@pytest.mark.parametrize(
    ("name", "adjoint", "text"),
    [
        (
            "lbfgs",
            Checkpointed(),
            r"Checkpointed\(\) takes steps again, which LBFGS cannot",
        ),
        ("broyden", Checkpointed(), "which Broyden cannot"),
        ("anderson", Checkpointed(), "Write adjoint=torchopt.diff.Unrolled"),
        ("bisection", Checkpointed(), "which Bisection cannot"),
        ("levenberg-marquardt", Checkpointed(), "which LevenbergMarquardt cannot"),
        ("sgd", Mixed(), "has to see how a step computes its gradients"),
        ("iteration", Forward(), "FixedPointIteration computes them"),
        ("newton", FirstOrder(), r"Write adjoint=torchopt.diff.Checkpointed\(\)"),
        ("sgd", Implicit, r"Write adjoint=Implicit\(\)"),
        ("newton-root", Checkpointed, r"Write adjoint=Checkpointed\(\)"),
        ("gauss-newton", "implicit", "adjoint must be torchopt.diff.Implicit"),
    ],
)
def test_refusals_say_what_to_type(name: str, adjoint: Any, text: str) -> None:
    a = parameters().requires_grad_()
    with pytest.raises(TypeError, match=text):
        loss(ROWS[name], a, adjoint=adjoint)
