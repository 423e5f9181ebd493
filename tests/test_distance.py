"""Optimizers that estimate the distance to the solution: values of Optax, and what is global."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CASES, Case
from conftest import nonzero, nonzero_like
from tolerances import all_finite, assert_close
from torch import Tensor, nn

import torchopt


F64 = {"dtype": torch.float64}
ROWS = [case for case in CASES if case.algorithm.size == "all"]
every_row = pytest.mark.parametrize("case", ROWS, ids=lambda case: case.name)

GRADS = [[[0.3, -0.2], [1.0]], [[0.6, -0.3], [0.5]], [[0.2, 0.4], [0.7]], [[0.5, -0.1], [-0.3]]]
GRADS += [[[0.1, -0.2], [0.4]]]


def falling(count: Any) -> Any:
    return 1 - count / 8


#: Weights and estimate after five steps of Optax 0.2.8 in float64, with the call that made them.
OPTAX: dict[str, tuple[torchopt.GradientTransformation, list[float], float]] = {
    "prodigy(0.9, (0.8, 0.95), 0.9, 1e-3, 0.05, 5.0, 0.1)": (
        torchopt.prodigy(0.9, (0.8, 0.95), 0.9, 1e-3, 0.05, 5.0, 0.1),
        [-0.20274126169026027, -0.687351805862545, 1.4066931334008446],
        1.0639110420206357,
    ),
    "prodigy(0.9, (0.8, 0.95), None, 1e-3, 0.05, 5.0, 0.0, True)": (
        torchopt.prodigy(0.9, (0.8, 0.95), None, 1e-3, 0.05, 5.0, 0.0, True),
        [0.0594423940377837, -0.8386044909509321, 1.6593296194864926],
        0.45839498876062956,
    ),
    "prodigy(lambda n: 1 - n / 8, (0.8, 0.9), estim_lr0=0.05, estim_lr_coef=5.0)": (
        torchopt.prodigy(falling, (0.8, 0.9), estim_lr0=0.05, estim_lr_coef=5.0),
        [0.09443337977498548, -0.8453214174037523, 1.6956406263653983],
        0.6885702235150902,
    ),
    "dadapt_adamw(0.9, (0.8, 0.95), 1e-3, 0.05, 0.1)": (
        torchopt.dadapt_adamw(0.9, (0.8, 0.95), 1e-3, 0.05, 0.1),
        [0.18858306735411406, -0.868403105303857, 1.6950210757776998],
        0.1625924060294413,
    ),
    "dadapt_adamw(lambda n: 1 - n / 8, (0.9, 0.6), 1e-8, 0.2)": (
        torchopt.dadapt_adamw(falling, (0.9, 0.6), 1e-8, 0.2),
        [-1.2282959393699824, -0.7711973920002408, 0.2570118753480229],
        1.35978187984252,
    ),
}


@pytest.mark.parametrize("call", OPTAX)
def test_values_of_optax(call: str) -> None:
    tx, weights, estimate = OPTAX[call]
    params = [torch.tensor([0.5, -1.0], **F64), torch.tensor([2.0], **F64)]
    state = tx.init(params)
    for grads in GRADS:
        each = [torch.tensor(g, **F64) for g in grads]
        params, state = tx.apply_gradients(each, state, params, inplace=False)
    assert_close(torch.cat(params), torch.tensor(weights, **F64))
    assert_close(state.estim_lr[1], torch.tensor(estimate, **F64))


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
