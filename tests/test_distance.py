"""Optimizers that estimate the distance to the solution: what is global."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CASES, Case
from conftest import nonzero, nonzero_like
from tolerances import all_finite, assert_close
from torch import Tensor, nn


F64 = {"dtype": torch.float64}
ROWS = [case for case in CASES if case.algorithm.size == "all"]
every_row = pytest.mark.parametrize("case", ROWS, ids=lambda case: case.name)


def start() -> dict[str, Tensor]:
    return {"w": nonzero(2, 3), "b": nonzero(3)}


def estimates(state: Any) -> list[float]:
    return [d.item() for d in state.estim_lr.values()]


@every_row
def test_the_estimate_is_one_number_that_never_falls(case: Case) -> None:
    params, tx = start(), case.tx()
    direction, state, before = nonzero_like(params), tx.init(params), 0.0
    seen = set()
    for _ in range(8):
        noise = nonzero_like(params)
        grads = {n: direction[n] + 0.5 * noise[n] for n in params}
        params, state = tx.apply_gradients(grads, state, params, inplace=False)
        w, b = estimates(state)
        assert w == b >= before
        before = w
        seen.add(w)
    assert len(seen) > 3


@every_row
def test_the_number_of_tensors_does_not_matter(case: Case) -> None:
    """Two parameters, in two groups too, are estimated as one vector is."""
    params, tx = start(), case.tx()
    whole = torch.cat([p.flatten() for p in params.values()])
    parts = {n: nn.Parameter(p.clone()) for n, p in params.items()}
    optimizer = case.cls([{"params": [p]} for p in parts.values()], **case.kwargs)
    state = tx.init(whole)
    for _ in range(5):
        grads = nonzero_like(params)
        flat = torch.cat([g.flatten() for g in grads.values()])
        whole, state = tx.apply_gradients(flat, state, whole, inplace=False)
        for n, p in parts.items():
            p.grad = grads[n]
        optimizer.step()
    found = torch.cat([p.detach().flatten() for p in parts.values()])
    assert_close(found, whole, times=10)
    assert_close(optimizer.state[parts["b"]]["estim_lr"], state.estim_lr, times=10)


@every_row
def test_while_all_gradients_are_zero_nothing_moves_and_nothing_is_nan(case: Case) -> None:
    tx = case.recipe(**{**case.kwargs, **({"weight_decay": 0.0} if case.needs_params else {})})
    params = start()
    zero = {n: torch.zeros_like(p).requires_grad_() for n, p in params.items()}
    new, state = params, tx.init(params)
    first = estimates(state)
    for _ in range(2):
        new, state = tx.apply_gradients(zero, state, new, inplace=False)
    assert_close(new, params)
    assert estimates(state) == first
    for _ in range(2):
        new, state = tx.apply_gradients(nonzero_like(params), state, new, inplace=False)
    assert all_finite(*new.values())
    assert not torch.equal(new["w"], params["w"])
    total = sum(p.square().sum() for p in new.values())
    assert isinstance(total, Tensor)
    assert all_finite(*torch.autograd.grad(total, list(zero.values()), allow_unused=False))


@every_row
def test_a_parameter_that_comes_later_begins_with_the_estimate_of_the_others(case: Case) -> None:
    params, tx = start(), case.tx()
    state, direction = tx.init(params), nonzero_like(params)
    own = {n: nn.Parameter(p.clone()) for n, p in params.items()}
    optimizer = case.cls(own.items(), **case.kwargs)
    alone, only = {"w": params["w"]}, tx.init({"w": params["w"]})
    for step in range(8):
        grads: dict[str, Any] = {n: g * (1 + 0.2 * nonzero(*g.shape)) for n, g in direction.items()}
        if step < 5:
            grads["b"] = None
            alone, only = tx.apply_gradients({"w": grads["w"]}, only, alone, inplace=False)
        for n, p in own.items():
            p.grad = grads[n]
        optimizer.step()
        params, state = tx.apply_gradients(grads, state, params, inplace=False)
        if step == 4:
            assert_close(params["w"], alone["w"])  # what has no gradient counts for nothing
            assert state.estim_lr["b"] < state.estim_lr["w"] == only.estim_lr["w"]
        if step > 4:
            assert state.estim_lr["b"] == state.estim_lr["w"]
            assert_close({n: p.detach() for n, p in own.items()}, params)


@every_row
def test_parameters_of_two_dtypes_have_one_estimate(case: Case) -> None:
    params, tx = {"w": nonzero(4), "b": nonzero(4, dtype=torch.float32)}, case.tx()
    state, direction = tx.init(params), nonzero_like(params)
    for _ in range(4):
        params, state = tx.apply_gradients(direction, state, params, inplace=False)
    assert {n: d.dtype for n, d in state.estim_lr.items()} == {
        n: p.dtype for n, p in params.items()
    }
    assert_close(state.estim_lr["b"], state.estim_lr["w"].float())


@every_row
def test_a_learned_first_estimate_is_kept_in_the_dtype_of_the_parameter(case: Case) -> None:
    first = torch.tensor(0.1, **F64, requires_grad=True)
    state = case.tx({"estim_lr0": first}).init([nonzero(3, dtype=torch.float32)])
    assert state.estim_lr[0].dtype == torch.float32
    assert torch.autograd.grad(state.estim_lr[0], first)[0] == 1


@every_row
def test_a_checkpoint_resumes(case: Case) -> None:
    own = [nn.Parameter(p) for p in start().values()]
    grads = [nonzero_like([p.detach() for p in own]) for _ in range(6)]

    def steps(optimizer: Any, params: list[Any], which: list[Any]) -> None:
        for each in which:
            for p, g in zip(params, each):
                p.grad = g
            optimizer.step()

    optimizer = case.cls(own, **case.kwargs)
    steps(optimizer, own, grads[:3])
    copies = [nn.Parameter(p.detach().clone()) for p in own]
    resumed = case.cls(copies)
    resumed.load_state_dict(optimizer.state_dict())
    steps(optimizer, own, grads[3:])
    steps(resumed, copies, grads[3:])
    assert all(map(torch.equal, own, copies))


@pytest.mark.parametrize(
    "case", [c for c in ROWS if c.name == c.algorithm.name], ids=lambda c: c.name
)
@pytest.mark.parametrize("distance", [0.1, 30.0])
def test_it_finds_the_distance_from_the_defaults(case: Case, distance: float) -> None:
    """No number is given, and the estimate comes to the size of the distance."""
    net = nn.ParameterDict({"w": torch.full((4,), distance, **F64)})
    optimizer = case.cls(net.parameters())
    for _ in range(200):
        optimizer.zero_grad()
        net["w"].abs().sum().backward()
        optimizer.step()
    estimate = optimizer.state[net["w"]]["estim_lr"].item()
    norm = 2 * distance if "sgd" in case.name else distance
    assert 0.1 * norm < estimate < 3 * norm
    assert net["w"].abs().max() < 0.6 * distance
