"""What the benchmarks measure: that all sides which can run here do the same work."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fusing import needs_library


sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import (
    adam_step,
    memory,
    meta_step,
    networks,
    own_rule,
    update_alone,
    vmap_step,
)
from benchmarks.runner import relative_difference
from benchmarks.sides import floor, plain_copy, torch_fused, torchopt_now, torchopt_unfused
from benchmarks.sides.kept_bytes import kept_bytes
from benchmarks.sides.torch_problem import in_torch


COMPARED = {"network": "tiny", "tasks": 3, "dtype": "float64", "adam": "compared"}


def arrays(tensors):
    return [t.detach().numpy().copy() for t in tensors]


def difference(own, other):
    return relative_difference(arrays(own), arrays(other))


def test_every_meta_step_starts_from_the_same_network():
    step = torchopt_now.meta_step(meta_step.problem(**COMPARED))
    first = [g.clone() for g in step()]
    assert difference(step(), first) == 0
    assert all(torch.isfinite(g).all() for g in first)
    assert max(g.abs().max() for g in first) > 0


def test_the_measured_meta_gradient_is_a_derivative():
    import torchopt

    problem = meta_step.problem("smooth", tasks=2, dtype="float64", adam="smooth")
    gradient = torchopt_now.meta_step(problem)()[0].numpy()
    expected = np.linalg.norm(gradient)  # the slope along the gradient, the best to measure

    def outer_loss(shift):
        weights = [problem.weights[0] + shift * gradient / expected, *problem.weights[1:]]
        built = in_torch(dataclasses.replace(problem, weights=weights))
        net, loss, total = built.network, built.loss, 0.0
        for task in built.tasks:
            tx = torchopt.adam(built.adam.lr, built.adam.betas, built.adam.eps)
            with torchopt.inner_loop(net, tx) as inner:
                for _ in range(built.steps):
                    inner.step(loss(net(task.support_x), task.support_y))
                total += loss(net(task.query_x), task.query_y).item()
        return total

    h = 1e-5
    measured = (outer_loss(h) - outer_loss(-h)) / (2 * h)
    assert measured == pytest.approx(expected, rel=1e-6)


def test_the_floor_takes_another_update():
    problem = meta_step.problem(**COMPARED)
    assert difference(floor.meta_step(problem)(), torchopt_now.meta_step(problem)()) > 1e-3


def test_the_batch_of_tasks_has_the_meta_gradient_of_the_loop():
    batched = torchopt_now.vmap_step(vmap_step.problem(**COMPARED))()
    looped = torchopt_now.meta_step(meta_step.problem(**COMPARED))()
    assert difference(batched, looped) < 1e-12


@pytest.mark.parametrize("workload", ["meta_step", "vmap_step"])
def test_kernels_do_not_change_the_meta_gradient(workload):
    problem = meta_step.problem(**COMPARED)
    fused, plain = (getattr(side, workload)(problem) for side in (torchopt_now, torchopt_unfused))
    assert difference(fused(), plain()) < 1e-12


@needs_library
@pytest.mark.parametrize("in_place", [True, False])
def test_an_own_rule_is_fused_and_gives_what_it_gives_unfused(in_place: bool) -> None:
    problem = own_rule.problem(in_place, tensors=2, shape=(2, 3), dtype="float64")
    fused, unfused = torchopt_now.own_rule(problem, True), torchopt_unfused.own_rule(problem)
    for _ in range(3):
        found, expected = fused(), unfused()
    assert len(found) == (2 if in_place else 8)
    assert difference(found, expected) < 1e-12


def test_the_update_alone_is_differentiated_in_all_its_inputs():
    problem = update_alone.problem(tensors=2, entries=5, dtype="float64")
    fused = torchopt_now.update_alone(problem)()
    assert len(fused) == 4 * 2
    assert all(g.abs().sum() > 0 for g in fused)
    assert difference(fused, torchopt_unfused.update_alone(problem)()) < 1e-12


def test_steps_of_adam_agree():
    problem = adam_step.problem(tensors=3, shape=(2, 4), dtype="float64")
    ours, theirs = torchopt_now.adam_step(problem), torch_fused.adam_step(problem)
    for _ in range(3):
        own, other = ours(), theirs()
    assert difference(own, other) < 1e-12
    assert difference(own, [torch.from_numpy(p) for p in problem.params]) > 1e-6


def test_the_copy_copies():
    problem = adam_step.problem(tensors=2, shape=(3,))
    copied = plain_copy.adam_step(problem)()
    assert all((c.numpy() == g).all() for c, g in zip(copied, problem.grads))


def test_kept_bytes_are_those_beyond_inputs_and_outputs():
    x, y = (torch.rand(1000, requires_grad=True) for _ in range(2))
    nothing = kept_bytes([x, y], lambda: [x.exp(), x * y])
    one_tensor = kept_bytes([x, y], lambda: [(x + y).sin()])
    assert nothing == {"saved": [0], "allocated": [0]}
    assert one_tensor == {"saved": [4000], "allocated": [4000]}


def test_the_unfused_update_keeps_intermediate_tensors():
    problem = memory.problem("tiny")
    kept = torchopt_unfused.memory(problem)()
    assert kept["saved"][0] > 0
    assert kept["allocated"][0] >= kept["saved"][0]


def test_both_precisions_start_from_the_same_numbers():
    single, double = (meta_step.problem("tiny", dtype=d) for d in ("float32", "float64"))
    for a, b in zip(single.weights, double.weights):
        assert (a == b.astype("float32")).all()
    assert (single.support_x == double.support_x.astype("float32")).all()


@pytest.mark.parametrize("name", list(networks.NETWORKS))
def test_networks_of_arrays_and_of_torch_have_the_same_parameters(name):
    problem = meta_step.problem(name, tasks=1)
    built = in_torch(problem)
    for param, weight in zip(built.network.parameters(), problem.weights, strict=True):
        assert (param.detach().numpy() == weight).all()
    assert built.network(built.tasks[0].support_x).shape == (networks.SUPPORT, networks.CLASSES)
