"""Slots of several parameters in one flat tensor, taken apart only when somebody looks.

A differentiable optimizer hands its slots from step to step. Kept in one tensor for all parameters
they cost one allocation and one edge of the graph instead of one for each parameter. Entries stand
in the order of contiguous tensors; parameters with another layout (channels-last) are not packed.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchopt.core.unpacking import unpacked


class Packing:
    """Where each of several tensors stands in a flat one.

    Attributes:
        shapes: The shape of each tensor.
        sizes: How many entries each has.
        offsets: Where each begins, in entries.
        total: How many entries the flat tensor has.
        cached: What an update over it found out (torchopt.kernels.cached_call), for the next one.
    """

    cached: Any = None

    def __init__(self, shapes: Sequence[torch.Size]) -> None:
        self._zeros: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self.shapes = list(shapes)
        self.shapes_key = tuple(self.shapes)
        self.sizes = [shape.numel() for shape in self.shapes]
        self.offsets = [0, *itertools.accumulate(self.sizes)][:-1]
        self.total = sum(self.sizes)
        self._places: dict[int, list[int]] = {}

    def places(self, size: int) -> list[int]:
        """Return where each tensor begins, in bytes, if an entry has so many."""
        if size not in self._places:
            self._places[size] = [size * offset for offset in self.offsets]
        return self._places[size]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "cached"}

    def unpack(self, flat: Tensor) -> list[Tensor]:
        """Return views of the flat tensor, connected to it by the graph."""
        with torch.enable_grad():
            parts = flat.split(self.sizes)
            return [part.view(shape) for part, shape in zip(parts, self.shapes)]

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return a flat tensor with the entries of all."""
        return torch.cat([x.reshape(-1) for x in tensors])

    def filled(self, value: float, dtype: torch.dtype, device: torch.device) -> Packed:
        """Return slots that are one number everywhere; zeros take no memory."""
        if value != 0:
            return Packed(torch.full((self.total,), value, dtype=dtype, device=device), self)
        key = dtype, device
        if key not in self._zeros:
            self._zeros[key] = torch.zeros((), dtype=dtype, device=device)
        return Packed(self._zeros[key].expand(self.total), self)

    def is_zero(self, flat: Tensor) -> bool:
        """Whether a flat tensor is the zeros of :meth:`filled`, which nobody writes to."""
        zero = self._zeros.get((flat.dtype, flat.device))
        return zero is not None and flat.data_ptr() == zero.data_ptr()


@dataclasses.dataclass(eq=False, repr=False)
class Packed:
    """A list of tensors that is one flat tensor until it is looked at.

    No subclass of ``Sequence``: to ask for an instance of that is a call of Python, at each step.
    """

    flat: Tensor
    packing: Packing
    _tensors: list[Tensor] | None = dataclasses.field(default=None, init=False)

    def readable(self) -> Packed | list[Any]:
        """Return the same with its entries one after the other in memory; zeros have none."""
        if self.flat.is_contiguous():
            return self
        if self.packing.is_zero(self.flat):
            return [None] * len(self.packing.sizes)
        return Packed(self.flat.contiguous(), self.packing)

    def tensors(self) -> list[Tensor]:
        """Return the tensors: copies, so that each can be detached or changed by itself."""
        if self._tensors is None:
            with torch.enable_grad():
                self._tensors = unpacked(self.flat, self.packing)
        return self._tensors

    def __len__(self) -> int:
        return len(self.packing.sizes)

    def __getitem__(self, index: Any) -> Any:
        return self.tensors()[index]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.tensors())

    def unread(self) -> Packed:
        """Return the same, not yet looked at: its tensors will be copies of their own."""
        return Packed(self.flat, self.packing)

    def detach(self) -> Packed:
        """Return the same without history."""
        return Packed(self.flat.detach(), self.packing)


@dataclasses.dataclass(eq=False, repr=False)
class PackedDict(Mapping):
    """The slots of named parameters, over a :class:`Packed` list."""

    names: tuple[str, ...]
    packed: Packed

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        return self.packed[self.names.index(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
