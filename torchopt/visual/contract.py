"""Smaller pictures: many nodes drawn as one."""

from __future__ import annotations

import collections
import dataclasses
import heapq
import re
from collections.abc import Mapping, Sequence

from torchopt.visual.graph import ENTERS_AS_LEAF, Graph, Node
from torchopt.visual.lanes import homes, neighbours
from torchopt.visual.words import counted


@dataclasses.dataclass(frozen=True)
class Contracted:
    """A graph some of whose nodes stand for several.

    Attributes:
        graph: The graph.
        node_of: For each node of the graph that it was made of, the node that stands for it.
        kept: For each node, the one that it was, or ``None`` if it stands for several.
    """

    graph: Graph
    node_of: list[int]
    kept: list[int | None]


def contract(
    graph: Graph, groups: Mapping[int, Sequence[int]], nodes: Mapping[int, Node]
) -> Contracted:
    """Return a graph in which one node stands for each group.

    Args:
        graph: The graph.
        groups: Lists of nodes; each list by its first node. No path may leave a group and enter
            it again.
        nodes: What stands for each group, by the same keys; their ``key`` is set here.
    """
    stands = list(range(len(graph.nodes)))
    if not groups:
        return Contracted(graph, stands, [*stands])
    for first, members in groups.items():
        for member in members:
            stands[member] = first
    edges = {(stands[a], stands[b]) for a, b in graph.edges if stands[a] != stands[b]}
    order = _order(sorted(set(stands)), edges)
    place = {first: key for key, first in enumerate(order)}
    made = [
        dataclasses.replace(nodes.get(first, graph.nodes[first]), key=key)
        for key, first in enumerate(order)
    ]
    kept = [None if first in groups else first for first in order]
    smaller = Graph(made, sorted((place[a], place[b]) for a, b in edges))
    return Contracted(smaller, [place[first] for first in stands], kept)


def _order(keys: Sequence[int], edges: set[tuple[int, int]]) -> list[int]:
    """Return nodes in an order of computation, as near to their own order as can be."""
    users: dict[int, list[int]] = {key: [] for key in keys}
    missing = dict.fromkeys(keys, 0)
    for source, user in edges:
        users[source].append(user)
        missing[user] += 1
    ready = [key for key in keys if not missing[key]]
    order = []
    while ready:
        order.append(heapq.heappop(ready))
        for user in users[order[-1]]:
            missing[user] -= 1
            if not missing[user]:
                heapq.heappush(ready, user)
    return order


# Weights that were cut off ------------------------------------------------------------------------


def with_cut_leaves_grouped(graph: Graph) -> Contracted:
    """Draw leaves without a name that were cut off in the same place as one.

    They are the weights of a network after ``stop_gradient``, say: "4 weights, step 62".
    """
    _, outputs = neighbours(graph)
    found: dict[tuple[tuple[str, ...], str, str], list[int]] = collections.defaultdict(list)
    for node in graph.nodes:
        if node.kind == "leaf" and node.cuts and node.name is None:
            enters = any(cut.startswith(ENTERS_AS_LEAF) for cut in node.cuts)
            word = "weight" if enters else "tensor"
            found[node.cuts, word, _first_step(graph, outputs, node.key)].append(node.key)
    groups, nodes = {}, {}
    for (_, word, where), members in found.items():
        groups[members[0]] = members
        nodes[members[0]] = _cut_leaves(graph, members, word, where)
    return contract(graph, groups, nodes)


def _cut_leaves(graph: Graph, members: Sequence[int], word: str, where: str) -> Node:
    first = graph.nodes[members[0]]
    label = f"{counted(len(members), word)}, {where}"
    if len(members) == 1:
        return dataclasses.replace(first, label=f"{word}, {where}")
    details = [graph.nodes[key].detail for key in members]
    shown = [*details[:12], *([f"and {len(details) - 12} more"] if len(details) > 12 else [])]
    dtypes = {graph.nodes[key].dtype for key in members}
    return dataclasses.replace(
        first,
        label=label,
        shape=None,
        dtype=first.dtype if len(dtypes) == 1 else None,
        detail="\n".join(shown),
        members=sum(graph.nodes[key].members for key in members),
    )


def _first_step(graph: Graph, outputs: list[list[int]], start: int) -> str:
    """Return where a leaf is used first: ``"step 62"`` or ``"the loss"``."""
    seen, open_ = {start}, [start]
    while open_:  # nodes are in an order of computation, so the first step comes out first
        key = heapq.heappop(open_)
        if graph.nodes[key].kind == "step":
            found = re.search(r"step \d+$", graph.nodes[key].label)
            return found[0] if found else graph.nodes[key].label
        for user in outputs[key]:
            if user not in seen:
                seen.add(user)
                heapq.heappush(open_, user)
    return "the loss"


# Steps in short -----------------------------------------------------------------------------------


def with_late_steps_collapsed(graph: Graph, expanded: int) -> Contracted:
    """Draw what leads to later optimizer steps as one node for each step, but for what has a name.

    Args:
        graph: The graph.
        expanded: How many steps, from the first, are drawn operation by operation. What follows
            the last step is always drawn so.
    """
    home, (inputs, _) = homes(graph), neighbours(graph)
    last = max((node.lane for node in graph.nodes), default=0)
    # operations before and after a named value of a lane are not the same node, or it would lie in
    # a circle
    named = [0] * len(graph.nodes)
    groups: dict[tuple[int, int], list[int]] = collections.defaultdict(list)
    for node in graph.nodes:
        own = [source for source in inputs[node.key] if home[source] == home[node.key]]
        named[node.key] = max([0, *(named[s] + _parts(graph.nodes[s]) for s in own)])
        if node.kind == "operation" and expanded <= home[node.key] < last:
            groups[home[node.key], named[node.key]].append(node.key)
    folded = {members[0]: members for members in groups.values() if len(members) > 2}
    return contract(graph, folded, {k: _folded(graph, keys, home[k]) for k, keys in folded.items()})


def _parts(node: Node) -> int:
    return int(node.kind not in ("operation", "leaf"))


def _folded(graph: Graph, members: Sequence[int], home: int) -> Node:
    nodes = [graph.nodes[key] for key in members]
    labels = collections.Counter(node.label for node in nodes)
    detail = ", ".join(f"{n} {label}" for label, n in labels.most_common(12))
    cuts = tuple(dict.fromkeys(cut for node in nodes for cut in node.cuts))
    total = sum(node.members for node in nodes)
    label = f"{counted(total, 'operation')}\n(forward and gradient)"
    return Node(members[0], "operation", label, None, None, None, home, detail, cuts, total)
