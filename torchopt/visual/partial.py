"""What is missing of a gradient that arrives, as far as the graph of the loss tells."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from torchopt.core import step_tags
from torchopt.visual import words
from torchopt.visual.aliases import Alias
from torchopt.visual.entering import entering_leaves, entering_weights
from torchopt.visual.flow import undefined
from torchopt.visual.graph import Extraction
from torchopt.visual.walk import Step, ancestors, users_of


@dataclass(frozen=True)
class Missing:
    """One cut that takes something away from the gradient.

    Attributes:
        where: Where it is, such as ``"before Adam step 3"``.
        line: A line that explains it.
        condition: If the graph alone does not tell: under which condition something is missing,
            such as ``"if it acted before Adam step 3"``.
    """

    where: str
    line: str
    condition: str | None = None


def missing(
    found: Extraction, tensor: Tensor, output: tuple[int, int], on_path: set[int], loss: Tensor
) -> list[Missing]:
    """Return the cuts between a tensor that the loss reaches and the loss, certain ones first.

    Args:
        found: The graph of the loss.
        tensor: The tensor.
        output: What it is in the graph.
        on_path: The nodes that were computed from it.
        loss: The loss; a backward pass is run if functions of others lie on the paths.
    """
    reach = _Reach(found, tensor, output, on_path)
    cuts = [
        *_between_steps(reach),
        *_first_order(reach),
        *_aliases(reach),
        *_without_derivative(reach, loss),
    ]
    if not cuts:
        cuts = [*_numbers(reach), *_copies(reach)]
    return sorted(cuts, key=lambda cut: cut.condition is not None)


class _Reach:
    """Which steps a tensor acts on, by the graph."""

    def __init__(
        self, found: Extraction, tensor: Tensor, output: tuple[int, int], on_path: set[int]
    ) -> None:
        self.found, self.walk = found, found.walk
        self.tensor, self.output, self.on_path = tensor, output, on_path

    @cached_property
    def steps(self) -> list[Step]:
        """The steps that the tensor may act on: not those that it was made by."""
        made = ancestors(self.walk, [self.output[0]]) if self.tensor.grad_fn is not None else set()
        steps = [s for s in self.walk.steps if made.isdisjoint(s.members)]
        steps.sort(key=lambda step: (step.parts, step.count or 0))
        if self.tensor.grad_fn is not None:
            return steps
        # a leaf that was a weight at some step is not older than that step
        born: dict[tuple[str, ...], int] = {}
        for step in steps:
            if step.count is not None and self.output[0] in entering_leaves(self.walk, step):
                born.setdefault(step.parts, step.count)
        return [s for s in steps if (s.count or 0) >= born.get(s.parts, 0)]

    @cached_property
    def enters_a_step(self) -> bool:
        """Whether there is a path to the loss through a step."""
        return any(map(self.acts_on, self.walk.steps))

    @cached_property
    def entered(self) -> set[int]:
        """The numbers of the steps that the tensor enters without going through other steps."""
        steps: set[int] = set()
        near = {self.output[0]}
        users = users_of(self.walk)
        stack = [p for p in users[self.output[0]] if self.output in self.walk.inputs[p]]
        while stack:
            position = stack.pop()
            steps.add(self.walk.step_of[position])
            if self.walk.step_of[position] < 0 and position not in near:
                near.add(position)
                stack += users[position]
        return steps

    def comes_from_it(self, source: tuple[int | None, int]) -> bool:
        """Whether a tensor of the graph is this one or was computed from it."""
        return source == self.output or source[0] in self.on_path

    def acts_on(self, step: Step) -> bool:
        """Whether a step was computed from the tensor, in whatever role."""
        return not self.on_path.isdisjoint(step.members)

    def moves_the_point(self, step: Step) -> bool:
        """Whether the weights or the state that a step was given were computed from the tensor."""
        if any(map(self.comes_from_it, entering_weights(self.walk, step))):
            return True
        own = self.walk.steps.index(step)
        return any(
            self.comes_from_it(source) and self.walk.step_of[source[0]] not in (-1, own)
            for member in step.members
            for source in self.walk.inputs[member]
            if source[0] is not None
        )

    def earlier(self, step: Step) -> list[Step]:
        """Return earlier steps, by their count, of the same transformations."""
        return [
            other
            for other in self.walk.steps
            if other.parts == step.parts
            and other.count is not None
            and step.count is not None
            and other.count < step.count
        ]

    def leads_to(self, earlier: Step, step: Step) -> bool:
        """Whether a step was computed from an earlier one."""
        return not ancestors(self.walk, step.members).isdisjoint(earlier.members)


def _between_steps(reach: _Reach) -> Iterator[Missing]:
    """Find weights and states that enter a later step without what was there before it."""
    conditional = []
    for step in reach.steps:
        if step.count is None or step.count < 2:
            continue
        where = f"before {step.label}"
        if step.is_cut and reach.output[0] not in entering_leaves(reach.walk, step):
            condition = _acted_before(reach, step)
            if condition is not None:
                cut = Missing(where, words.weights_cut(step), condition or None)
                if condition:
                    conditional.append(cut)
                else:
                    yield cut
        if step.constant_slots and _acts_on_state(reach, step):
            yield Missing(where, words.slots_cut(step))
    yield from conditional[:1]  # they all say the same


def _acted_before(reach: _Reach, step: Step) -> str | None:
    """Return a condition, empty if it is sure that it acted on earlier weights; else ``None``."""
    acted = [other for other in reach.earlier(step) if reach.acts_on(other)]
    if any(reach.leads_to(other, step) for other in acted):
        return ""
    shapes = {tuple(_variable(reach, leaf).shape) for leaf in entering_leaves(reach.walk, step)}
    for other in acted:
        if shapes and shapes <= _shapes_made(reach, other):
            return f"if {step.label} went on from {other.label}"
    later = [s for s in reach.steps if s.parts == step.parts and (s.count or 0) >= step.count]  # pyright: ignore[reportOperatorIssue]
    if acted or not any(map(reach.acts_on, later)):
        return None
    if any(map(reach.comes_from_it, entering_weights(reach.walk, step))):
        return None
    return f"if it acted before {step.label} too"


def _variable(reach: _Reach, leaf: int) -> Tensor:
    return reach.walk.nodes[leaf].variable


def _shapes_made(reach: _Reach, step: Step) -> set[tuple[int, ...]]:
    return {
        tuple(entry.shape)
        for member in step.members
        for entry in getattr(reach.walk.nodes[member], "_input_metadata", ())
    }


def _acts_on_state(reach: _Reach, step: Step) -> bool:
    """Whether the state that the step before left was computed from the tensor."""
    return any(
        other.count == (step.count or 0) - 1
        and _state_comes_from_it(reach, other)
        and reach.leads_to(other, step)
        for other in reach.earlier(step)
    )


def _state_comes_from_it(reach: _Reach, step: Step) -> bool:
    """Whether a new slot of a step was: a learning rate, say, acts on the weights alone."""
    if any(member in reach.on_path for member in step.fused):
        return True
    inside = {s for member in step.members for s, _ in reach.walk.inputs[member]}
    return any(
        member in reach.on_path and member in inside
        for member in step.members
        if isinstance(step_tags.read(reach.walk.nodes[member]), step_tags.StepTag)
    )


def _first_order(reach: _Reach) -> Iterator[Missing]:
    approximate = [step for step in reach.steps if step.first_order]
    if not approximate:
        return
    steps = [step for step in approximate if reach.moves_the_point(step)]
    if steps:
        sure = any(step.create_graph is False for step in steps)
        condition = None if sure else "unless the inner loss is linear in the weights"
    else:
        # Perhaps it acts through an inner gradient only. Then whole gradients would show it.
        if reach.enters_a_step or len(approximate) < len(reach.walk.steps):
            return
        steps, condition = approximate, "if it acts in the inner loss too"
    yield Missing(f"in {_listed(steps)}", words.first_order(steps), condition)


def _aliases(reach: _Reach) -> Iterator[Missing]:
    found: dict[str, Missing] = {}
    for alias in reach.found.aliases:
        # it may be the alias itself
        if reach.comes_from_it(alias.source) and alias.position != reach.output[0]:
            where = words.alias_where(reach.found, alias)
            itself = alias.source == reach.output
            line = words.alias_cut(reach.found, alias, itself)
            found.setdefault(where, Missing(where, line, _which_was_first(reach, alias, where)))
    yield from list(found.values())[:5]


def _which_was_first(reach: _Reach, alias: Alias, where: str) -> str | None:
    """Return a condition where either of two tensors may have been made of the other."""
    # only a leaf has a variable
    variable = getattr(reach.walk.nodes[alias.source[0]], "variable", None)
    if variable is None or (isinstance(variable, nn.Parameter) and not alias.is_leaf):
        return None
    if alias.is_leaf:
        return f"if {words.leaf_name(reach.found, alias.position)} was made of it"
    return f"if the constant {where} was made of it"


def _without_derivative(reach: _Reach, loss: Tensor) -> Iterator[Missing]:
    counted = collections.Counter(
        words.place(reach.found, position)
        for position in undefined(loss, reach.tensor, reach.found, reach.on_path, reach.output)
    )
    for place in counted:
        yield Missing(f"at {place}", f"* {place} returns no derivative (None) for its input.")


def _numbers(reach: _Reach) -> Iterator[Missing]:
    """Find steps that took its value as a number, while others took the tensor."""
    tensor = reach.tensor
    if tensor.numel() != 1 or tensor.is_complex() or not reach.enters_a_step:
        return
    entered = {number for number in reach.entered if number >= 0}
    parts = {reach.walk.steps[number].parts for number in entered}
    steps = [s for k, s in enumerate(reach.walk.steps) if s.parts in parts and k not in entered]
    steps = [step for step in steps if words.took_the_number(reach.found, step, tensor)]
    if steps:
        labels = _listed(steps)
        condition = f"if the number {float(tensor.detach()):g} in {labels} was made of it"
        yield Missing(f"in {labels}", words.number_cut(steps, tensor), condition)


def _copies(reach: _Reach) -> Iterator[Missing]:
    """Find leaves and constants that are copies by value: several different numbers agree."""
    tensor = reach.tensor
    if tensor.numel() < 2 or len(torch.unique(tensor.detach().reshape(-1)[:16])) < 2:
        return
    for place in words.copies(reach.found, tensor, reach.output):
        condition = f"if the constant with the same values at {place} is a copy of it"
        yield Missing(f"at {place}", words.copy_cut(place), condition)
        return


def verdict(cuts: Sequence[Missing]) -> str:
    """Return the words of the first line."""
    if not cuts:
        return "its gradient arrives"
    sure = list(dict.fromkeys(cut.where for cut in cuts if cut.condition is None))
    if sure:
        return f"its gradient arrives, but only in part (cut {_and(sure)})"
    return f"its gradient arrives, but only in part {cuts[0].condition}"


def _and(texts: Sequence[str]) -> str:
    shown = [*texts[:3], *([f"at {len(texts) - 3} more places"] if len(texts) > 3 else [])]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def _listed(steps: Sequence[Step]) -> str:
    return words.listed(collections.Counter(step.label for step in steps))
