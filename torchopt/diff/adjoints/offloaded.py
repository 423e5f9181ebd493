"""Record a loop, and keep what it saves in the memory of the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from torchopt.base.misuse.given import given
from torchopt.base.torch_internals import peek_interpreter_stack
from torchopt.diff.adjoints.block import InBlock
from torchopt.diff.replay.loop import Loop


@dataclass(frozen=True)
class Offloaded:
    """Record all steps of a loop, and keep what they save for the backward pass on the CPU.

    The derivative is that of :class:`torchopt.diff.Unrolled`, at every order. It pays where the
    loop runs on a GPU: each saved tensor is copied to the CPU, and back in the backward pass. A
    loop on the CPU runs as with ``Unrolled()``.

    Args:
        pin_memory: Copy to pinned memory, which is faster and which the system cannot swap out.

    Raises:
        TypeError: If ``pin_memory`` is neither.
        RuntimeError: From ``unroll``, if the step calls ``torch.func.grad`` or is itself inside
            ``torch.func``, and where ``torch.compile`` compiles: PyTorch lets nobody handle what
            is saved there. A step can call ``torch.autograd.grad`` instead.

    Example:
        >>> import torch
        >>> from torchopt.diff import Offloaded, unroll
        >>> w0 = torch.tensor(2.0, requires_grad=True)
        >>> w, _ = unroll(lambda w, _: (w * w, None), w0, length=2, adjoint=Offloaded())
        >>> torch.autograd.grad(w, w0)  # 4 w ** 3
        (tensor(32.),)
    """

    pin_memory: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.pin_memory, bool):
            raise TypeError(f"pin_memory must be True or False, got {given(self.pin_memory)}.")

    def in_block(self) -> InBlock:
        """Refuse: a loss is computed in the block as well, where nobody would handle it.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"A block with adjoint={self!r} would leave on the GPU what the losses save. Write the "
            "block inside of `with torch.autograd.graph.save_on_cpu():`, or take "
            'Checkpointed(store="cpu").'
        )

    def run(self, loop: Loop) -> tuple[list[Any], list[Any]]:
        """Run the loop with hooks on what is saved."""
        if not torch.is_grad_enabled():
            return loop.plain()
        if torch.compiler.is_compiling() or peek_interpreter_stack() is not None:
            raise RuntimeError(self._refusal())
        try:
            with torch.autograd.graph.save_on_cpu(pin_memory=self.pin_memory):
                return loop.plain()
        except RuntimeError as error:
            if "saved tensor hooks" not in str(error):
                raise
            raise RuntimeError(self._refusal()) from error

    def _refusal(self) -> str:
        return (
            f"unroll(..., adjoint={self!r}) handles what PyTorch saves, which it allows neither "
            "inside torch.func, nor around torch.func.grad in the step, nor while compiling. Let "
            "the step call torch.autograd.grad(..., create_graph=True), or use "
            'adjoint=Checkpointed(store="cpu").'
        )
