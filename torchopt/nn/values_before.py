"""Values and flags of tensors at the start of a block, to put them back where they changed."""

from __future__ import annotations

import ctypes
import itertools
import operator
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchopt.base.torch_internals import flatten_dense_tensors
from torchopt.nn.parameters import FastWeight


_COMPARABLE = {Tensor, nn.Parameter, FastWeight}
_version_of = operator.attrgetter("_version")
_memcmp: Any = ctypes.CDLL(None).memcmp if os.name == "posix" else ctypes.cdll.msvcrt.memcmp
_memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
_SMALL = 1 << 16  # elements; tensors below are copied and compared together, in one call


class ValuesBefore:
    """Values and flags of parameters.

    Changes in place show in the tensors' versions; those by way of ``.data`` do not, so that values
    are compared as well. What has not changed is not written: that would count as a change, and
    autograd would refuse the graph that holds the parameter.

    Args:
        tensors: The parameters, each once.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._flags = [(t, t.requires_grad) for t in tensors]
        together = [list(tensors)] if _are_alike(tensors) else _batches(tensors)
        self._batches = [_Batch(batch) for batch in together]

    def undo(self) -> list[Tensor]:
        """Put values and flags back; return the tensors whose values had changed."""
        changed = [batch.undo() for batch in self._batches if batch.differs()]
        for tensor, flag in self._flags:
            if tensor.requires_grad != flag and tensor.is_leaf:
                tensor.requires_grad_(flag)
        return list(itertools.chain.from_iterable(changed))


def _are_alike(tensors: Sequence[Tensor]) -> bool:
    """Whether all can be copied together: the usual case, seen at little cost."""
    return (
        _COMPARABLE.issuperset(map(type, tensors))
        and len({t.dtype for t in tensors}) == 1
        and {t.device.type for t in tensors} == {"cpu"}
        and {t.layout for t in tensors} == {torch.strided}
        and all(map(Tensor.is_contiguous, tensors))
        and max(map(Tensor.numel, tensors)) < _SMALL
        and not any(map(Tensor.is_inference, tensors))
    )


def _batches(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Return the tensors that have values, those together that can be copied in one call."""
    batches: dict[object, list[Tensor]] = {}
    for t in tensors:
        if nn.parameter.is_lazy(t) or t.is_inference() or t.is_meta:
            continue
        small = t.numel() < _SMALL and _is_plain(t) and t.is_contiguous()
        batches.setdefault((t.dtype, t.device) if small else id(t), []).append(t)
    return list(batches.values())


class _Batch:
    """Tensors of one dtype and device, and a copy of their values; or a single one of any kind."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors
        self._plain = _is_plain(tensors[0])
        self._memory = list(map(Tensor.detach, tensors))
        self._copy = self._together() if len(tensors) > 1 else self._memory[0].clone()
        self._versions = list(map(_version_of, tensors))
        self._addresses = self._address()

    def differs(self) -> bool:
        """Whether any tensor has been changed, counted or not."""
        if list(map(_version_of, self.tensors)) != self._versions:
            return True
        if self._address() != self._addresses:
            return True
        if not self._plain or (self._copy.is_cuda and torch.cuda.is_current_stream_capturing()):
            return False  # told by the version alone: no memory, or nobody may wait for it
        if self._copy.is_cpu and self._memory[0].is_contiguous():
            return not self._same_bytes()
        present = self._together() if len(self._memory) > 1 else self._memory[0]
        return not torch.equal(present, self._copy)

    def _same_bytes(self) -> bool:
        """Compare contiguous tensors of the CPU with their copies where they are."""
        begin, size = self._copy.data_ptr(), self._copy.element_size()
        for address, memory in zip(self._addresses, self._memory):
            count = size * memory.numel()
            if _memcmp(address, begin, count):
                return False
            begin += count
        return True

    def undo(self) -> list[Tensor]:
        """Write the tensors that have changed; return them."""
        changed = []
        addresses = self._address()
        for k, (tensor, memory, values) in enumerate(
            zip(self.tensors, self._memory, self._values())
        ):
            moved = addresses[k] != self._addresses[k]
            counted = tensor._version != self._versions[k]
            if not (moved or counted or (self._plain and _differ(memory, values))):
                continue
            changed.append(tensor)
            with torch.no_grad():
                if moved:  # tensor.data = ..., module.double()
                    tensor.data = memory
                tensor.copy_(values)
            self._versions[k] = tensor._version
        return changed

    def _address(self) -> list[object]:
        if not self._plain:
            return [None] * len(self.tensors)
        return list(map(Tensor.data_ptr, self.tensors))

    def _together(self) -> Tensor:
        return flatten_dense_tensors(self._memory)

    def _values(self) -> list[Tensor]:
        if len(self._memory) == 1:
            return [self._copy]
        flat = self._copy.split([t.numel() for t in self._memory])
        return [part.view(t.shape) for part, t in zip(flat, self._memory)]


def _is_plain(tensor: Tensor) -> bool:
    """Whether the tensor has memory that can be compared."""
    return type(tensor) in _COMPARABLE and tensor.layout == torch.strided


def _differ(memory: Tensor, values: Tensor) -> bool:
    equal = (memory == values) | ((memory != memory) & (values != values))
    return not bool(equal.all())
