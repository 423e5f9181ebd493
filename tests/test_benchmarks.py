"""The benchmark's harness: what it computes and how it takes ratios."""

import sys
from pathlib import Path

import pytest
import torch


sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import meta_step, pairing, problems
from benchmarks.sides import floor, torchopt_now


def test_a_paired_ratio_does_not_see_the_machine_drift():
    speed = [1.0, 3.0, 2.0, 8.0, 5.0]
    ratio = pairing.paired_ratio([0.5 * s for s in speed], speed)
    assert ratio.median == pytest.approx(0.5)
    assert ratio.low == pytest.approx(0.5)
    assert ratio.high == pytest.approx(0.5)


def test_every_meta_step_starts_from_the_same_network():
    problem = problems.build("mlp", torch.float64, problems.COMPARED)
    step = torchopt_now.prepare(problem)
    first = [g.clone() for g in step()]
    second = step()
    assert meta_step.relative_difference(second, first) == 0
    assert all(torch.isfinite(g).all() for g in first)
    assert max(g.abs().max() for g in first) > 0


def test_the_measured_meta_gradient_is_a_derivative():
    smooth = problems.AdamNumbers(betas=(0.9, 0.99), eps=1e-2)
    problem = problems.build("mlp", torch.float64, smooth)
    for index, module in enumerate(problem.network):
        if isinstance(module, torch.nn.ReLU):  # its kinks would spoil central differences
            problem.network[index] = torch.nn.Tanh()
    weight = next(problem.network.parameters())
    gradient = torchopt_now.prepare(problem)()[0].clone()
    expected = gradient.norm()  # the slope in the direction of the gradient, the best to measure
    direction = gradient / expected

    def outer_loss(shift: float) -> torch.Tensor:
        import torchopt

        net, adam = problem.network, problem.adam
        total = torch.zeros((), dtype=torch.float64)
        original = weight.detach().clone()
        with torch.no_grad():
            weight.add_(shift * direction)
        for task in problem.tasks:
            tx = torchopt.adam(adam.lr, adam.betas, adam.eps)
            with torchopt.inner_loop(net, tx) as inner:
                for _ in range(problems.INNER_STEPS):
                    inner.step(problem.loss(net(task.support_x), task.support_y))
                total += problem.loss(net(task.query_x), task.query_y).detach()
        with torch.no_grad():
            weight.copy_(original)
        return total

    h = 1e-5
    measured = (outer_loss(h) - outer_loss(-h)) / (2 * h)
    assert measured.item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_floor_takes_another_update():
    problem = problems.build("mlp", torch.float64, problems.COMPARED)
    ours = [g.clone() for g in torchopt_now.prepare(problem)()]
    assert meta_step.relative_difference(floor.prepare(problem)(), ours) > 1e-3


def test_a_missing_peer_is_named(capsys):
    side = pairing.Side("ghost", "floor", Path("/nonexistent/python"))
    workers, absent = meta_step.start([side], threads=1)
    assert workers == {}
    assert "install_peers" in absent["ghost"]
