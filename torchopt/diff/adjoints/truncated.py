"""Differentiate the last steps of a loop only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchopt.base import tree
from torchopt.base.misuse.given import given
from torchopt.base.torch_internals import peek_interpreter_stack
from torchopt.diff.adjoints.block import InBlock
from torchopt.diff.replay.loop import Loop
from torchopt.diff.replay.tape import Tape
from torchopt.diff.replay.thinning import Thinning
from torchopt.typing import PyTree


@dataclass(frozen=True)
class Truncated:
    r"""Differentiate the last ``last`` steps of a loop; the carry before them counts as constant.

    .. math::
        \frac{d c_T}{d \theta} \approx \sum_{t = T - k}^{T - 1}
            \Big(\prod_{s = t + 1}^{T - 1} \frac{\partial c_{s+1}}{\partial c_s}\Big)
            \frac{\partial c_{t+1}}{\partial \theta}

    Memory is that of :math:`k` steps. The derivative is biased, all the more the slower the loop
    forgets where it came from, and by the start it is zero (absent) unless :math:`k = T`. ``y`` of
    earlier steps is constant as well.

    Args:
        last: :math:`k`, at least 1; more steps than the loop has are all of them.

    Raises:
        TypeError: If ``last`` is no integer.
        ValueError: If it is less than 1.

    Example:
        >>> import torch
        >>> from torchopt.diff import Truncated, unroll
        >>> lr = torch.tensor(0.5, requires_grad=True)
        >>> step = lambda w, _: (w - lr * w, None)
        >>> w, _ = unroll(step, torch.tensor(1.0), length=3, adjoint=Truncated(last=1))
        >>> torch.autograd.grad(w, lr)  # -w before the last step; of all steps it is -0.75
        (tensor(-0.2500),)

    Reference:
        Shaban et al., Truncated Back-propagation for Bilevel Optimization, AISTATS 2019.
    """

    last: int

    def __post_init__(self) -> None:
        if not isinstance(self.last, int) or isinstance(self.last, bool):
            raise TypeError(f"last must be an integer, got {given(self.last)}.")
        if self.last < 1:
            raise ValueError(f"last must be >= 1, got {self.last}.")

    def in_block(self) -> InBlock:
        """Return a tape; which steps are the last is known when they are differentiated."""
        return InBlock(Tape(repr(self), Thinning(1), last=self.last))

    def run(self, loop: Loop) -> tuple[list[Any], list[Any]]:
        """Run the loop, and cut the graph before each step but the last ones."""
        first = loop.length - self.last  # of the steps that are differentiated

        def before(t: int, carry: PyTree) -> PyTree:
            return tree.tree_map(_cut, carry) if 0 < t <= first else carry

        def after(t: int, y: list[Any]) -> list[Any]:
            return [x.detach() if t < first and isinstance(x, Tensor) else x for x in y]

        return loop.plain(before, after)


def _cut(x: Any) -> Any:
    """Return a value without its history; it goes on requiring grad, as the step may expect."""
    if not isinstance(x, Tensor):
        return x
    if torch.compiler.is_compiling() or peek_interpreter_stack() is not None:
        return x.detach()
    return x.detach().requires_grad_(torch.is_grad_enabled() and x.requires_grad)
