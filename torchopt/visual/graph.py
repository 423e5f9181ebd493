"""The graph behind a loss as data: named tensors, operations, and optimizer steps as one node."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from torchopt.visual.aliases import Alias, Output, detached_aliases
from torchopt.visual.entering import entering_leaves
from torchopt.visual.names import named_tensors
from torchopt.visual.operations import attributes, dtype_name, operation_label, output_metadata
from torchopt.visual.walk import (
    Step,
    Walk,
    root_of,
    unpacked_from,
    walk,
)


#: What is said of a step whose gradient carries no graph.
FIRST_ORDER = (
    "its gradient is a constant: create_graph=False (first-order), or an inner loss that is linear "
    "in the weights"
)
#: How what is said of a weight begins that entered a later step as a leaf.
ENTERS_AS_LEAF = "detached before step"


@dataclasses.dataclass(frozen=True)
class Node:
    """One node.

    Attributes:
        key: Its position in :attr:`Graph.nodes`.
        kind: ``"operation"``; ``"step"``, an optimizer step, however it was computed; ``"leaf"``, a
            tensor that was not computed, such as a parameter; ``"value"``, a named tensor that was,
            such as a fast weight; ``"result"``, the tensor that was asked about.
        label: What to write into it.
        name: The names given to the tensor, joined by line breaks; ``None`` if it has none.
        shape: The shape of the tensor, or of the only result of the operation.
        dtype: Its dtype, such as ``"float32"``.
        lane: How many optimizer steps lie before it on the longest path.
        detail: More about it, for hovering.
        cuts: Where the graph ends here though one might expect more, in words.
        members: How many autograd nodes it stands for.
    """

    key: int
    kind: str
    label: str
    name: str | None
    shape: tuple[int, ...] | None
    dtype: str | None
    lane: int
    detail: str
    cuts: tuple[str, ...]
    members: int


@dataclasses.dataclass(frozen=True)
class Graph:
    """Nodes in an order of computation, and edges from inputs to outputs."""

    nodes: list[Node]
    edges: list[tuple[int, int]]

    def to_json(self) -> dict[str, Any]:
        """Return plain dicts and lists."""
        return {
            "nodes": [dict(vars(node)) for node in self.nodes],
            "edges": [list(edge) for edge in self.edges],
        }


@dataclasses.dataclass
class Unit:
    """What becomes one node, and the autograd nodes it stands for."""

    kind: str
    members: list[int]
    step: Step | None = None
    output: tuple[int, int] | None = None  # a value: autograd node and output number
    tensor: Tensor | None = None
    names: list[str] = dataclasses.field(default_factory=list)
    title: str = "result"  # what a result is called that has no name
    packed: bool = False  # it is the slots of all parameters in one flat tensor
    cuts: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Extraction:
    """A :class:`Graph` with the autograd nodes behind its nodes.

    Attributes:
        graph: The graph.
        walk: The autograd nodes.
        units: What each node of ``graph`` stands for.
        node_of: For each autograd node, the node of ``graph`` that it is in.
        aliases: Tensors whose values enter the graph a second time, without their history.
    """

    graph: Graph
    walk: Walk
    units: list[Unit]
    node_of: list[int]
    aliases: list[Alias]


def build(var: Tensor | Sequence[Tensor], params: Any = None) -> Graph:
    """Return the graph that leads to a tensor, or to several.

    Args:
        var: What was computed, such as a loss.
        params: Names of tensors; see :func:`torchopt.visual.make_dot`.

    Raises:
        TypeError: If ``var`` or ``params`` is of another kind.
        ValueError: If ``var`` has no graph.
    """
    return extract(var, params).graph


def extract(var: Tensor | Sequence[Tensor], params: Any = None) -> Extraction:
    """Return what :func:`build` does with the autograd nodes behind it."""
    results = _results(var)
    named = named_tensors(params)
    roots = [root_of(tensor) for tensor in results]
    found = walk(node for node, _ in roots)  # pyright: ignore[reportGeneralTypeIssues, reportOptionalIterable]
    units, node_of = _units(found)
    used = {  # outside of the step that made it
        (source, number)
        for position, sources in enumerate(found.inputs)
        for source, number in sources
        if source is not None and node_of[source] != node_of[position]
    }
    used |= {(found.index[root[0]], root[1]) for root in roots if root is not None}
    values = _attach_names(found, units, used, named)
    for tensor, root in zip(results, roots):
        assert root is not None
        output = (found.index[root[0]], root[1])
        names = [name for name, other in named if other is tensor]
        value = values.get(output)
        if value is not None and tensor.grad_fn is not None:  # it is drawn as the result
            names = list(units[value].names)
            units[value].names = []
        units.append(Unit("result", [], output=output, tensor=tensor, names=names))
        if len(results) == 1 and tensor.numel() == 1:
            units[-1].title = "the loss"
    edges = _edges(found, units, node_of, values)
    order, lanes = _order(units, edges)
    place = {unit: key for key, unit in enumerate(order)}
    aliases = detached_aliases(found, [*results, *(tensor for _, tensor in named)])
    _note_cuts(found, units, node_of)
    _note_aliases(found, units, node_of, aliases)
    kept = [units[unit] for unit in order]
    nodes = [_node(key, unit, lanes[order[key]], found) for key, unit in enumerate(kept)]
    graph = Graph(nodes, sorted((place[a], place[b]) for a, b in edges))
    return Extraction(graph, found, kept, [place[unit] for unit in node_of], aliases)


def _results(var: Any) -> list[Tensor]:
    results = [var] if isinstance(var, Tensor) else var
    if not isinstance(results, (list, tuple)) or not all(isinstance(x, Tensor) for x in results):
        raise TypeError(f"var must be a tensor or a list of tensors, got {type(var).__name__}.")
    if not results:
        raise ValueError("var is an empty list; give the tensor whose graph you want to see.")
    for tensor in results:
        if not tensor.requires_grad:
            raise ValueError(
                f"The tensor of shape {tuple(tensor.shape)} and dtype {dtype_name(tensor)} has no "
                "graph: it was computed under torch.no_grad(), detached, is of an integer type, or "
                "nothing that it was computed from requires grad."
            )
    return list(results)


def _units(found: Walk) -> tuple[list[Unit], list[int]]:
    units: list[Unit] = [Unit("step", step.members, step) for step in found.steps]
    node_of = list(found.step_of)
    for position, node in enumerate(found.nodes):
        if node_of[position] >= 0:
            continue
        node_of[position] = len(units)
        variable = getattr(node, "variable", None) if not found.inputs[position] else None
        kind = "operation" if variable is None else "leaf"
        units.append(Unit(kind, [position], tensor=variable))
    return units, node_of


def _attach_names(
    found: Walk,
    units: list[Unit],
    used: set[tuple[Any, int]],
    named: list[tuple[str, Tensor]],
) -> dict[tuple[int, int], int]:
    """Give leaves their names, and make a unit of each named tensor that was computed."""
    leaves = {id(unit.tensor): unit for unit in units if unit.kind == "leaf"}
    values: dict[tuple[int, int], int] = {}
    for name, tensor in named:
        leaf = leaves.get(id(tensor))
        if leaf is not None:
            unit = leaf
        else:
            output = output_of(found, tensor)
            if output is None or output not in used:
                continue
            if output not in values:
                values[output] = len(units)
                units.append(Unit("value", [], output=output, tensor=tensor))
                node = found.index.get(tensor.grad_fn)
                units[-1].packed = output != (node, tensor.output_nr)
            unit = units[values[output]]
        if name not in unit.names:
            unit.names.append(name)
    return values


def output_of(found: Walk, tensor: Tensor) -> tuple[int, int] | None:
    """Return the autograd node and output number that a computed tensor is in the graph.

    A slot that was taken out of packed slots is the flat tensor that goes on to the next step.
    """
    if tensor.grad_fn is None:
        return None
    node: Any = tensor.grad_fn
    number = tensor.output_nr
    for _ in range(3):  # clone of view of split
        if node in found.index and unpacked_from(found, found.index[node]) is None:
            return found.index[node], number
        following = node.next_functions
        unpacks = node.name().startswith(("Clone", "View", "Split", "_Unpack"))
        if not unpacks or len(following) != 1 or following[0][0] is None:
            return None
        is_split = node.name().startswith(("Split", "_Unpack"))
        node, number = following[0]
        if is_split:
            there = node in found.index and found.step_of[found.index[node]] >= 0
            return (found.index[node], number) if there else None
    return None


def _edges(
    found: Walk, units: list[Unit], node_of: list[int], values: dict[tuple[int, int], int]
) -> set[tuple[int, int]]:
    edges = set()
    for position, sources in enumerate(found.inputs):
        user = node_of[position]
        for source, number in sources:
            if source is None or node_of[source] == user:
                continue
            edges.add((values.get((source, number), node_of[source]), user))
    for key, unit in enumerate(units):
        if unit.output is not None:
            source = node_of[unit.output[0]]
            named = values.get(unit.output, source)
            edges.add((source if named == key or not units[named].names else named, key))
    unused = {v for v in values.values() if not units[v].names}
    return {
        (node_of[units[a].output[0]] if a in unused else a, b)  # pyright: ignore[reportOptionalSubscript]
        for a, b in edges
        if b not in unused
    }


def _order(units: list[Unit], edges: Iterable[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Return the units in an order of computation, and for each how many steps lie before it."""
    users: list[list[int]] = [[] for _ in units]
    missing = [0] * len(units)
    for source, user in sorted(edges):
        users[source].append(user)
        missing[user] += 1
    lanes = [0] * len(units)
    ready = [
        key
        for key, unit in enumerate(units)
        if not missing[key] and (unit.kind != "value" or users[key])
    ]
    order = []
    for source in ready:  # grows while it is read
        order.append(source)
        after = lanes[source] + (units[source].kind == "step")
        for user in users[source]:
            lanes[user] = max(lanes[user], after)
            missing[user] -= 1
            if not missing[user]:
                ready.append(user)
    return order, lanes


def _note_cuts(found: Walk, units: list[Unit], node_of: list[int]) -> None:
    """Write to units where the graph ends, as far as it tells."""
    for unit in units:
        step = unit.step
        if step is None:
            continue
        if step.first_order:
            unit.cuts.append(FIRST_ORDER)
        if step.count is None or step.count == 1:
            continue
        if step.is_cut:
            unit.cuts.append(
                f"its weights do not come from step {step.count - 1}: they entered as leaves "
                "(stop_gradient, detach, torch.no_grad() or recover_state_dict)"
            )
            for leaf in entering_leaves(found, step):
                units[node_of[leaf]].cuts.append(
                    f"{ENTERS_AS_LEAF} {step.count}: nothing earlier is reached from here"
                )
        for slot in step.constant_slots:
            unit.cuts.append(f"its state {slot} carries no graph (stop_gradient or detach)")


def _note_aliases(
    found: Walk, units: list[Unit], node_of: list[int], aliases: Sequence[Alias]
) -> None:
    """Write to operations and leaves whose values they take without the history."""
    names = {unit.output: unit.names[0] for unit in units if unit.names and unit.output}
    names |= {(u.members[0], 0): u.names[0] for u in units if u.names and u.kind == "leaf"}

    def name_of(source: Output) -> str:
        if source in names:
            return repr(names[source])
        unit = units[node_of[source[0]]]
        label = unit.step.label if unit.step else operation_label(found.nodes[source[0]].name())
        return "another leaf" if unit.kind == "leaf" else f"what {label} made"

    for alias in aliases:
        unit = units[node_of[alias.position]]
        how = "detach().requires_grad_(), nn.Parameter(x)" if alias.is_leaf else ".detach(), .data"
        takes = "it has" if alias.is_leaf else "it takes"
        cut = f"{takes} the values of {name_of(alias.source)} without their graph ({how})"
        if cut not in unit.cuts:
            unit.cuts.append(cut)


def _node(key: int, unit: Unit, lane: int, found: Walk) -> Node:
    name = "\n".join(unit.names) or None
    shape, dtype = None, None
    if unit.packed:
        assert unit.output is not None
        shape, dtype = output_metadata(found.nodes[unit.output[0]])[unit.output[1]]
        label = name or ""
        detail = f"slots of all parameters, packed in one tensor\n{shape} {dtype}"
    elif unit.tensor is not None:
        shape, dtype = tuple(unit.tensor.shape), dtype_name(unit.tensor)
        label = name or (unit.title if unit.kind == "result" else str(shape))
        detail = f"{type(unit.tensor).__name__} {shape} {dtype}"
    elif unit.step is not None:
        label, detail = unit.step.label, _step_detail(unit)
    else:
        node = found.nodes[unit.members[0]]
        label = operation_label(node.name())
        outputs = output_metadata(node)
        if len(outputs) == 1:
            shape, dtype = outputs[0]
        detail = _operation_detail(node, outputs)
    count = max(1, len(unit.members))
    return Node(key, unit.kind, label, name, shape, dtype, lane, detail, tuple(unit.cuts), count)


def _step_detail(unit: Unit) -> str:
    assert unit.step is not None
    how = "operations of the rules"
    if unit.step.fused:
        how = "partly fused" if unit.step.recorded else "fused"
    nodes = f"{len(unit.members)} autograd node{'s' * (len(unit.members) > 1)}"
    return f"{' -> '.join(unit.step.parts)}\n{nodes}, {how}"


def _operation_detail(node: Any, outputs: list[tuple[tuple[int, ...], str]]) -> str:
    lines = [node.name()]
    lines += [f"-> {shape} {dtype}" for shape, dtype in outputs]
    lines += [f"{name} = {value}" for name, value in attributes(node).items()]
    return "\n".join(lines)
