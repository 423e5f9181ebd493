"""What a watched step writes to in place, found by value, and put back.

Version counters do not tell of everything: BatchNorm's kernel writes to running statistics without
raising theirs, and ``tensor.data`` has a counter of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from torchopt.base.torch_internals import (
    get_unwrapped,
    is_functorch_wrapped_tensor,
    temporarily_clear_interpreter_stack,
)


#: Functions that write to what they are given after their input, and do not say so by their name.
_SILENT = frozenset({"batch_norm", "instance_norm", "native_batch_norm", "embedding_renorm"})
_NO_WRITES = frozenset({"requires_grad_", "retain_grad", "__index__", "__invert__", "__int__"})


def bare(tensor: Tensor) -> Tensor:
    """Return a tensor without the wraps of all levels of torch.func."""
    while is_functorch_wrapped_tensor(tensor):
        tensor = get_unwrapped(tensor)
    return tensor


def same(a: Any, b: Any) -> bool:
    """Whether two leaves are equal; ``nan`` is equal to itself."""
    if not isinstance(a, Tensor):
        return bool(a == b) or (a != a and b != b)
    with temporarily_clear_interpreter_stack(), torch.no_grad():
        a, b = bare(a).detach(), bare(b).detach()
        if torch.equal(a, b):
            return True
        return bool(((a == b) | ((a != a) & (b != b))).all())


def by_rounding(a: Any, b: Any) -> bool:
    """Whether two leaves differ by no more than rounding in one step."""
    if not isinstance(a, Tensor) or not (a.is_floating_point() or a.is_complex()):
        return same(a, b)
    with temporarily_clear_interpreter_stack(), torch.no_grad():
        a, b = bare(a).detach(), bare(b).detach()
        if a.numel() == 0 or torch.equal(a, b):
            return True
        bound = torch.finfo(a.dtype).eps ** (1 / 3)
        finite = a.isfinite()
        largest = float(torch.where(finite, a, 0).abs().max())
        return torch.allclose(a, b, bound, bound * largest, equal_nan=True)


def written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the arguments that a call may write to; an empty tuple where there are none."""
    name = getattr(func, "__name__", "")
    if name in _SILENT:
        return args[1:], kwargs
    if kwargs.get("out") is not None:
        return (kwargs["out"],)
    if name in _NO_WRITES or not name.endswith("_"):
        return ()
    plain = not name.endswith("__")  # add_, and not __add__
    return args if plain or name in ("__setitem__", "__set__") or name.startswith("__i") else ()


class Writes:
    """Copies of tensors from outside, made before something is first written to them."""

    def __init__(self) -> None:
        self.copies: list[tuple[Tensor, Tensor]] = []
        self._known: dict[int, list[Tensor]] = {}  # by where their memory is
        self._filed = 0  # how many there are
        self._copied: set[int] = set()

    def before(self, targets: Iterable[Tensor], read: Iterable[Tensor]) -> None:
        """Copy those tensors that have been read and share memory with what is written to."""
        for tensor in itertools.islice(read, self._filed, None):
            self._known.setdefault(_memory(tensor), []).append(tensor)
            self._filed += 1
        for target in targets:
            for tensor in self._known.get(_memory(target), ()):
                if id(tensor) not in self._copied and _memory(tensor):
                    self._copied.add(id(tensor))
                    with temporarily_clear_interpreter_stack(), torch.no_grad():
                        self.copies.append((tensor, bare(tensor).detach().clone()))

    def changed(self) -> Iterator[Tensor]:
        """Yield the tensors that hold other values now."""
        return (tensor for tensor, copy in self.copies if not same(tensor, copy))

    def undo(self) -> None:
        """Let them hold what they held; not counted as a change, for it is none."""
        with temporarily_clear_interpreter_stack(), torch.no_grad():
            for tensor, copy in self.copies:
                if not same(tensor, copy):
                    bare(tensor).data.copy_(copy)


def _memory(tensor: Tensor) -> int:
    """Return where the memory of a tensor is, or 0 if that means nothing."""
    try:
        return bare(tensor).untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse, fake, spread over processes
        return 0
