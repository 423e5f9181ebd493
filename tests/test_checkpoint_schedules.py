"""Schedules of checkpoints: counts that are known, and that what runs is what was counted."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from torchopt.diff import Checkpointed, unroll
from torchopt.diff.replay import schedules


#: length -> every -> steps taken once more, carries kept, steps recorded at a time
COUNTS = {
    256: {1: (0, 256, 1), "sqrt": (0, 64, 4), 16: (240, 31, 1)},
    1000: {1: (0, 1000, 1), "sqrt": (0, 125, 8), 31: (967, 62, 1)},
    10_000: {1: (0, 10_000, 1), "sqrt": (0, 400, 25), 100: (9900, 199, 1)},
}

#: length -> steps that are taken once more where the middle of what is left is kept, and carries
HALVING = {256: (769, 9), 1000: (3933, 11), 10_000: (54_609, 15)}

#: length, slots -> all steps without a graph of the best schedule that need not return the result
REVOLVE = {
    (1000, 5): 6284, (1000, 10): 3636, (1000, 20): 2747, (1000, 32): 2405, (1000, 100): 1898,
    (10_000, 7): 77_130, (10_000, 14): 46_124, (10_000, 32): 32_860, (10_000, 100): 24_747,
}  # fmt: skip


@pytest.mark.parametrize("length", COUNTS)
def test_counts_are_those_that_are_known(length: int) -> None:
    for every, (advances, carries, graphs) in COUNTS[length].items():
        plan = Checkpointed(every).plan(length, 8)
        found = plan.steps, plan.advances, plan.carries, plan.graphs
        assert found == (length, advances, carries, graphs)
        assert plan.bytes == 8 * carries


def test_the_graph_of_one_step_at_a_time_costs_as_many_steps_as_are_divided() -> None:
    for length, root in ((256, 16), (1000, 31), (10_000, 100)):
        one = Checkpointed("sqrt", graphs=1).plan(length)
        assert one == Checkpointed(root).plan(length)


@pytest.mark.parametrize(("length", "slots"), REVOLVE)
def test_revolve_is_binomial(length: int, slots: int) -> None:
    """It takes the steps of the formula, and those of its last gap, which the result costs."""
    r = schedules.repetitions(length, slots)
    formula = r * length - math.comb(slots + r, r - 1)
    assert formula == REVOLVE[length, slots]
    last_gap = length - schedules.Binomial(length, slots).kept()[-1]
    plan = Checkpointed("revolve", slots=slots).plan(length)
    assert plan.advances == formula - (length - 1) + (last_gap - 1)
    assert plan.carries == slots


@pytest.mark.parametrize("length", HALVING)
def test_with_as_many_carries_log_takes_fewer_steps_than_halving(length: int) -> None:
    advances, carries = HALVING[length]
    log, revolve = (Checkpointed(name).plan(length) for name in ("log", "revolve"))
    assert log.carries == carries
    assert log == Checkpointed("revolve", slots=carries).plan(length)
    assert 2 * advances / 3 > log.advances > revolve.advances
    assert revolve.carries == 2 * carries


def every_schedule() -> list[schedules.Schedule]:
    lengths = [*range(1, 20), 33, 64]
    names: list[Any] = [1, 2, 3, 5, 100, "sqrt", "log"]
    graphs = (None, 1, 2, 5)
    found = [schedules.make(name, None, n, g) for n in lengths for name in names for g in graphs]
    slots = [(n, c, g) for n in lengths for c in (1, 2, 3, 7) for g in (1, 2, 5)]
    return found + [schedules.make("revolve", c, n, g) for n, c, g in slots]


def test_every_schedule_reverses_each_step_once_from_what_it_has() -> None:
    for schedule in every_schedule():
        kept, at_hand, left = set(schedule.kept()), None, schedule.length
        recorded: list[int] = []
        for kind, step in schedule.backward():
            assert len(recorded) <= schedule.graphs
            if kind == "load":
                assert step in kept
                at_hand = step
            elif kind == "drop":
                kept.remove(step)
            elif kind == "pull":
                left -= 1
                assert step == left == recorded.pop()
            else:
                assert at_hand == step
                if kind == "keep":
                    kept.add(step)
                else:
                    recorded += [step] if kind == "record" else []
                    at_hand = step + 1
        assert left == 0
        assert not kept


def test_more_graphs_at_a_time_take_fewer_steps_again() -> None:
    textbook = Checkpointed(16, graphs=16).plan(256)
    assert (textbook.advances, textbook.carries, textbook.graphs) == (0, 16, 16)
    one, eight = (Checkpointed("log", graphs=graphs).plan(256).advances for graphs in (1, 8))
    assert eight < one / 1.5
    assert str(textbook).endswith("and the graphs of 16 steps")


@pytest.mark.parametrize("graphs", [None, 1, 3])
@pytest.mark.parametrize("every", [1, 3, "sqrt", "log", "revolve"])
def test_what_runs_is_what_was_counted(every: Any, graphs: int | None) -> None:
    adjoint, length, calls = Checkpointed(every, graphs=graphs), 12, []

    def step(w: Tensor, _: None) -> tuple[Tensor, None]:
        calls.append(torch.is_grad_enabled())
        return w.sin(), None

    w, _ = unroll(step, torch.ones(2, requires_grad=True), length=length, adjoint=adjoint)
    schedule = adjoint.schedule(length)
    turn, all_kept = schedule.turning(), schedule.kept() == list(range(length))
    assert calls[0] is calls[1 if all_kept else 2] is True  # the first two are watched
    assert (calls.count(True), calls.count(False)) == (2 + turn, length - 1 - turn - all_kept)
    calls.clear()
    w.sum().backward()
    plan = adjoint.plan(length)
    assert (calls.count(True), calls.count(False)) == (length - turn, plan.advances)


def test_a_plan_takes_a_carry_for_its_size() -> None:
    carry = {
        "w": torch.zeros(3, dtype=torch.float64),
        "n": torch.zeros(2, dtype=torch.int32),
        "k": 1,
    }
    assert Checkpointed().plan(10, carry).bytes == 10 * (24 + 8)
    assert str(Checkpointed(10).plan(100, 2_000_000)) == (
        "100 steps: 90 taken once more, at most 19 carries kept, 38.0 MB"
    )
