"""A transformation made anew in each call is traced once; equal ones share what was found."""

import gc
import weakref

import pytest
import torch
from conftest import nonzero
from fusing import needs_library

import torchopt
from torchopt.core.hyper import hyper
from torchopt.core.rules import ElementwiseTransformation
from torchopt.core.transform import transformation
from torchopt.kernels import matching


pytestmark = needs_library


@pytest.fixture
def traces(monkeypatch):
    """The parts of each run that is traced."""
    matching._known_variants.cache_clear()
    seen = []
    original = matching.build

    def watched(parts, *args):
        seen.append([type(part).__name__ for part in parts])
        return original(parts, *args)

    monkeypatch.setattr(matching, "build", watched)
    return seen


def updated(tx):
    torch.manual_seed(0)
    p = nonzero(3, 4)
    state = tx.init(p)
    for _ in range(2):
        update, state = tx.update(nonzero(3, 4), state, p, inplace=False)
    return update


def test_equal_transformations_are_traced_once(traces):
    first = updated(torchopt.adam(0.01))
    count = len(traces)
    assert torch.equal(updated(torchopt.adam(0.01)), first)
    assert len(traces) == count > 0


def test_other_numbers_give_other_updates(traces):
    for tx, other in ((0.01, 0.02), ((0.9, 0.99), (0.8, 0.99))):
        make = torchopt.adam if isinstance(tx, float) else lambda betas: torchopt.adam(0.1, betas)
        first, second = (updated(make(value)) for value in (tx, other))
        reference = updated(make(other).with_accelerated_op(False))
        assert not torch.equal(first, second)
        torch.testing.assert_close(second, reference, rtol=1e-12, atol=0)


@transformation
class Scale(ElementwiseTransformation):
    """A rule that reads a number from itself, and one that is no hyperparameter."""

    factor: float = hyper(1.0)
    power: int = 1

    def rule(self, g, p, t, slots, factor):
        return g * (self.factor * self.power), ()


def test_fields_that_a_rule_reads_from_itself_count():
    for factor, power in ((2.0, 1), (3.0, 1), (3.0, 2), (2.0, 1)):
        torch.manual_seed(0)
        g = nonzero(3, 4)
        tx = torchopt.chain(Scale(factor, power), torchopt.adam(0.1))
        slow = tx.with_accelerated_op(False)
        fast, expected = (
            x.update(g, x.init(g), g, inplace=False)[1].slots["exp_avg"] for x in (tx, slow)
        )
        torch.testing.assert_close(fast, expected, rtol=1e-12, atol=0)


def test_learned_rates_share_what_was_traced(traces):
    lr = torch.tensor(0.1, dtype=torch.float64)
    updated(torchopt.adam(lr))
    count = len(traces)
    for _ in range(3):
        updated(torchopt.adam(lr.clone()))
        updated(torchopt.adam([torch.tensor(0.2)]))
    assert len(traces) == count > 0


def test_tensors_are_not_kept(traces):
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True).exp()
    for _ in range(3):
        updated(torchopt.adam(lr))
    reference = weakref.ref(lr)
    del lr
    gc.collect()
    assert reference() is None
