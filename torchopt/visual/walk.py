"""The autograd graph behind tensors, and which of its nodes make up an optimizer step."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from torchopt.core import step_tags
from torchopt.core.step_tags import StepTag
from torchopt.kernels.differentiable import Group
from torchopt.kernels.generate.learned import is_hyper
from torchopt.kernels.generate.program import GRADIENT, PARAMETER
from torchopt.kernels.independent import is_name
from torchopt.visual.titles import optimizer_name


#: What takes slots of several parameters out of the flat tensor they travel in.
_UNPACKING = ("SplitWithSizesBackward", "SplitBackward", "_UnpackBackward")
_UNPACKING += ("ViewBackward", "CloneBackward")
#: How many nodes in a row may be freed by recursion.
_DEEP = 1_000


@dataclass
class Step:
    """One optimizer step found in the graph.

    Attributes:
        parts: Names of the classes of its transformations.
        count: The optimizer's step count, 1 at the first step; ``None`` if it is a tensor.
        constant_gradient: Whether the gradient that it was given carries no graph.
        weights_are_leaves: Whether it was given weights, none of which was computed; or, after
            the first step, some that were not.
        constant_slots: The names of slots that it was given without a graph, though the step
            before gave them one.
        create_graph: What ``create_graph`` was where the library took the gradient; ``None`` if
            that was done elsewhere.
        recorded: Whether it was computed by the rules, perhaps with fused kernels among them.
        members: Positions of its nodes in :attr:`Walk.nodes`.
        fused: The nodes among them that are fused kernels.
    """

    parts: tuple[str, ...]
    count: int | None
    constant_gradient: bool
    weights_are_leaves: bool
    constant_slots: tuple[str, ...]
    create_graph: bool | None = None
    recorded: bool = False
    members: list[int] = field(default_factory=list)
    fused: list[int] = field(default_factory=list)

    @property
    def first_order(self) -> bool:
        """Whether derivatives of its gradient are missing, or may be if the loss is not linear."""
        return self.constant_gradient and self.create_graph is not True

    @property
    def is_cut(self) -> bool:
        """Whether its weights come from nowhere, though an earlier step has made some."""
        return self.weights_are_leaves and self.count is not None and self.count > 1

    @property
    def label(self) -> str:
        """Such as ``Adam step 3``."""
        name = optimizer_name(self.parts)
        return f"{name} step" if self.count is None else f"{name} step {self.count}"


@dataclass
class Walk:
    """The nodes that lead to some roots.

    Attributes:
        nodes: Autograd nodes, each once, in the order in which they were found.
        index: The position of each.
        inputs: For each node, (position or ``None``, output number) of what it was computed from.
        steps: The optimizer steps.
        step_of: For each node, the position of its step in ``steps``; -1 if it is in none.
    """

    nodes: list[Any]
    index: dict[Any, int]
    inputs: list[list[tuple[Any, int]]]
    steps: list[Step] = field(default_factory=list)
    step_of: list[int] = field(default_factory=list)


def root_of(tensor: Tensor) -> tuple[Any, int] | None:
    """Return the node and output number that stand for a tensor; ``None`` if it has no graph."""
    if not tensor.requires_grad:
        return None
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def walk(roots: Iterable[Any]) -> Walk:
    """Follow the graph from some nodes to the leaves and find the optimizer steps in it."""
    nodes: list[Any] = []
    index: dict[Any, int] = {}
    edges = []
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node in index:
            continue
        index[node] = len(nodes)
        nodes.append(node)
        following = node.next_functions
        edges.append(following)
        stack += [other for other, _ in following if other is not None and other not in index]
    inputs = [
        [(None if other is None else index[other], number) for other, number in following]
        for following in edges
    ]
    found = Walk(nodes, index, inputs, [], [-1] * len(nodes))
    if len(nodes) > _DEEP:
        _let_it_be_freed(found)
    _find_recorded_steps(found)
    _find_fused_steps(found)
    _fold_unpacking(found)
    for step in found.steps:
        marks = [step_tags.read_create_graph(nodes[member]) for member in step.members]
        step.create_graph = next((mark for mark in marks if mark is not None), None)
    _forget_natural_constants(found)
    return found


def users_of(found: Walk) -> list[list[int]]:
    """Return for each node those that were computed from it."""
    users: list[list[int]] = [[] for _ in found.nodes]
    for position, sources in enumerate(found.inputs):
        for source, _ in sources:
            if source is not None:
                users[source].append(position)
    return users


def ancestors(found: Walk, positions: Iterable[int]) -> set[int]:
    """Return the nodes that some nodes were computed from, and these."""
    seen: set[int] = set()
    stack = list(positions)
    while stack:
        position = stack.pop()
        if position not in seen:
            seen.add(position)
            stack += [source for source, _ in found.inputs[position] if source is not None]
    return seen


def _forget_natural_constants(found: Walk) -> None:
    """Do not hold against a step that slots made of constant gradients carry no graph."""
    given = [step.constant_slots for step in found.steps]
    for step in found.steps:
        if step.constant_gradient:
            step.constant_slots = ()
        if not step.constant_slots or step.count is None:
            continue
        before: set[int] | None = None
        for other, earlier in enumerate(found.steps):
            last = (earlier.parts, earlier.count) == (step.parts, step.count - 1)
            if not last or not earlier.constant_gradient:
                continue
            before = ancestors(found, step.members) if before is None else before
            if before.isdisjoint(earlier.members):
                continue
            if earlier.count == 1:
                step.constant_slots = ()
            else:
                kept = tuple(slot for slot in step.constant_slots if slot not in given[other])
                step.constant_slots = kept


def _let_it_be_freed(found: Walk) -> None:
    """Keep a deep graph from overflowing the stack when it is freed.

    A node that Python has seen keeps its Python object, and PyTorch then frees what it was computed
    from by recursion: 100,000 nodes in a row crash the process (torch 2.13). So the nodes are
    divided by depth, and those that use nodes of a lower division keep all of that one alive, in a
    list, which frees its entries one by one.
    """
    depths = _depths(found)
    divisions: dict[int, list[Any]] = {}
    for position in sorted(range(len(depths)), key=depths.__getitem__):  # freed from the end
        divisions.setdefault(depths[position] // _DEEP, []).append(found.nodes[position])
    for position, sources in enumerate(found.inputs):
        used = {depths[source] // _DEEP for source, _ in sources if source is not None}
        below = used - {depths[position] // _DEEP}
        if below:
            kept = [divisions[division] for division in below]
            found.nodes[position].metadata["torchopt.nodes"] = kept


def _depths(found: Walk) -> list[int]:
    """Return for each node how many nodes lie before it on the longest path."""
    users = users_of(found)
    missing = [sum(source is not None for source, _ in sources) for sources in found.inputs]
    depths = [0] * len(found.nodes)
    ready = [position for position, count in enumerate(missing) if not count]
    for source in ready:  # grows while it is read
        for user in users[source]:
            depths[user] = max(depths[user], depths[source] + 1)
            missing[user] -= 1
            if not missing[user]:
                ready.append(user)
    return depths


def _find_recorded_steps(found: Walk) -> None:
    """Group the nodes of the steps that the engine has tagged.

    Nodes are numbered in the order in which a thread makes them, so those of a step are an
    interval. Where several threads have made nodes, a number alone says nothing: then what leads
    to tagged results, by nodes of the interval and up to tagged gradients, is the step.
    """
    results: dict[StepTag, list[int]] = {}
    gradients = set()
    for position, node in enumerate(found.nodes):
        tag = step_tags.read(node)
        if isinstance(tag, StepTag):
            results.setdefault(tag, []).append(position)
        elif tag is not None:
            gradients.add(position)
    if not results:
        return
    numbers = [node._sequence_nr() for node in found.nodes]
    one_thread = len({tag.thread for tag in results}) == 1
    if one_thread and not any(tag.everywhere for tag in results):
        intervals = sorted(results, key=lambda tag: tag.first)
        starts = [tag.first for tag in intervals]
        members: dict[StepTag, list[int]] = {tag: [] for tag in results}
        for position, number in enumerate(numbers):
            tag = intervals[bisect_right(starts, number) - 1]
            if tag.first <= number < tag.last:
                members[tag].append(position)
    else:
        members = {
            tag: _leading_to(found, positions, range(tag.first, tag.last), numbers, gradients)
            for tag, positions in results.items()
        }
    for tag, positions in members.items():
        for position in positions:
            found.step_of[position] = len(found.steps)
        known = (tag.parts, tag.step, tag.constant_gradient, tag.weights_are_leaves)
        found.steps.append(Step(*known, tag.constant_slots, recorded=True, members=positions))


def _leading_to(
    found: Walk, results: list[int], interval: range, numbers: list[int], gradients: set[int]
) -> list[int]:
    members: dict[int, None] = {}
    stack = list(results)
    while stack:
        position = stack.pop()
        if position in members or position in gradients or numbers[position] not in interval:
            continue
        members[position] = None
        stack += [source for source, _ in found.inputs[position] if source is not None]
    return list(members)


def _find_fused_steps(found: Walk) -> None:
    """Make a step of each fused kernel, or of several that were launched one after the other."""
    fused = [
        (node._sequence_nr(), position, group)
        for position, node in enumerate(found.nodes)
        if isinstance(group := getattr(node, "group", None), Group)
    ]
    previous: tuple[range, Any, int | None] | None = None
    for number, position, group in sorted(fused, key=lambda entry: entry[0]):
        if found.step_of[position] >= 0:
            found.steps[found.step_of[position]].fused.append(position)
            previous = None
            continue
        counts = {step for _, step in group.values}
        key = (group.rule.segment, counts.pop() if len(counts) == 1 else None)
        if previous is None or number not in previous[0] or previous[1:] != key:
            parts = tuple(type(part).__name__ for part in group.rule.segment.parts)
            found.steps.append(Step(parts, key[1], True, PARAMETER in group.rule.inputs, ()))
        step = found.steps[-1]
        _note_inputs(found, position, group, step)
        found.step_of[position] = len(found.steps) - 1
        step.members.append(position)
        step.fused.append(position)
        # each of its new parameters may have got a node of its own
        previous = (range(number + 1, number + 2 + group.count), *key)
    for step in found.steps:
        if not step.recorded:
            step.weights_are_leaves |= _some_weights_are_leaves(found, step)


def fused_inputs(found: Walk, position: int) -> dict[str, Sequence[tuple[Any, int]]]:
    """Return what a fused kernel was computed from, by operand: gradients, parameters, slots."""
    group: Group = found.nodes[position].group
    return group.columns(group.rule.inputs, found.inputs[position], group.rule.packed_in)


def _note_inputs(found: Walk, position: int, group: Group, step: Step) -> None:
    for operand, sources in fused_inputs(found, position).items():
        present = [source for source, _ in sources if source is not None]
        if operand == GRADIENT:
            step.constant_gradient &= not present
        elif operand == PARAMETER:
            step.weights_are_leaves &= not any(found.inputs[source] for source in present)
        elif not present and not is_hyper(operand):
            name = group.rule.segment.slots[int(operand[1:])]
            step.constant_slots += () if name in step.constant_slots else (name,)


def _some_weights_are_leaves(found: Walk, step: Step) -> bool:
    """Whether a weight that has been updated before enters a fused step as a leaf."""
    for position in step.fused:
        group: Group = found.nodes[position].group
        for k, (source, _) in enumerate(fused_inputs(found, position).get(PARAMETER, [])):
            row = 0 if group.indices is None else group.indices[k]
            if source is not None and not found.inputs[source] and group.values[row][1] > 1:
                return True
    return False


def _fold_unpacking(found: Walk) -> None:
    """Count what takes packed slots apart, or names a new parameter, to the step it comes from."""
    names = [node.name().rstrip("0123456789") for node in found.nodes]
    for position in [p for p, node in enumerate(found.nodes) if is_name(node)]:
        source = found.inputs[position][0][0]
        if source is None or found.step_of[position] >= 0:  # a step that rules compute in part
            continue
        if isinstance(getattr(found.nodes[source], "group", None), Group):
            found.step_of[position] = found.step_of[source]
            found.steps[found.step_of[source]].members.append(position)
    for position in sorted(
        (p for p, name in enumerate(names) if name in _UNPACKING),
        key=lambda p: found.nodes[p]._sequence_nr(),
    ):
        step = unpacked_from(found, position)
        if step is not None and found.step_of[position] < 0:
            found.step_of[position] = step
            found.steps[step].members.append(position)


def unpacked_from(found: Walk, position: int) -> int | None:
    """Return the step whose packed slots a node takes apart, if that is what it does."""
    name = found.nodes[position].name()
    sources = found.inputs[position]
    if len(sources) != 1 or sources[0][0] is None:
        return None
    source, number = sources[0]
    step = found.step_of[source]
    if step < 0:
        return None
    if name.startswith(("Split", "_Unpack")):
        group = getattr(found.nodes[source], "group", None)
        return step if isinstance(group, Group) and _is_packed(group, number) else None
    unpacked = found.nodes[source].name().startswith(("Split", "View"))
    return step if unpacked else None


def _is_packed(group: Group, output: int) -> bool:
    operands = group.columns(
        group.rule.outputs, range(group.count * len(group.rule.outputs)), group.rule.packed_out
    )
    return any(s in group.rule.packed_out and output in numbers for s, numbers in operands.items())
