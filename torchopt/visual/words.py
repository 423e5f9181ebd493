"""What is said of cuts, the same wherever it is said; and where a node stands."""

from __future__ import annotations

import collections
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from torchopt.visual.aliases import Alias, Output
from torchopt.visual.graph import Extraction
from torchopt.visual.operations import is_builtin, operation_label, own_saved_tensors
from torchopt.visual.walk import Step, ancestors


def place(found: Extraction, position: int) -> str:
    """Return which operation a node is and between which steps it stands."""
    node = found.graph.nodes[found.node_of[position]]
    if node.kind == "step":
        return node.label
    name = operation_label(found.walk.nodes[position].name())
    shape = "" if node.shape is None else f" of shape {node.shape}"
    if not found.walk.steps:
        return f"{name}{shape}"
    where = f"after {node.lane} step{'s' * (node.lane != 1)}" if node.lane else "before any step"
    return f"{name}{shape} ({where})"


def leaf_name(found: Extraction, position: int) -> str:
    """Return the name of a leaf, or its shape."""
    unit = found.units[found.node_of[position]]
    assert unit.tensor is not None
    return repr(unit.names[0]) if unit.names else f"a leaf of shape {tuple(unit.tensor.shape)}"


def tensor_name(found: Extraction, output: Output) -> str:
    """Return the name of a tensor in the graph, or what it was made by."""
    for unit in found.units:
        if unit.names and unit.output == output:
            return repr(unit.names[0])
    if found.units[found.node_of[output[0]]].kind == "leaf":
        return leaf_name(found, output[0])
    return f"what {place(found, output[0])} made"


def first_user(found: Extraction, position: int) -> str:
    """Return the label of what a leaf enters first."""
    key = found.node_of[position]
    users = [user for source, user in found.graph.edges if source == key]
    return found.graph.nodes[min(users)].label if users else "the loss"


def first_order(steps: Sequence[Step]) -> str:
    """Return the line about steps whose gradient carried no graph."""
    labels = collections.Counter(step.label for step in steps)
    known = all(step.create_graph is False for step in steps)
    why = (
        "create_graph=False"
        if known
        else ("create_graph=False, or an inner loss that is linear in the weights")
    )
    return (
        f"* First-order: {listed(labels)} took the gradient as a constant ({why}), so paths "
        "through inner gradients are missing. What acts on the weights through the inner loss only "
        "is not reached then; pass create_graph=True."
    )


def weights_cut(step: Step) -> str:
    """Return the line about weights that entered a step without their history."""
    before = (step.count or 0) - 1
    return (
        f"* Detached before {step.label}: the weights that entered it are leaves (stop_gradient, "
        f"detach, torch.no_grad() or recover_state_dict after step {before}), so what influenced "
        "earlier steps is not reached through them."
    )


def slots_cut(step: Step) -> str:
    """Return the line about a state that entered a step without its history."""
    return (
        f"* Detached before {step.label}: its state ({', '.join(step.constant_slots)}) carries no "
        "graph (stop_gradient or detach)."
    )


def alias_where(found: Extraction, alias: Alias) -> str:
    """Return where an alias enters."""
    if alias.is_leaf:
        return (
            f"where {leaf_name(found, alias.position)} enters {first_user(found, alias.position)}"
        )
    return f"at {place(found, alias.position)}"


def alias_cut(found: Extraction, alias: Alias, itself: bool) -> str:
    """Return the line about an alias: of the tensor itself, or of what was computed from it."""
    whose = "its values" if itself else f"the values of {tensor_name(found, alias.source)}"
    if not alias.is_leaf:
        return (
            f"* Detached: {whose} enter as a constant too, cut off by .detach(), .data, "
            f"stop_gradient or torch.no_grad(), {alias_where(found, alias)}."
        )
    return (
        f"* Detached: {whose} enter again as {leaf_name(found, alias.position)}, another tensor in "
        "the same memory, as stop_gradient, detach().requires_grad_() and nn.Parameter(x) make; it "
        f"enters {first_user(found, alias.position)}."
    )


def took_the_number(found: Extraction, step: Step, tensor: Tensor) -> bool:
    """Whether a step computed with a number that is the value of a tensor."""
    value = tensor.detach().reshape(())
    if float(value) in (0.0, 1.0, -1.0):
        return False  # these prove nothing
    numbers: set[Any] = set()
    for position in step.fused:
        values = found.walk.nodes[position].group.values
        numbers |= {number for row, _ in values for number in row}
    for position in set(step.members) - set(step.fused):
        node = found.walk.nodes[position]
        for saved in own_saved_tensors(node) if is_builtin(node) else ():
            if saved.numel() == 1 and not saved.requires_grad and saved.is_floating_point():
                numbers |= {float(saved), -float(saved)}
    return any(value == torch.tensor(number, dtype=value.dtype) for number in numbers)


def numbers_in(values: Any) -> Iterator[float]:
    """Yield the numbers among nested values; booleans are none."""
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from numbers_in(value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield float(value)


def number_cut(steps: Sequence[Step], tensor: Tensor) -> str:
    """Return the line about steps that took a number instead of the tensor."""
    labels = collections.Counter(step.label for step in steps)
    return (
        f"* {listed(labels)} took the number {float(tensor.detach()):g} as a hyperparameter, which "
        "equals its value: the tensor was made a number by .item() or float(). Give the tensor "
        "itself."
    )


#: Operations that keep nothing but their operands: others keep results that may equal a tensor.
_KEEPING_OPERANDS = ("Mul", "Mm", "Addmm", "Bmm", "Baddbmm", "Mv", "Addmv", "Dot", "Addcmul")


def copies(found: Extraction, tensor: Tensor, output: Output) -> Iterator[str]:
    """Yield where constants and leaves with the values of a tensor enter."""
    for position, node in enumerate(found.walk.nodes):
        keeps_operands = operation_label(node.name()) in _KEEPING_OPERANDS and is_builtin(node)
        if found.walk.step_of[position] < 0 and keeps_operands:
            for saved in own_saved_tensors(node):
                if not saved.requires_grad and _same(saved, tensor):
                    yield place(found, position)
    made_of = ancestors(found.walk, [output[0]])  # a step may have left it as it was
    for unit in found.units:
        if unit.kind != "leaf" or unit.members[0] in made_of:
            continue
        if _same(unit.tensor, tensor):
            yield first_user(found, unit.members[0])


def _same(other: Tensor | None, tensor: Tensor) -> bool:
    if other is None or other.shape != tensor.shape or other.dtype != tensor.dtype:
        return False
    comparable = other.layout == tensor.layout == torch.strided and other.device == tensor.device
    return comparable and other is not tensor and torch.equal(other.detach(), tensor.detach())


def copy_cut(where: str) -> str:
    """Return the line about a copy of the tensor."""
    return (
        f"* A constant with the same values enters at {where}: a copy without graph "
        "(clone().detach(), deepcopy, extract_state_dict(by='deepcopy'), torch.tensor(x)), unless "
        "the two are equal by chance."
    )


def listed(texts: collections.Counter[str]) -> str:
    """Return texts in a row, with how often each comes."""
    shown = [f"{text} ({n} times)" if n > 1 else text for text, n in list(texts.items())[:5]]
    return ", ".join(shown) + (f" and {len(texts) - 5} more" if len(texts) > 5 else "")


def steps_listed(steps: Sequence[Step]) -> str:
    """Return the labels of steps in a row."""
    return listed(collections.Counter(step.label for step in steps))


def counted(count: int, word: str) -> str:
    """Return ``1 weight``, ``2,000 weights``."""
    return f"{count:,} {word}{'s' * (count != 1)}"


def first_of(lines: Sequence[str], what: str, most: int = 3) -> list[str]:
    """Return lines, or the first of many and how many more there are."""
    rest = len(lines) - most
    return [*lines] if rest < 2 else [*lines[:most], f"* ... and {rest} more {what} of this kind."]


def wrapped(lines: Sequence[str], width: int = 90) -> str:
    """Return lines that are no longer than a terminal is wide; what goes on is indented."""
    return "\n".join(
        textwrap.fill(
            line,
            width,
            subsequent_indent="  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for line in lines
    )
