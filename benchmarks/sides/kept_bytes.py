"""How much memory a recorded computation keeps for its backward pass."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor


def kept_bytes(
    inputs: Sequence[Tensor], compute: Callable[[], list[Tensor]]
) -> dict[str, list[float]]:
    """Return the bytes kept beyond inputs and outputs, counted in two ways.

    ``saved`` are the tensors that autograd saves; ``allocated`` is what the allocator has handed
    out and not got back, less the outputs. The latter also sees what a node of the graph keeps past
    autograd, and small numbers that are no saved tensors.
    """
    return {"saved": [_saved(inputs, compute)], "allocated": [_allocated(inputs, compute)]}


def _saved(inputs: Sequence[Tensor], compute: Callable[[], list[Tensor]]) -> float:
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = compute()
    return _bytes_beyond([*inputs, *outputs], saved)


def _allocated(inputs: Sequence[Tensor], compute: Callable[[], list[Tensor]]) -> float:
    # the outputs must live until the end: with them goes what their graph keeps
    with _quiet(), torch.autograd.profiler.profile(profile_memory=True) as profiled:
        outputs = compute()
    taken = sum(event.self_cpu_memory_usage for event in profiled.key_averages())
    return taken - _bytes_beyond(inputs, outputs)


def _bytes_beyond(known: Sequence[Tensor], tensors: Sequence[Tensor]) -> int:
    """Return the bytes of memory behind some tensors that is not behind the known ones."""
    sizes, others = _storages(tensors), _storages(known)
    return sum(size for address, size in sizes.items() if address not in others)


def _storages(tensors: Sequence[Tensor]) -> dict[int, int]:
    """Return address and bytes of all memory that stands behind the tensors."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drop what native code writes to stderr: the profiler reports its start and its end there."""
    before, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)
