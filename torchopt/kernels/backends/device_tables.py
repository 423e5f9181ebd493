"""Small tables for kernels on GPUs: copied there without waiting, and kept."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor


#: Tables that are kept. A training loop uses some again and again: its gradients, parameters and
#: slots come to lie at the same few addresses.
KEPT = 256

#: Tables that stand in one buffer begin at multiples of so many bytes, which Triton makes use of.
ALIGNMENT = 16

#: Bytes of pinned memory that are held ready for the next capture, at least.
RESERVE = 1 << 20


class _Reserve:
    """Pinned memory for copies that CUDA graphs replay: handed out once, never taken back.

    It is allocated before a capture: during one, older versions of torch cannot (they query events,
    which CUDA forbids then). A graph does not tell when it is destroyed, and until then reads this
    memory at every replay.
    """

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
        self._used = 0

    def prepare(self, size: int) -> None:
        """Have memory ready for a few tables of a size."""
        wanted = max(RESERVE, 4 * size)
        if not self._blocks or self._blocks[-1].numel() - self._used < wanted:
            self._add(2 * wanted)

    def take(self, size: int) -> Tensor:
        """Return memory that nobody else has or will have."""
        if not self._blocks or self._blocks[-1].numel() - self._used < size:
            self._add(max(RESERVE, size))
        self._used += size
        return self._blocks[-1][self._used - size : self._used]

    def _add(self, size: int) -> None:
        self._blocks.append(_pinned(size))
        self._used = 0


def _pinned(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


_reserve = _Reserve()
_kept: OrderedDict[Any, Tensor] = OrderedDict()
_lock = threading.Lock()  # the backward pass runs in threads of its own


def tables_on(
    device: torch.device, contents: Mapping[Hashable, Callable[[], Tensor]]
) -> list[Tensor]:
    """Return tables on a GPU, for kernels of its current stream.

    Tables are kept by stream: another one would have to wait for the copy. What a graph captures is
    not kept, since its copy happens at each replay and its memory is the graph's; and a capture
    does not use what is kept, since that is forgotten at some time.

    Args:
        device: The GPU, which must be the current device.
        contents: For each table what it is known by, and the function that makes it on the host.
    """
    if torch.cuda.is_current_stream_capturing():
        with _lock:
            return _copies(device, [make() for make in contents.values()], _reserve.take)
    stream = torch.cuda.current_stream(device).cuda_stream
    keys = [(device.index, stream, content) for content in contents]
    with _lock:
        missing = [k for k, key in enumerate(keys) if key not in _kept]
        if missing:
            made = list(contents.values())
            copies = _copies(device, [made[k]() for k in missing], _staging)
            _kept.update(zip([keys[k] for k in missing], copies))
        for key in keys:
            _kept.move_to_end(key)
        while len(_kept) > KEPT:
            _kept.popitem(last=False)
        return [_kept[key] for key in keys]


def _staging(size: int) -> Tensor:
    """Return memory that torch gives to others once the copy from it is done."""
    _reserve.prepare(size)
    return _pinned(size)


def _copies(
    device: torch.device, tables: list[Tensor], allocate: Callable[[int], Tensor]
) -> list[Tensor]:
    """Copy tables by one transfer."""
    ends, end = [], 0
    for table in tables:
        end += -(-table.nbytes // ALIGNMENT) * ALIGNMENT
        ends.append(end)
    host = allocate(end)
    starts = [0, *ends[:-1]]
    for table, start in zip(tables, starts):
        host[start : start + table.nbytes].copy_(table.view(torch.uint8))
    there = host.to(device, non_blocking=True)
    return [
        there[start : start + table.nbytes].view(table.dtype)
        for table, start in zip(tables, starts)
    ]
