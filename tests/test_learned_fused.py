"""Learned hyperparameters as operands of kernels: derivatives against rules and differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import nonzero
from fusing import kernel_calls_fixture as kernel_calls_fixture
from fusing import needs_library
from learning import (
    CASES,
    FACES,
    FORMS,
    Net,
    gradients,
    judged,
    leaves_of,
    of_each,
    problem,
    shared,
)
from tolerances import META_GRADIENT, assert_close, relative_error
from torch import Tensor, nn

import torchopt
from torchopt.kernels import why


pytestmark = needs_library

STEPS = 3


def derivatives(
    case: str, form: str, face: str, setting: bool | None, order: int = 1
) -> tuple[list[Any], list[Tensor]]:
    """The new parameters, then derivatives by hyperparameters and by the first parameters."""
    make, numbers = CASES[case]
    params, coefficients = problem()
    values = {name: FORMS[form](value, params) for name, value in numbers.items()}
    tx = make(**values).with_accelerated_op(setting)
    new = FACES[face](tx, params, coefficients, STEPS)
    inputs = [*leaves_of(values.values()), *params]
    found = list(torch.autograd.grad(judged(new, coefficients), inputs, create_graph=order > 1))
    if order > 1:
        total = torch.stack(
            [(x * torch.linspace(1, 2, x.numel(), dtype=x.dtype).view_as(x)).sum() for x in found]
        ).sum()
        found += torch.autograd.grad(total, inputs)
    return [*(x.detach() for x in new), *(x.detach() for x in found)], inputs


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_derivatives_are_those_of_the_rules(
    case: str, form: str, face: str, kernel_calls: list[int]
) -> None:
    expected, _ = derivatives(case, form, face, False)
    assert not kernel_calls
    found, _ = derivatives(case, form, face, True)
    kinds = 2 if form == "entry" else 1  # a parameter with one entry has one number
    assert len(kernel_calls) == 2 * kinds * STEPS
    assert_close(found, expected, times=100)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_derivatives_are_those_of_differences(case: str, form: str) -> None:
    """Along a direction for each hyperparameter."""
    make, numbers = CASES[case]
    found, inputs = derivatives(case, form, "apply_gradients", True)
    own = len(inputs) - 3
    for by, x, derivative in zip(range(own), inputs, found[3:]):
        direction = torch.ones_like(x) if x.dim() == 0 else nonzero(*x.shape).to(x.dtype)

        def value(eps: float, by: int = by, direction: Tensor = direction) -> float:
            params, coefficients = problem()
            with torch.no_grad():
                values = {name: FORMS[form](v, params) for name, v in numbers.items()}
                leaves_of(values.values())[by].add_(direction, alpha=eps)
            new = FACES["apply_gradients"](
                make(**values).with_accelerated_op(False), params, coefficients, STEPS
            )
            return judged(new, coefficients).item()

        eps = 1e-5
        expected = (8 * (value(eps) - value(-eps)) - (value(2 * eps) - value(-2 * eps))) / 12 / eps
        assert relative_error((derivative * direction).sum(), torch.tensor(expected)) < max(
            META_GRADIENT, 1e-9 / abs(expected)
        )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", ["sgd-momentum", "adam", "adamw", "rmsprop"])
def test_second_derivatives_are_those_of_the_rules(case: str, form: str) -> None:
    expected, _ = derivatives(case, form, "differentiable", False, order=2)
    found, _ = derivatives(case, form, "differentiable", None, order=2)
    assert_close(found, expected, times=1000)


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_left_to_the_rules(case: str) -> None:
    make, numbers = CASES[case]
    params, _ = problem()
    for form in FORMS.values():
        tx = make(**{name: form(value, params) for name, value in numbers.items()})
        assert why(tx, params, params=params) == []


# Which hyperparameters ----------------------------------------------------------------------------


def both(make: Any, hypers: Any, inputs: list[Tensor], coefficients: Any) -> list[Any]:
    """Derivatives through a MetaOptimizer, by the rules and by kernels."""
    results = []
    for setting in (False, True):
        net = Net([x.detach().clone().requires_grad_() for x in problem()[0]])
        optimizer = torchopt.MetaOptimizer(net, make(hypers()).with_accelerated_op(setting))
        start = net.now()
        for _ in range(STEPS):
            optimizer.step(net.loss(coefficients))
        results.append(torch.autograd.grad(judged(net.now(), coefficients), [*inputs, *start]))
    return results


def test_expressions_of_what_is_learned(kernel_calls: list[int]) -> None:
    logarithm = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
    _, coefficients = problem()
    for function in (torch.exp, torch.nn.functional.softplus):
        expected, found = both(
            torchopt.adam, lambda f=function: f(logarithm), [logarithm], coefficients
        )
        assert_close(found, expected, times=100)
    assert kernel_calls


def test_numbers_and_tensors_side_by_side(kernel_calls: list[int]) -> None:
    """A rate is learned for one parameter, fixed for another, and of entries for the third."""
    params, coefficients = problem()
    one, entries = of_each(0.1, params)[0], torch.rand(5, dtype=torch.float64, requires_grad=True)
    lr = {"0": one, "1": entries, "2": 0.3}
    expected, found = both(torchopt.adam, lambda: lr, [one, entries], coefficients)
    assert_close(found, expected, times=100)
    assert len(kernel_calls) == 3 * 2 * STEPS  # a kernel each


def test_schedules_that_are_learned(kernel_calls: list[int]) -> None:
    rate = shared(0.3, [])
    schedule = torchopt.schedules.exponential_decay(rate, transition_steps=2, decay_rate=0.5)
    _, coefficients = problem()
    expected, found = both(torchopt.sgd, lambda: schedule, [rate], coefficients)
    assert_close(found, expected, times=100)
    assert len(kernel_calls) == 2 * STEPS


def test_one_rate_of_several_groups(kernel_calls: list[int]) -> None:
    lr, decay = shared(0.1, []), shared(0.05, [])
    results = []
    for setting in (False, True):
        params, coefficients = problem()
        nets = [Net(params[:1]), Net(params[1:])]
        optimizer = torchopt.MetaOptimizer(
            [nets[0], {"params": nets[1], "weight_decay": decay}],
            torchopt.adam(lr).with_accelerated_op(setting),
        )
        for _ in range(STEPS):
            optimizer.step(nets[0].loss(coefficients[:1]) + nets[1].loss(coefficients[1:]))
        new = [*nets[0].now(), *nets[1].now()]
        results.append(torch.autograd.grad(judged(new, coefficients), [lr, decay, *params]))
    assert kernel_calls
    assert_close(results[1], results[0], times=100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_other_dtypes(form: str, dtype: torch.dtype) -> None:
    """The derivative has the dtype of the hyperparameter; the oracle is float64."""
    results = []
    for own, setting in ((torch.float64, False), (dtype, True)):
        params, coefficients = problem(dtype=dtype)
        params = [p.detach().to(own).requires_grad_() for p in params]
        coefficients = [c.to(own) for c in coefficients]
        torch.manual_seed(1)
        lr = FORMS[form](0.1, [p.double() for p in params])
        tx = torchopt.sgd(lr, momentum=0.5).with_accelerated_op(setting)
        new = FACES["apply_gradients"](tx, params, coefficients, 1)
        loss = torch.stack([(p.double() * c.double()).sum() for p, c in zip(new, coefficients)])
        results.append(torch.autograd.grad(loss.sum(), leaves_of([lr])))
    assert {x.dtype for x in results[1]} == {torch.float64}
    assert_close(results[1], results[0], dtype, times=10)


def test_a_rate_of_half_precision() -> None:
    params, coefficients = problem(dtype=torch.float32)
    lr = torch.tensor(0.125, dtype=torch.bfloat16, requires_grad=True)
    new = FACES["update"](torchopt.sgd(lr, use_accelerated_op=True), params, coefficients, 1)
    loss = torch.stack([x.sum() for x in new]).sum()
    (found,) = torch.autograd.grad(loss, lr)
    expected = -torch.stack([g.sum() for g in gradients(params, coefficients)]).sum()
    assert found.dtype == torch.bfloat16
    assert_close(found, expected.detach(), torch.bfloat16, times=2)


@pytest.mark.parametrize("number", [1.0, 1.5])
def test_decay_rates_out_of_range_give_what_the_rules_give(number: float) -> None:
    """Nobody checks what a tensor holds, and Python's numbers know no infinity by division."""
    results = []
    for setting in (False, None):
        params, coefficients = problem()
        beta = shared(number, params)
        tx = torchopt.adam(0.1, betas=(0.9, beta)).with_accelerated_op(setting)
        new = FACES["apply_gradients"](tx, params, coefficients, 1)
        results.append([*new, *torch.autograd.grad(judged(new, coefficients), [beta])])
    for found, expected in zip(*results):
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.isinf(), expected.isinf())


def test_without_a_derivative_tensors_are_numbers(kernel_calls: list[int]) -> None:
    """Every face, by the same kernel as the number."""
    params, coefficients = problem()
    lr = torch.tensor(0.1, dtype=torch.float64)
    for face in FACES.values():
        kernel_calls.clear()
        found, expected = (
            face(torchopt.adam(x, use_accelerated_op=True), params, coefficients, STEPS)
            for x in (lr, 0.1)
        )
        assert all(map(torch.equal, found, expected))
        assert len(kernel_calls) == 2 * STEPS


def test_rates_of_entries_in_the_object_oriented_face(kernel_calls: list[int]) -> None:
    params, coefficients = problem()
    lr = [torch.rand_like(p) for p in params]
    own = [nn.Parameter(p.detach().clone()) for p in params]
    optimizer = torchopt.SGD(own, lr=lr, use_accelerated_op=True)
    for p, c in zip(own, coefficients):
        p.grad = c.clone()
    optimizer.step()
    assert len(kernel_calls) == 2  # one parameter has one entry, and a number
    for new, p, rate, c in zip(own, params, lr, coefficients):
        assert torch.equal(new.detach(), p.detach() - rate * c)
