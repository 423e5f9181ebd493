"""Tensors of the graph whose values enter it a second time, without their history."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from torchopt.visual.operations import is_builtin, own_saved_tensors
from torchopt.visual.walk import Walk


#: A tensor in the graph: autograd node and output number.
Output = tuple[int, int]

#: Storage -> first byte of a tensor in it, the one after its last, and where it is in the graph.
_Sources = dict[int, list[tuple[int, int, Output]]]


@dataclass(frozen=True)
class Alias:
    """A detached alias: the same memory without the history.

    Attributes:
        source: The tensor that it is an alias of.
        position: The operation that computes with it, or the leaf that it is.
        is_leaf: Whether it is a leaf, as ``detach().requires_grad_()`` makes one.
    """

    source: Output
    position: int
    is_leaf: bool


def detached_aliases(found: Walk, more: Iterable[Tensor] = ()) -> list[Alias]:
    """Return the detached aliases of tensors that the graph leads through.

    What operations have saved is compared by its memory. That is alive, so the same memory is the
    same tensor, or a part of it. Functions written in Python may save what they like, and are not
    asked, nor are tensors that hooks bring back (``checkpoint``, ``save_on_cpu``) if torch tells.

    Args:
        found: The graph.
        more: Tensors of the graph that no operation may have saved, such as named ones.
    """
    sources: _Sources = collections.defaultdict(list)
    constants: list[tuple[int, Tensor]] = []
    kept = []  # or another tensor might get the memory meanwhile
    leaves = _leaves(found)

    def note(tensor: Tensor) -> None:
        if tensor.grad_fn is not None:
            position = found.index.get(tensor.grad_fn)
        else:
            position = leaves[id(tensor)][0] if id(tensor) in leaves else None
        if position is not None:
            _note(found, tensor, (position, tensor.output_nr), sources)

    for tensor in more:
        note(tensor)
    for _, leaf in leaves.values():
        note(leaf)
    for position, node in enumerate(found.nodes):
        for tensor in own_saved_tensors(node):
            kept.append(tensor)
            if tensor.requires_grad:
                note(tensor)
            elif is_builtin(node):
                constants.append((position, tensor))
    return list(dict.fromkeys(_matches(found, sources, constants, leaves.values())))


def _leaves(found: Walk) -> dict[int, tuple[int, Tensor]]:
    """Return the leaves, with where they are, by their identity."""
    positions = (p for p, sources in enumerate(found.inputs) if not sources)
    leaves = ((p, getattr(found.nodes[p], "variable", None)) for p in positions)
    return {id(leaf): (p, leaf) for p, leaf in leaves if isinstance(leaf, Tensor)}


def _matches(
    found: Walk,
    sources: _Sources,
    constants: list[tuple[int, Tensor]],
    leaves: Iterable[tuple[int, Tensor]],
) -> Iterator[Alias]:
    for position, tensor in constants:
        for source in _holders(tensor, sources):
            yield Alias(source, position, False)
    for position, leaf in leaves:
        for source in _holders(leaf, sources):
            if not _is_view(found, source, (position, 0)):
                yield Alias(source, position, True)


def _note(found: Walk, tensor: Tensor, output: Output, sources: _Sources) -> None:
    where = memory_of(tensor)
    if where is None:
        return
    known = sources[where[0]]
    if not any(
        _is_view(found, output, other) for begin, end, other in known if (begin, end) == where[1:]
    ):
        known[:] = [entry for entry in known if not _is_view(found, entry[2], output)]
        known.append((where[1], where[2], output))


def _is_view(found: Walk, view: Output, base: Output) -> bool:
    """Whether a tensor is another one, or was computed from it by few operations, as views are."""
    level = {view}
    for _ in range(8):
        if base in level:
            return True
        level = {
            (source, number)
            for position, _ in level
            for source, number in found.inputs[position]
            if source is not None
        }
    return False


def _holders(tensor: Tensor, sources: _Sources) -> Iterator[Output]:
    where = memory_of(tensor)
    if where is not None:
        for begin, end, source in sources.get(where[0], ()):
            if begin <= where[1] and where[2] <= end:
                yield source


def memory_of(tensor: Tensor) -> tuple[int, int, int] | None:
    """Return the storage of a tensor, and its first byte and the one after its last there."""
    if tensor.layout != torch.strided or tensor.device.type == "meta" or not tensor.numel():
        return None
    try:
        storage = tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # tensors that have none, such as DTensor
        return None
    if not storage:
        return None
    size = tensor.element_size()
    begin = int(tensor.storage_offset()) * size
    last = sum((int(n) - 1) * int(k) for n, k in zip(tensor.shape, tensor.stride()))
    return storage, begin, begin + (last + 1) * size
