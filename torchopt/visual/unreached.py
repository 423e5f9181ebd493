"""Why a loss does not reach a tensor, as far as its graph tells."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from torchopt.kernels.independent import is_name
from torchopt.visual import words
from torchopt.visual.choices import choices, one_hot_rows
from torchopt.visual.contract import with_cut_leaves_grouped
from torchopt.visual.elsewhere import another_network, not_recorded, outside_of_the_block
from torchopt.visual.graph import Extraction
from torchopt.visual.operations import dtype_name, operation_label, saved_tensors
from torchopt.visual.walk import Step, walk


def reasons(found: Extraction, tensor: Tensor, named: Sequence[tuple[str, Tensor]]) -> list[str]:
    """Return what speaks for one cause or another, the most certain first, each a line.

    Args:
        found: The graph of the loss.
        tensor: A tensor that it does not reach.
        named: All tensors that have names.
    """
    evidence = [
        *outside_of_the_block(found),
        *not_recorded(found),
        *_made_elsewhere(found, tensor),
        *_constants(found, tensor),
        *_other_leaves(found, tensor),
        *_numbers(found, tensor),
        *words.first_of(list(_cut_steps(found)), "cuts"),
    ]
    chosen = choices(found, tensor, named, perhaps=not evidence)
    if chosen:
        return [*evidence, *chosen]
    integers = list(_integers(found))
    if evidence:
        return [*evidence, *integers]
    other = list(another_network(found, named))
    if other:
        return [*other, *integers]
    return [
        *integers,
        "* Its values are nowhere in the graph: it was not used, or only detached, under "
        "torch.no_grad(), through .item(), or to make a choice (as argmax and comparisons do).",
        *_no_steps(found),
    ]


def reached_leaves(found: Extraction) -> list[str]:
    """Return a line that lists the leaves of the graph; unnamed ones are only counted."""
    count = sum(node.kind == "leaf" for node in found.graph.nodes)
    leaves = [n for n in with_cut_leaves_grouped(found.graph).graph.nodes if n.kind == "leaf"]
    named = [" = ".join(node.name.split("\n")) for node in leaves if node.name]
    shown = [*named[:10], *([f"{len(named) - 10} more"] if len(named) > 10 else [])]
    shown += [node.label for node in leaves if not node.name and node.cuts]
    others = [node for node in leaves if not node.name and not node.cuts]
    if len(others) == 1:
        shown.append(f"unnamed {others[0].shape}")
    elif others and not shown:
        return [f"* The graph of the loss has {count} leaves, none of them named."]
    elif others:
        shown.append(f"{len(others)} unnamed")
    counted = "1 leaf" if count == 1 else f"{count} leaves"
    return [f"* The graph of the loss has {counted}: {', '.join(shown)}."]


def _in_order(found: Extraction) -> list[int]:
    """Return the positions of all autograd nodes in an order of computation."""
    return sorted(range(len(found.walk.nodes)), key=found.node_of.__getitem__)


def _steps(found: Extraction) -> list[Step]:
    return [unit.step for unit in found.units if unit.step is not None]


def _where(found: Extraction, position: int) -> str:
    node = found.graph.nodes[found.node_of[position]]
    if node.kind == "step":
        return node.label
    name = operation_label(found.walk.nodes[position].name())
    if not found.walk.steps:
        return name
    return f"{name} (after {node.lane} step{'s' * (node.lane != 1)})"


def _made_elsewhere(found: Extraction, tensor: Tensor) -> Iterator[str]:
    """Look at the tensor's own history."""
    if tensor.grad_fn is None:
        return
    own = walk([tensor.grad_fn])
    # a fused step changes nothing about a new weight but its node, once
    given = is_name(tensor.grad_fn)
    if tensor._version > given and any(node in found.walk.index for node in own.nodes):
        yield (
            "* It was overwritten in place: the loss may depend on what it was before, which has "
            "another place in the graph. Use operations that make new tensors (x = x + y)."
        )
        return
    new = [s for s in own.steps if not any(own.nodes[m] in found.walk.index for m in s.members)]
    if new:
        last = max(new, key=lambda step: step.count or 0)
        yield (
            f"* It was made by {last.label}, which is not in the graph of the loss: the loss was "
            "computed before that step or from other weights. Compute the loss with the present "
            "weights; if you mean the initial ones, keep them before the first step "
            "(dict(net.named_parameters()))."
        )
    elif any(node in found.walk.index for node in own.nodes):
        yield (
            "* It was computed from tensors that the loss reaches, but the loss was not computed "
            "from it."
        )


def _comparable(a: Tensor, b: Tensor) -> bool:
    strided = a.layout == torch.strided and b.layout == torch.strided
    return strided and a.device == b.device and a.numel() == b.numel() > 0


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return _comparable(a, b) and a.data_ptr() == b.data_ptr()


def _same_values(a: Tensor, b: Tensor) -> bool:
    """Whether ``b`` has the values of ``a``, or their opposites as a learning rate may."""
    if not _comparable(a, b) or a.is_complex() != b.is_complex():
        return False
    a, b = a.detach().reshape(-1), b.detach().reshape(-1).to(a.dtype)
    if bool((a == 0).all()) or bool((a.abs() == 1).all()):
        return False  # zeros and ones prove nothing
    return torch.equal(a, b) or torch.equal(a, -b)


def _constants(found: Extraction, tensor: Tensor) -> Iterator[str]:
    """Find operations that compute with its values but not with its graph."""
    alias: collections.Counter[str] = collections.Counter()
    equal: collections.Counter[str] = collections.Counter()
    for position in _in_order(found):
        for _, saved in saved_tensors(found.walk.nodes[position]):
            if not isinstance(saved, Tensor) or saved.requires_grad:
                continue
            if _same_memory(saved, tensor):
                alias[_where(found, position)] += 1
            elif _same_values(tensor, saved):
                equal[_where(found, position)] += 1
    if alias:
        yield (
            "* Detached: its values enter as a constant, cut off by .detach(), .data, "
            f"stop_gradient or torch.no_grad(), at {words.listed(alias)}."
        )
    if equal:
        yield (
            f"* A constant with the same values enters at {words.listed(equal)}: a copy without "
            "graph (clone().detach(), deepcopy, extract_state_dict(by='deepcopy'), "
            "torch.tensor(x)) or, for a single number, .item() or float()."
        )


def _other_leaves(found: Extraction, tensor: Tensor) -> Iterator[str]:
    """Find leaves of the graph that are the tensor in another guise."""
    for key, unit in enumerate(found.units):
        leaf = unit.tensor
        if unit.kind != "leaf" or leaf is None or leaf.shape != tensor.shape:
            continue
        name = repr(unit.names[0]) if unit.names else f"a leaf of shape {tuple(leaf.shape)}"
        users = [b for a, b in found.graph.edges if a == key]
        first = found.graph.nodes[min(users)].label if users else "the loss"
        if _same_memory(leaf, tensor):
            yield (
                f"* The loss reaches {name} instead (it enters {first}), another tensor in the "
                "same memory: a detached alias, as stop_gradient, detach().requires_grad_() and "
                "nn.Parameter(x) make."
            )
        elif _same_values(tensor, leaf):
            yield (
                f"* The loss reaches {name} instead (it enters {first}), a copy with the same "
                "values: deepcopy, extract_state_dict(by='deepcopy') or module_clone make copies "
                "without graph; by='copy' keeps it."
            )


def _numbers(found: Extraction, tensor: Tensor) -> Iterator[str]:
    """Find fused steps that took a number equal to the tensor as a hyperparameter."""
    if tensor.numel() != 1 or tensor.is_complex():
        return
    steps = [s for s in _steps(found) if s.fused and words.took_the_number(found, s, tensor)]
    if steps:
        yield words.number_cut(steps, tensor)


def _cut_steps(found: Extraction) -> Iterator[str]:
    """Tell where the graph of the steps is cut."""
    approximate = [step for step in _steps(found) if step.first_order]
    if approximate:
        yield words.first_order(approximate)
    for step in _steps(found):
        if step.is_cut:
            yield words.weights_cut(step)
        if step.constant_slots and step.count is not None and step.count > 1:
            yield words.slots_cut(step)


def _no_steps(found: Extraction) -> Iterator[str]:
    if not found.walk.steps:
        yield (
            "* No optimizer step lies before the loss. It was computed before the steps, with "
            "another network, or after the initial weights were put back (outside of an inner_loop "
            "block, by recover_state_dict); or the steps ran under torch.no_grad() or were cut off "
            "by stop_gradient."
        )


def _integers(found: Extraction) -> Iterator[str]:
    """Name the integers and booleans that the graph has seen: nothing flows through them."""
    seen: collections.Counter[str] = collections.Counter()
    for position in _in_order(found):
        for name, saved in saved_tensors(found.walk.nodes[position]):
            if not isinstance(saved, Tensor) or not saved.dim():
                continue
            if not _flows(saved):
                seen[f"{_where(found, position)}: {name} of {dtype_name(saved)}"] += 1
            elif not saved.requires_grad and one_hot_rows(saved) is not None:
                seen[f"{_where(found, position)}: {name}, one-hot"] += 1
    if seen:
        yield (
            "* Nothing flows through integers and booleans, as argmax, sorting, comparing and "
            "rounding give them. If it only decides those, it is not reached: "
            f"{words.listed(seen)}."
        )


def _flows(saved: Tensor) -> bool:
    return saved.is_floating_point() or saved.is_complex()
