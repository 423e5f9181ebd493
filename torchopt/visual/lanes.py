"""In which lane of a picture each node is drawn: one for each optimizer step, and one after."""

from __future__ import annotations

from torchopt.visual.graph import Graph


def homes(graph: Graph) -> list[int]:
    """Return for each node the number of its lane.

    Before a step, how many steps lie before a node says nothing about when it was computed: it may
    enter late, as what follows a cut does. It is drawn in the lane of its first use.
    """
    nodes, keys = graph.nodes, range(len(graph.nodes))
    inputs, outputs = neighbours(graph)
    last = max((node.lane for node in nodes), default=0)
    steps = [int(node.kind == "step") for node in nodes]

    latest = [0] * len(nodes)
    for key in reversed(keys):  # nodes are in an order of computation
        latest[key] = max(0, min([last, *(latest[to] for to in outputs[key])]) - steps[key])
    home = [node.lane for node in nodes]
    for key in keys:
        if not nodes[key].lane and steps[key] and nodes[key].cuts:
            home[key] = latest[key]
        before = [source for source in inputs[key] if nodes[source].lane or steps[source]]
        home[key] = max([home[key], *(home[source] + steps[source] for source in before)])
    for key in reversed(keys):
        if not nodes[key].lane and not steps[key] and outputs[key]:
            home[key] = min([last, *(home[to] for to in outputs[key])])
    return home


def neighbours(graph: Graph) -> tuple[list[list[int]], list[list[int]]]:
    """Return for each node what it was computed from, and what was computed from it."""
    inputs: list[list[int]] = [[] for _ in graph.nodes]
    outputs: list[list[int]] = [[] for _ in graph.nodes]
    for source, user in graph.edges:
        inputs[user].append(source)
        outputs[source].append(user)
    return inputs, outputs
