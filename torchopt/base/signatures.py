"""Lists of tensors like others that were found good, recognised in one native call.

The checks of a step look at class, shape, strides, dtype, layout and flags of many tensors: in
Python a call for each. The guards of torch's compiler compare them all in one call. They are no
public interface, and may be absent from a torch: nothing is recognised then, and all is checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from torchopt.base.torch_internals import TensorGuards as _Guards


KINDS = 4  # first step and later ones, with and without grad


class KnownSignatures:
    """Kinds of lists of tensors: the same number, and each as the one at its place was.

    Of a tensor the kind is its class, dispatch keys (device type, layout, conjugate and negative
    bits), dtype, device, ``requires_grad``, sizes and strides. Tensors are not kept.

    Args:
        kinds: How many are remembered.
    """

    def __init__(self, kinds: int = KINDS) -> None:
        self._kinds = kinds
        self._known: list[tuple[int, Any]] = []

    def knows(self, tensors: Sequence[Tensor]) -> bool:
        """Whether such a list was added; ``False`` says that it must be checked, no more."""
        return any(n == len(tensors) and kind.check(*tensors) for n, kind in self._known)

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Remember a list that has been checked; the oldest one is forgotten."""
        if _Guards is None or not tensors:
            return
        kind = _Guards(
            *tensors,  # entries that are None would be free to change
            dynamic_dims_sizes=[list(x.shape) for x in tensors],
            dynamic_dims_strides=[list(x.stride()) for x in tensors],
        )
        self._known = [*self._known[1 - self._kinds :], (len(tensors), kind)]
