"""Choices by a tensor: argmax, a comparison, rounding; nothing flows through what they give."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from torchopt.visual import words
from torchopt.visual.graph import Extraction
from torchopt.visual.operations import (
    attributes,
    is_builtin,
    operation_label,
    own_saved_tensors,
)
from torchopt.visual.walk import walk


#: What chooses by a tensor: what it gives, and what has a gradient instead.
_WAYS = {
    "argmax": ("the argmax", "weigh by softmax"),
    "argmin": ("the argmin", "weigh by the softmax of its negative"),
    "sorting": ("the sorting order", "weigh by softmax"),
    "a comparison": ("the sign", "use a sigmoid"),
    "rounding": ("the rounded values", "do not round"),
}


def choices(
    found: Extraction,
    tensor: Tensor,
    named: Sequence[tuple[str, Tensor]],
    perhaps: bool = False,
) -> list[str]:
    """Return lines about indices and masks in the graph that a tensor has chosen.

    They are told by their values, which are compared with what argmax and its kin make of the
    tensor, and of the tensors with names that were computed from it.

    Args:
        found: The graph of a loss.
        tensor: The tensor.
        named: All tensors that have names.
        perhaps: Tell, if there is nothing else, of single numbers too, which may agree by chance.
    """
    taken = list(_taken(found))
    sure: dict[str, None] = {}
    other: dict[str, None] = {}
    for whose, candidate in _candidates(tensor, named) if taken else ():
        made = list(_made(candidate))
        places: dict[tuple[str, bool], list[str]] = collections.defaultdict(list)
        for where, chosen in taken:
            how = next((how for how, values in made if _same(chosen, values)), None)
            if how is not None:
                places[how, chosen.numel() > 2].append(where)
        for (how, many), where in places.items():
            (sure if many else other)[_line(how, where, whose, many)] = None
    return list(sure) or (list(other) if perhaps else [])


def _line(how: str, where: Sequence[str], whose: str, many: bool) -> str:
    at = words.listed(collections.Counter(where))
    chance = "" if many else ", unless they agree by chance"
    what, instead = _WAYS[how]
    return (
        f"* A path through {how}: what chooses at {at} is {what} of {whose}{chance}. Those are "
        f"integers or booleans, and nothing flows through them: {instead} instead, pass the "
        "gradient straight through (hard + soft - soft.detach()), or estimate it "
        "(torchopt.diff.zero_order)."
    )


def _candidates(
    tensor: Tensor, named: Sequence[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    own = [name for name, other in named if other is tensor]
    yield (repr(own[0]) if own else "the tensor"), tensor
    for name, other in named:
        if other is tensor or other.grad_fn is None:
            continue
        leaves = {id(getattr(node, "variable", None)) for node in walk([other.grad_fn]).nodes}
        if id(tensor) in leaves:
            yield f"{name!r}, which was computed from it", other


def _taken(found: Extraction) -> Iterator[tuple[str, Any]]:
    """Yield indices, masks and one-hot rows that operations compute with, and where."""
    for position, node in enumerate(found.walk.nodes):
        if found.walk.step_of[position] >= 0 or not is_builtin(node):
            continue
        where = words.place(found, position)
        for saved in own_saved_tensors(node):
            if not (saved.is_floating_point() or saved.is_complex()):
                yield where, saved
            elif not saved.requires_grad and (rows := one_hot_rows(saved)) is not None:
                yield where, rows
    places = [p for p, node in enumerate(found.walk.nodes) if _is_select(node)]
    indices = {p: _index(found.walk.nodes[p]) for p in places if found.walk.step_of[p] < 0}
    if len(set(indices.values())) == 1:  # several say that entries are taken one after the other
        for position, index in indices.items():
            yield words.place(found, position), torch.tensor(index)


def _index(node: Any) -> int:
    """Return which entry ``x.select(dim, index)`` takes, counted from the first."""
    saved = attributes(node)
    return saved["index"] % max(1, saved["self_sym_sizes"][saved["dim"]])


def _is_select(node: Any) -> bool:
    named = is_builtin(node) and operation_label(node.name()) == "Select"
    return named and {"index", "dim", "self_sym_sizes"} <= attributes(node).keys()


def one_hot_rows(constant: Tensor) -> Tensor | None:
    """Return the positions of the ones, if each row is zero but for a one."""
    if constant.dim() != 2 or constant.shape[1] < 2 or constant.layout != torch.strided:
        return None
    values = constant.detach()
    ones = (values == 1).sum(1) == 1
    zeros = (values == 0).sum(1) == values.shape[1] - 1
    return values.argmax(1) if bool((ones & zeros).all()) else None


def _made(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield what choosing by a tensor gives, and what it is called."""
    values = tensor.detach()
    if values.is_complex() or not values.numel() or values.layout != torch.strided:
        return
    if values.numel() > 1:
        yield "argmax", values.argmax()
        yield "argmin", values.argmin()
    for dim in range(values.dim()):
        if values.shape[dim] < 2:
            continue
        order = values.argsort(dim)
        yield "argmax", values.argmax(dim)
        yield "argmin", values.argmin(dim)
        yield "sorting", order
        yield "sorting", order.flip(dim)
    for mask in (values > 0, values >= 0):
        if bool(mask.any()) and not bool(mask.all()):
            yield "a comparison", mask
            yield "a comparison", ~mask
    for rounded in (values.round().long(), values.long()):
        if bool(rounded.any()):  # zeros prove nothing
            yield "rounding", rounded


def _same(chosen: Tensor, made: Tensor) -> bool:
    """Whether two are the same choice, the number of their dimensions aside."""
    if chosen.device != made.device or (chosen.dtype == torch.bool) != (made.dtype == torch.bool):
        return False
    if chosen.numel() != made.numel():
        return False
    return torch.equal(chosen.reshape(-1).to(made.dtype), made.reshape(-1))
