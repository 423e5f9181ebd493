"""Rules of one tensor over many small ones of one shape: a batch gives what each gives alone."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from cases import CASES, Case
from tolerances import assert_close

import torchopt
from torchopt.core import batching


BATCHED = [
    c
    for c in CASES
    if any(getattr(part, "batches", False) for part in c.recipe(**c.kwargs).plan.parts)
]
SHAPES = [(3, 4)] * 5 + [(6,)] * 4 + [()] * 4 + [(2, 3)] * 2 + [(2, 1, 3)] * 4


def stepped(case: Case, steps: int = 4, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(3)
    params = [torch.randn(s, dtype=dtype, requires_grad=True) for s in SHAPES]
    optimizer = case.cls(params, **case.kwargs)
    for step in range(steps):
        for k, p in enumerate(params):
            p.grad = torch.randn_like(p)
            if k == 2 and step == 1:
                p.grad = None  # from now on it is a step behind
        optimizer.step()
    return optimizer, params


def leaves(optimizer: torch.optim.Optimizer, params: list[torch.Tensor]) -> list[torch.Tensor]:
    slots = [optimizer.state[p][n] for p in params for n in sorted(optimizer.state[p])]
    return [p.detach() for p in params] + [torch.as_tensor(x) for x in slots]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The positions of every batch that is taken."""
    batches: list[list[int]] = []
    own = batching.in_one_batch

    def noted(rule: Any, leaves: Any, positions: Any) -> Any:
        batches.append(list(positions))
        return own(rule, leaves, positions)

    monkeypatch.setattr(batching, "in_one_batch", noted)
    return batches


def test_the_table_has_some() -> None:
    assert {c.algorithm.name for c in BATCHED} >= {"adafactor", "lamb", "lars", "novograd", "sm3"}


@pytest.mark.parametrize("case", BATCHED, ids=lambda c: c.name)
def test_a_batch_gives_what_each_gives_alone(
    case: Case, taken: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    together = leaves(*stepped(case))
    assert [0, 1, 2, 3, 4] in taken
    assert [0, 1, 3, 4] in taken  # the third counts a step less
    assert {len(positions) for positions in taken} == {4, 5}  # two are no batch
    monkeypatch.setattr(batching, "batches", lambda leaves: [])
    for a, b in zip(together, leaves(*stepped(case)), strict=True):
        assert a.shape == b.shape
        assert_close(a, b)


@pytest.mark.parametrize("case", BATCHED[:1], ids=lambda c: c.name)
def test_its_state_can_be_copied_saved_and_loaded(case: Case) -> None:
    optimizer, params = stepped(case)
    twin_params = copy.deepcopy(params)
    twin = case.cls(twin_params, **case.kwargs)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twin.load_state_dict(torch.load(file))
    for k, (p, q) in enumerate(zip(params, twin_params)):
        p.grad = torch.full_like(p, 0.3 + k)
        q.grad = p.grad.clone()
    optimizer.step()
    twin.step()
    for a, b in zip(leaves(optimizer, params), leaves(twin, twin_params), strict=True):
        assert torch.equal(a, b)


@torchopt.transformation
class Unit(torchopt.TensorTransformation):
    """A rule of a user's own, which says nothing of batches."""

    def rule(self, g: Any, p: Any, t: Any, slots: Any) -> Any:
        return g / g.norm().item(), slots


def test_a_rule_that_claims_nothing_is_not_batched(taken: list[list[int]]) -> None:
    g = [torch.randn(3) for _ in range(6)]
    with torch.no_grad():
        updates, _ = Unit().update(g, Unit().init(g))
    assert not taken
    assert_close(updates[4], g[4] / g[4].norm())


def updates_of(tx: Any, g: list[torch.Tensor], p: list[torch.Tensor]) -> list[torch.Tensor]:
    return tx.update(g, tx.init(p), p, inplace=False)[0]


def test_nothing_is_batched_where_a_derivative_is_recorded(taken: list[list[int]]) -> None:
    g, p = ([torch.randn(2, 3, dtype=torch.float64) for _ in range(6)] for _ in range(2))
    tx = torchopt.adafactor(0.1)
    with torch.no_grad():
        plain = updates_of(tx, g, p)
    assert taken == [[0, 1, 2, 3, 4, 5]]
    taken.clear()
    g[0].requires_grad_()
    first, *others = updates_of(tx, g, p)
    assert not taken
    assert first.requires_grad
    for a, b in zip(plain, (first, *others)):
        assert_close(a, b.detach())
    with torch.no_grad():
        batch = [x.detach().expand(3, 2, 3) for x in g]
        torch.func.vmap(lambda *g: updates_of(tx, list(g), p))(*batch)
    assert not taken


@pytest.mark.parametrize("learned", [True, False])
def test_numbers_that_are_tensors_stay_with_their_parameter(
    learned: bool, taken: list[list[int]]
) -> None:
    g = [torch.randn(4, dtype=torch.float64) for _ in range(5)]
    lr = torch.tensor(0.2, dtype=torch.float64, requires_grad=learned)
    with torch.no_grad():
        updates = updates_of(torchopt.adafactor(lr), g, g)
        assert not taken
        for a, b in zip(updates, updates_of(torchopt.adafactor(0.2), g, g)):
            assert_close(a, b)


def test_parameters_of_other_numbers_are_no_batch(taken: list[list[int]]) -> None:
    params = [torch.randn(3, requires_grad=True) for _ in range(8)]
    for p in params:
        p.grad = torch.randn(3)
    groups = [{"params": params[:4], "lr": 0.1}, {"params": params[4:], "lr": 0.3}]
    torchopt.NovoGrad(groups).step()
    assert taken == [[0, 1, 2, 3], [4, 5, 6, 7]]
