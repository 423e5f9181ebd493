"""Pictures in short: late steps as one node, weights that were cut off as one; nothing is lost."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from conftest import nonzero
from fusing import needs_library
from torch import nn
from visual_graphs import loop, node, unrolled

import torchopt
from torchopt.visual import make_dot
from torchopt.visual.contract import (
    contract,
    with_cut_leaves_grouped,
    with_late_steps_collapsed,
)
from torchopt.visual.graph import Graph, build
from torchopt.visual.lanes import homes


FOLDED = "operations\n(forward and gradient)"


def folded_of(graph: Graph) -> list[Any]:
    return [n for n in graph.nodes if FOLDED in n.label]


def is_in_order(graph: Graph) -> bool:
    """Whether each node stands after what it was computed from, so that there is no circle."""
    keys = [n.key for n in graph.nodes] == list(range(len(graph.nodes)))
    return keys and all(source < user for source, user in graph.edges)


def reaches(graph: Graph) -> list[set[int]]:
    found: list[set[int]] = [{n.key} for n in graph.nodes]
    for source, user in sorted(graph.edges, key=lambda edge: edge[1]):
        found[user] |= found[source]
    return found


@pytest.mark.parametrize("expanded", range(7))
def test_late_steps_are_one_node_each(expanded: int) -> None:
    graph = build(*loop(steps=5, layers=3))
    made = with_late_steps_collapsed(graph, expanded)
    assert is_in_order(made.graph)
    folded = folded_of(made.graph)
    assert [n.lane for n in folded] == list(range(expanded, 5))
    home = homes(graph)
    for n in graph.nodes:
        whole = made.kept[made.node_of[n.key]] == n.key
        assert whole == (n.kind != "operation" or home[n.key] < expanded or home[n.key] == 5)
    for n in folded:  # it stands for all operations of its step
        operations = [m for m in graph.nodes if m.kind == "operation" and home[m.key] == n.lane]
        assert n.members == sum(m.members for m in operations)
        assert n.label.startswith(f"{n.members} ")
    # a path between two nodes is one between those that stand for them
    before, after = reaches(graph), reaches(made.graph)
    for n in graph.nodes:
        assert {made.node_of[k] for k in before[n.key]} <= after[made.node_of[n.key]]


def test_a_named_value_in_a_late_step_makes_no_circle() -> None:
    net, named = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), {}
    x = nonzero(5, 3).float()
    inner = torchopt.MetaSGD(net, lr=0.1)
    for step in range(4):
        inner_loss = net(x).square().mean()
        named[f"inner loss {step}"] = inner_loss
        inner.step(inner_loss)
    # a value that the gradient is taken through: a penalty makes the inner loss an input again
    graph = build(net(x).square().mean() + named["inner loss 3"], named)
    made = with_late_steps_collapsed(graph, 0)
    assert is_in_order(made.graph)
    names = {n.name for n in made.graph.nodes if n.kind == "value"}
    assert names == {n.name for n in graph.nodes if n.kind == "value"} != set()


def test_operations_before_and_after_a_value_are_two_nodes() -> None:
    chain = [node(0, "leaf", "w")]
    kinds = ["operation"] * 3 + ["value"] + ["operation"] * 3
    chain += [node(k, kind, f"n{k}") for k, kind in enumerate(kinds, 1)]
    chain += [node(8, "step", "SGD step 1"), node(9, "result", "the loss", 1)]
    edges = [(k, k + 1) for k in range(9)]
    made = with_late_steps_collapsed(Graph(chain, edges), 0)
    assert is_in_order(made.graph)
    labels = [n.label for n in made.graph.nodes]
    folded = f"3 {FOLDED}"
    assert labels == ["w", folded, "n4", folded, "SGD step 1", "the loss"]
    assert made.graph.edges == [(k, k + 1) for k in range(5)]


def test_cuts_of_folded_operations_are_kept() -> None:
    chain = [node(0, "leaf", "w")]
    chain += [node(k, "operation", f"n{k}", cuts=("cut here",) * (k == 2)) for k in (1, 2, 3)]
    chain += [node(4, "step", "SGD step 1"), node(5, "result", "the loss", 1)]
    made = with_late_steps_collapsed(Graph(chain, [(k, k + 1) for k in range(5)]), 0)
    assert folded_of(made.graph)[0].cuts == ("cut here",)


def test_weights_that_were_cut_off_are_one_node() -> None:
    graph = build(*loop(steps=5, cut_after=2))
    cut = [n for n in graph.nodes if n.kind == "leaf" and n.cuts]
    assert len(cut) == 4
    made = with_cut_leaves_grouped(graph)
    assert is_in_order(made.graph)
    (group,) = [n for n in made.graph.nodes if n.kind == "leaf" and n.cuts]
    assert (group.label, group.members) == ("4 weights, step 4", 4)
    assert sorted(group.detail.splitlines()) == sorted(n.detail for n in cut)
    assert len(made.graph.nodes) == len(graph.nodes) - 3


@needs_library
def test_cut_weights_of_several_steps_and_with_names_stay_apart() -> None:
    net, names = nn.Linear(3, 2), {}
    x = nonzero(5, 3).float()
    lr = torch.tensor(0.1, requires_grad=True)
    inner = torchopt.MetaAdam(net, lr=lr)
    for step in range(4):
        inner.step(net(x).square().mean())
        if step in (1, 2):
            torchopt.stop_gradient(net)
        if step == 2:
            names = {f"after.{name}": weight for name, weight in net.named_parameters()}
    graph = with_cut_leaves_grouped(build(net(x).square().mean(), names)).graph
    labels = [n.label for n in graph.nodes if n.kind == "leaf" and n.cuts]
    assert sorted(labels) == ["2 weights, step 3", "after.bias", "after.weight"]


def test_groups_of_nothing_change_nothing() -> None:
    graph = unrolled(steps=3, layers=2)
    for made in (contract(graph, {}, {}), with_cut_leaves_grouped(graph)):
        assert made.graph == graph
        assert made.node_of == made.kept == [n.key for n in graph.nodes]


# In make_dot --------------------------------------------------------------------------------------


def test_make_dot_draws_two_steps_in_full_unless_told_otherwise() -> None:
    pytest.importorskip("graphviz")
    loss, named = loop(steps=5, layers=3)
    count = lambda **options: make_dot(loss, named, **options).source.count("(forward and")  # noqa: E731
    assert count() == 3
    assert [count(expanded_steps=k) for k in (0, 1, 4, 5, 9)] == [5, 4, 1, 0, 0]
    assert count(expanded_steps=None) == 0
    two = loop(steps=2)
    assert make_dot(*two).source == make_dot(*two, expanded_steps=None).source
    with pytest.raises(ValueError, match="at least 0, or None, got -1"):
        make_dot(loss, expanded_steps=-1)


def test_saved_tensors_and_attributes_are_those_of_what_is_drawn() -> None:
    pytest.importorskip("graphviz")
    loss, named = loop(steps=4)
    sizes = [
        make_dot(loss, named, show_saved=True, show_attrs=True, expanded_steps=k).source.count(word)
        for k in (None, 1)
        for word in ("khaki", "dim:")
    ]
    assert sizes[0] > sizes[2] > 0
    assert sizes[1] > sizes[3]


@pytest.mark.skipif(shutil.which("dot") is None, reason="the program dot is missing")
def test_a_long_loop_makes_a_picture_that_is_not_much_longer() -> None:
    pytest.importorskip("graphviz")

    def height(steps: int, **options: Any) -> float:
        dot = make_dot(*loop(steps=steps, layers=3), **options)
        box = dot.pipe(format="dot", encoding="utf-8").partition('bb="')[2].partition('"')[0]
        return float(box.split(",")[3])

    full, short, shortest = height(5, expanded_steps=None), height(5), height(5, expanded_steps=0)
    assert short < 0.6 * full
    assert shortest < 0.3 * full
    assert height(6) - short < 0.1 * (full - short)
