"""Graphs for the tests of torchopt.visual.show: a real loop, and drawn ones with known answers."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn

import torchopt
from torchopt.visual.graph import Graph, Node


def loop(
    steps: int = 3, cut_after: int | None = None, layers: int = 2
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Return the outer loss of MetaAdam with a learned learning rate, and names."""
    torch.manual_seed(0)
    sizes = [3, *[4] * (layers - 1), 2]
    pairs = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.Tanh())]
    net = nn.Sequential(*pairs[:-1])
    lr = torch.tensor(0.1, requires_grad=True)
    named = {**dict(net.named_parameters()), "lr": lr}
    x, y = torch.randn(5, 3), torch.randn(5, 2)
    inner = torchopt.MetaAdam(net, lr=lr)
    for step in range(steps):
        inner.step((net(x) - y).square().mean())
        if step == cut_after:
            torchopt.stop_gradient(net)
            torchopt.stop_gradient(inner)
    return (net(x) - y).square().mean(), named


def node(key: int, kind: str, label: str, lane: int = 0, **more: Any) -> Node:
    given = {
        "name": None,
        "shape": None,
        "dtype": "float32",
        "detail": "",
        "cuts": (),
        "members": 1,
    }
    return Node(key=key, kind=kind, label=label, lane=lane, **{**given, **more})


def diamond() -> Graph:
    """Return a graph whose paths can be read off: w -> a -> {b, c} -> loss, and v -> c only.

    ``v`` is where a path is cut.
    """
    nodes = [
        node(0, "leaf", "w", name="w", shape=(2, 3)),
        node(1, "leaf", "v", name="v", shape=(), cuts=("detached on purpose",)),
        node(2, "operation", "A", shape=(2,), detail="about A"),
        node(3, "operation", "B"),
        node(4, "operation", "C"),
        node(5, "result", "loss", shape=()),
    ]
    return Graph(nodes, [(0, 2), (1, 4), (2, 3), (2, 4), (3, 5), (4, 5)])


def unrolled(steps: int, layers: int) -> Graph:
    """Return a graph like that of an unrolled loop: forward, gradient and step in each lane."""
    nodes: list[Node] = []
    edges: set[tuple[int, int]] = set()

    def add(kind: str, label: str, inputs: list[int], lane: int, **more: Any) -> int:
        nodes.append(node(len(nodes), kind, label, lane, **more))
        edges.update((source, len(nodes) - 1) for source in inputs)
        return len(nodes) - 1

    rate = add("leaf", "lr", [], 0, name="lr", shape=())
    names = [f"layers.{k}.weight" for k in range(layers)]
    weights = [add("leaf", name, [], 0, name=name, shape=(8, 8)) for name in names]
    for lane in range(steps + 1):
        values: list[int] = []
        for weight in weights:
            values.append(add("operation", "Addmm", [*values[-1:], weight], lane, shape=(5, 8)))
        if lane == steps:
            add("result", "loss", values[-1:], lane, shape=())
            break
        gradients, back = [], values[-1]
        for value, weight in zip(reversed(values), reversed(weights)):
            back = add("operation", "TanhBackward", [back, value], lane)
            gradients.append(add("operation", "Mm", [back, value], lane))
            back = add("operation", "T", [back, weight], lane)
        step = add(
            "step", f"Adam step {lane + 1}", [*gradients, rate, *set(weights)], lane, members=9
        )
        weights = [step] * layers
    return Graph(nodes, sorted(edges))


def on_paths(graph: Graph, start: int) -> list[int]:
    """Return the nodes between a node and the results, by following single edges."""
    after = {start}
    for source, user in sorted(graph.edges):  # inputs come before what uses them
        if source in after:
            after.add(user)
    before = {n.key for n in graph.nodes if n.kind == "result"}
    for source, user in sorted(graph.edges, key=lambda edge: -edge[1]):
        if user in before:
            before.add(source)
    return sorted(after & before)
