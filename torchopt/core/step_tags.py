"""Marks in the autograd graph that tell which of its nodes an optimizer step consists of.

A fused step is one node and needs none. For a step that the rules compute, the numbers that
autograd gives to its nodes are noted at a few of its results, in the dict ``metadata`` that every
node has; :mod:`torchopt.visual` reads them. They cost a few microseconds for each step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchopt.base.torch_internals import get_sequence_nr, peek_interpreter_stack
from torchopt.core.plan import Plan
from torchopt.core.protocols import LeavesLike


Slots = Mapping[str, Any]

#: The key in ``metadata``: at results a :class:`StepTag`, as a plain tuple; at gradients the string
#: ``"gradient"``.
STEP_TAG = "torchopt.step"

#: The key in ``metadata`` under which a new weight tells how its gradient was taken.
CREATE_GRAPH = "torchopt.create_graph"


class StepTag(NamedTuple):
    """One step.

    Attributes:
        parts: Names of the classes of its transformations.
        step: The step count, 1 at the first step; ``None`` if it is a tensor.
        constant_gradient: Whether no gradient that it was given carries a graph.
        weights_are_leaves: Whether the first weight that it was given was not computed, or any
            that had been updated before.
        constant_slots: The names of slots whose first one was given without a graph.
        first: The number of its first node.
        last: The number after that of its last node.
        thread: Which thread made them; each thread counts by itself.
        everywhere: Whether all results and gradients are tagged.
    """

    parts: tuple[str, ...]
    step: int | None
    constant_gradient: bool
    weights_are_leaves: bool
    constant_slots: tuple[str, ...]
    first: int
    last: int
    thread: int
    everywhere: bool


def begin() -> int:
    """Return the number that the next node of the graph gets; -1 if none is recorded here."""
    if (
        torch.compiler.is_compiling()
        or not torch.is_grad_enabled()
        or peek_interpreter_stack() is not None
    ):
        return -1
    return get_sequence_nr()


def end(
    first: int, tx_plan: Plan, leaves: LeavesLike, old: Slots, new: Slots, results: Sequence[Tensor]
) -> None:
    """Tag the nodes of a step that began at node number ``first``.

    Args:
        first: What :func:`begin` returned.
        tx_plan: The transformation.
        leaves: What it was given.
        old: The slots before the step, by name.
        new: Those after it.
        results: The updates or the new weights.
    """
    last = get_sequence_nr()
    if last == first:
        return
    g, p, count = leaves.g[0], leaves.p[0], leaves.t[0]
    plan = tx_plan.__dict__
    parts = plan.get("part_names")
    if parts is None:
        parts = plan["part_names"] = tuple(type(part).__name__ for part in tx_plan.parts)
    # Backward passes on other devices run in threads of their own, whose numbers mean nothing
    # here, so that a step is told from its gradients by tags alone.
    everywhere = not g.is_cpu
    # packed slots are those of a fused node
    loose = [n for n, c in old.items() if type(c) is list and _is_constant(c[0])]
    tag = (  # a plain tuple: this is run at each step
        parts,
        count if type(count) is int else None,
        not (g.requires_grad or any(x.requires_grad for x in leaves.g)),
        p is not None and (p.is_leaf or _some_are_leaves(leaves)),
        tuple(loose),
        first,
        last,
        get_ident(),
        everywhere,
    )
    # Two tags do for a step on the CPU: at a weight, and at a slot, which may live on alone.
    other = results[-1]
    for column in new.values():
        if type(column) is list and column[-1] is not None:
            other = column[-1]
            break
    _tag(other, tag)
    for result in results if everywhere else results[:1]:
        _tag(result, tag)
    if everywhere:
        for x in leaves.g:
            _tag(x, "gradient")


def note_create_graph(weights: Sequence[Any], create_graph: bool) -> None:
    """Note at a new weight whether the gradient that made it was to carry a graph.

    A gradient without graph is an approximation if it was not; else the loss is linear.
    """
    for weight in weights:
        if isinstance(weight, Tensor) and weight.grad_fn is not None:
            node: Any = weight.grad_fn
            node.metadata[CREATE_GRAPH] = create_graph
            return


def read_create_graph(node: Any) -> bool | None:
    """Return what :func:`note_create_graph` has noted at a node; ``None`` if nothing."""
    return node.metadata.get(CREATE_GRAPH)


def read(node: Any) -> StepTag | str | None:
    """Return the tag of a node: that of a step's result, ``"gradient"``, or ``None``."""
    tag = node.metadata.get(STEP_TAG)
    return StepTag(*tag) if isinstance(tag, tuple) else tag


def _some_are_leaves(leaves: LeavesLike) -> bool:
    """Whether a weight that has been updated before was not computed."""
    return any(
        p.is_leaf and p.requires_grad and type(t) is int and t > 1
        for p, t in zip(leaves.p, leaves.t)
    )


def _is_constant(slot: Tensor | None) -> bool:
    return slot is not None and not slot.requires_grad


def _tag(tensor: Tensor, value: object) -> None:
    node: Any = tensor.grad_fn
    if node is not None:
        node.metadata[STEP_TAG] = value
