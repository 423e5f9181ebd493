"""A loss that was computed elsewhere: outside of the block, of another network, beside a step."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor, nn

from torchopt.nn import put_back
from torchopt.nn.parameters import FastWeight
from torchopt.visual import words
from torchopt.visual.entering import entering_leaves
from torchopt.visual.graph import Extraction
from torchopt.visual.walk import Step, ancestors, users_of


def outside_of_the_block(found: Extraction) -> Iterator[str]:
    """Tell of a loss of a network that a block has put back, if no step lies before it."""
    if found.walk.steps or made_by_steps(found):
        return
    reached = {id(unit.tensor) for unit in found.units if unit.kind == "leaf"}
    for network in list(put_back.networks):
        if any(id(parameter) in reached for parameter in network.parameters()):
            yield (
                "* The loss was taken outside of the inner_loop block, before the first step, or "
                "after stop_gradient: no inner step leads to the weights that it was computed "
                "from. The end of a block puts the initial weights back, so compute the loss "
                "inside, after the steps (its backward pass may come later)."
            )
            return


def not_recorded(found: Extraction) -> Iterator[str]:
    """Tell of steps that have made the weights of a loss and are not in its graph."""
    if not found.walk.steps and made_by_steps(found):
        yield (
            "* The inner steps were not recorded: they made the weights that the loss was computed "
            "from, but under torch.no_grad(), so that nothing leads back through them. Take the "
            "steps with gradients enabled."
        )


def made_by_steps(found: Extraction) -> bool:
    """Whether the loss reaches weights that a differentiable optimizer made without a graph."""
    # initial weights, and those after stop_gradient, are nn.Parameter itself
    return any(type(unit.tensor) is FastWeight for unit in found.units if unit.kind == "leaf")


def another_network(found: Extraction, named: Sequence[tuple[str, Tensor]]) -> Iterator[str]:
    """Tell of a loss that reaches other parameters, and none of those that have a name.

    Meta-parameters that were not used are not reached either. So what has a name has to look like
    a network: its shapes are those of what is reached, or some are matrices.
    """
    reached = [unit for unit in found.units if unit.kind == "leaf" and unit.tensor is not None]
    wanted = {id(x): x for _, x in named if x.is_leaf and x.requires_grad and x.dim()}
    others = [unit.tensor for unit in reached if unit.tensor is not None]
    if not wanted or not others or any(unit.names for unit in reached):
        return
    alike = not _shapes(wanted.values()) - _shapes(others)
    matrices = any(isinstance(x, nn.Parameter) and x.dim() > 1 for x in wanted.values())
    if not alike and not matrices:
        return
    same = " of the same shapes" if alike else ""
    count = words.counted(len(others), "tensor")
    yield (
        f"* The loss is of another network: it reaches {count}{same} "
        f"and none of the {words.counted(len(wanted), 'tensor')} that params names. A copy "
        "(copy.deepcopy, module_clone) is another network too. Compute the loss with the network "
        "that params names, or name the one that it was computed with."
    )


def _shapes(tensors: Iterable[Tensor]) -> collections.Counter[tuple[int, ...]]:
    return collections.Counter(tuple(tensor.shape) for tensor in tensors)


def passed_by(found: Extraction, tensor: Tensor) -> Iterator[str]:
    """Tell of steps that took place without a weight that the loss reaches."""
    leaf = found.walk.index.get(_accumulator(found, tensor))
    if leaf is None or not found.walk.steps or not isinstance(tensor, nn.Parameter):
        return
    entered = [s for s in found.walk.steps if leaf in entering_leaves(found.walk, s)]
    if entered:
        yield from _thawed(found, entered)
    elif not _acts_on_steps(found, leaf):
        labels = words.steps_listed(found.walk.steps)
        yield (
            f"* It was frozen at {labels} (requires_grad=False), or belongs to no network that was "
            "trained there: no path leads through a step, and the loss takes it as it is."
        )


def _accumulator(found: Extraction, tensor: Tensor) -> object:
    """Return the autograd node of a leaf."""
    return next((n for n in found.walk.nodes if getattr(n, "variable", None) is tensor), None)


def _thawed(found: Extraction, entered: Sequence[Step]) -> Iterator[str]:
    """Tell of steps before the first one that a weight took part in."""
    before = {id(step): ancestors(found.walk, step.members) for step in entered}

    def comes_before(other: Step, step: Step) -> bool:
        return other is not step and not before[id(step)].isdisjoint(other.members)

    first = next(s for s in entered if not any(comes_before(other, s) for other in entered))
    if first.is_cut:
        return
    missed = [s for s in found.walk.steps if s.parts == first.parts and comes_before(s, first)]
    if missed:
        yield (
            f"* It was frozen at {words.steps_listed(missed)} (requires_grad=False): no path leads "
            f"through {'that step' if len(missed) == 1 else 'those steps'}. It takes part later."
        )


def _acts_on_steps(found: Extraction, leaf: int) -> bool:
    users = users_of(found.walk)
    seen: set[int] = set()
    stack = [leaf]
    while stack:
        position = stack.pop()
        if found.walk.step_of[position] >= 0:
            return True
        if position not in seen:
            seen.add(position)
            stack += users[position]
    return False
