"""Let a graph that was recorded with running statistics keep them as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


_NAMES = ("running_mean", "running_var")
_KINDS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d),
)


def shielded(modules: Iterable[nn.Module]) -> Callable[[], None]:
    """Let BatchNorm in eval mode read copies of its running statistics; return how to end that.

    The graph of such a call has saved them. In training mode BatchNorm writes to them by a kernel
    that does not raise their version, so that a backward pass after it would compute with other
    numbers, and nobody would say so.
    """
    shields = [_Shield(m) for m in modules if isinstance(m, _KINDS)]

    def end() -> None:
        for shield in shields:
            shield.remove()

    return end


class _Shield:
    """Two hooks of one module, before and after its forward."""

    def __init__(self, module: nn.Module) -> None:
        self.held: dict[str, tuple[Tensor, Tensor]] = {}  # by name: the statistics, and the copy
        self.handles = [
            module.register_forward_pre_hook(self.before),
            module.register_forward_hook(self.after, always_call=True),
        ]

    def before(self, module: nn.Module, args: Any) -> None:
        if module.training or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        for name in _NAMES:
            buffer = module._buffers.get(name)
            if buffer is not None and not nn.parameter.is_lazy(buffer):
                copy = buffer.clone()
                self.held[name] = buffer, copy
                module._buffers[name] = copy

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        for name, (buffer, copy) in self.held.items():
            if module._buffers.get(name) is copy:
                module._buffers[name] = buffer
        self.held.clear()

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
