"""Values and derivatives against slow copies that follow the papers (``references/``).

Gradients change from step to step: so betas, the order of operations and bias corrections show.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Case, every
from conftest import nonzero, nonzero_like
from tolerances import assert_close
from torch import Tensor, nn


pytestmark = pytest.mark.complete


STEPS = 6
#: Of differences of derivatives, which are of order 1 here.
ROUNDING = 16 * torch.finfo(torch.float64).eps
Trees = dict[str, Tensor]

every_reference = every(lambda case: case.algorithm.reference)
every_meta_reference = every(lambda case: case.algorithm.reference and case.meta)


def problem(case: Case) -> tuple[Trees, list[Trees]]:
    params = {"w": nonzero(7, 3), "b": nonzero(3), "s": nonzero()}
    grads = [nonzero_like(params) for _ in range(STEPS)]
    if case.algorithm.size == "all":  # alike, so that estimates grow
        grads = [{n: grads[0][n] * (1 + 0.4 * x) for n, x in g.items()} for g in grads]
    return params, grads


def followed(
    case: Case, params: Trees, grads: list[Trees], arguments: dict[str, Any] | None = None
) -> list[tuple[Trees, dict[str, Trees]]]:
    """Return weights and slots after each step of the reference."""
    k = {**case.algorithm.defaults(), **(case.kwargs if arguments is None else arguments)}
    if case.algorithm.size == "all":  # what one parameter does depends on the others
        return list(case.algorithm.reference(k, params, grads))
    each = {
        n: list(case.algorithm.reference(k, p, [g[n] for g in grads])) for n, p in params.items()
    }
    found = []
    for step in range(len(grads)):
        now = {n: steps[step] for n, steps in each.items()}
        names = dict.fromkeys(slot for _, kept in now.values() for slot in kept)
        slots = {s: {n: kept[s] for n, (_, kept) in now.items() if s in kept} for s in names}
        found.append(({n: p for n, (p, _) in now.items()}, slots))
    return found


@every_reference
def test_the_functional_api(case: Case) -> None:
    params, grads = problem(case)
    tx, now = case.tx(), params
    state = tx.init(params)
    for g, (weights, slots) in zip(grads, followed(case, params, grads)):
        now, state = tx.apply_gradients(g, state, now, inplace=False)
        assert_close(now, weights)
        for name, column in slots.items():
            assert_close({n: getattr(state, name)[n] for n in column}, column)


@every_reference
def test_the_object_oriented_api(case: Case) -> None:
    params, grads = problem(case)
    own = {n: nn.Parameter(p.clone()) for n, p in params.items()}
    optimizer = case.cls(own.items(), **case.kwargs)
    for g, (weights, slots) in zip(grads, followed(case, params, grads)):
        for n, p in own.items():
            p.grad = g[n].clone()
        optimizer.step()
        assert_close({n: p.detach() for n, p in own.items()}, weights)
        for name, column in slots.items():
            assert_close({n: optimizer.state[own[n]][name] for n in column}, column)


@every_meta_reference
def test_the_differentiable_api(case: Case) -> None:
    params, grads = problem(case)
    net = nn.ParameterDict({n: p.clone() for n, p in params.items()})
    inner = case.meta(net, **case.kwargs)
    for g, (weights, _) in zip(grads, followed(case, params, grads)):
        inner.step(sum((net[n] * g[n]).sum() for n in params))
        assert_close({n: p.detach() for n, p in net.items()}, weights)


@every_reference
def test_to_maximize_is_to_descend_on_the_negative(case: Case) -> None:
    if "maximize" not in case.algorithm.flags():
        pytest.skip("it has no maximize")
    params, grads = problem(case)
    tx, now = case.recipe(**case.kwargs, maximize=True), params
    state = tx.init(params)
    for g in grads:
        now, state = tx.apply_gradients(g, state, now, inplace=False)
    negative = [{n: -x for n, x in g.items()} for g in grads]
    assert_close(now, followed(case, params, negative)[-1][0])


@every_reference
def test_every_number_shows(case: Case) -> None:
    """With another number, or two of a pair exchanged, the reference itself goes elsewhere."""
    params, grads = problem(case)
    weights, slots = followed(case, params, grads)[-1]
    changes = [{name: 0.87 * case.value(name) + 0.0113} for name in case.tunable]
    changes += [
        {f"{name}.0": value[1], f"{name}.1": value[0]}
        for name, value in case.kwargs.items()
        if isinstance(value, tuple) and len(value) == 2 and None not in value
    ]
    for change in changes:
        other, others = followed(case, params, grads, case.arguments(change))[-1]
        same = all(torch.equal(other[n], weights[n]) for n in params)
        same &= all(
            torch.equal(others[s][n], column[n]) for s, column in slots.items() for n in column
        )
        assert not same, change


@pytest.mark.parametrize("setting", [None, False], ids=["fused", "rules"])
@every_meta_reference
def test_derivatives_are_those_of_the_reference(case: Case, setting: bool | None) -> None:
    """By the first weights, all gradients, and every number; of weights and slots alike."""
    params, grads = problem(case)
    numbers = case.tensors(requires_grad=True)
    start = {n: p.requires_grad_() for n, p in params.items()}
    for g in grads:
        for x in g.values():
            x.requires_grad_()
    inputs = [*start.values(), *(x for g in grads for x in g.values()), *numbers.values()]
    tx, now = case.tx(numbers, use_accelerated_op=setting), start
    state = tx.init(start)
    for g in grads:
        now, state = tx.apply_gradients(g, state, now, inplace=False)
    weights, slots = followed(case, start, grads, case.arguments(numbers))[-1]
    ours = [*now.values(), *(getattr(state, s)[n] for s in slots for n in slots[s])]
    theirs = [*weights.values(), *(slots[s][n] for s in slots for n in slots[s])]
    factors = [nonzero(*x.shape) for x in ours]

    def derivatives(outputs: list[Tensor]) -> list[Tensor]:
        total = sum((f * x).sum() for f, x in zip(factors, outputs))
        assert isinstance(total, Tensor)
        found = torch.autograd.grad(total, inputs, allow_unused=True)
        found = [torch.zeros_like(x) if d is None else d for d, x in zip(found, inputs)]
        # a derivative that is zero may be a difference of two: a norm of one entry over itself
        return [torch.where(d.abs() < ROUNDING, 0.0, d) for d in found]

    assert_close(derivatives(ours), derivatives(theirs), times=100)
