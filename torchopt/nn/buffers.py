"""Run a network without leaving traces in its buffers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from torchopt.nn import moments
from torchopt.nn.parameters import modules_of


@contextlib.contextmanager
def keep_buffers(*modules: nn.Module) -> Iterator[None]:
    """Let networks work on copies of their buffers inside a ``with`` block.

    Use it for a second forward pass on the same batch, which must not count twice in running
    statistics (BatchNorm). The buffers themselves are never written to, so a graph through them
    stays valid; changes to the copies are discarded.

    Args:
        *modules: The networks.

    Raises:
        TypeError: If one is not a module.

    Example:
        >>> import torch, torchopt
        >>> norm = torch.nn.BatchNorm1d(2)
        >>> with torchopt.keep_buffers(norm):
        ...     y = norm(torch.randn(8, 2))
        >>> norm.num_batches_tracked
        tensor(0)
    """
    for module in modules:
        if not isinstance(module, nn.Module):
            raise TypeError(f"keep_buffers expects modules, got {type(module).__name__}.")
    found = {id(part): part for module in modules for part in modules_of(module)}
    held = [(part, name, x) for part in found.values() for name, x in part._buffers.items()]
    held = [(part, name, x) for part, name, x in held if x is not None]
    try:
        put_copies(found.values())
        yield
    finally:
        for part, name, buffer in held:
            if not nn.parameter.is_lazy(buffer) and part._buffers.get(name) is not buffer:
                moments.put(part, "_buffers", name, buffer)


def put_copies(modules: Iterable[nn.Module]) -> None:
    """Put copies of their buffers into modules; one that several share stays shared."""
    copies: dict[int, Tensor] = {}
    for module in modules:
        for name, buffer in module._buffers.items():
            if buffer is None or nn.parameter.is_lazy(buffer):
                continue
            if id(buffer) not in copies:
                copies[id(buffer)] = buffer.clone()
            moments.put(module, "_buffers", name, copies[id(buffer)])
