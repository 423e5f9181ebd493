"""Take the gradients inside of a loop for constants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from torchopt.diff.adjoints.block import InBlock
from torchopt.diff.replay.loop import Loop
from torchopt.diff.replay.watch import uncompiled


@dataclass(frozen=True)
class FirstOrder:
    r"""Record a loop in which every gradient that a step computes counts as constant.

    .. math::
        c_{t+1} = U(c_t, g_t), \qquad
        \frac{d c_{t+1}}{d c_t} \approx \frac{\partial U}{\partial c_t}, \qquad
        g_t = \nabla \ell(c_t) \text{ constant}

    No second derivative of an inner loss is computed or kept: of plain gradient descent the
    derivative by the start is the identity (FOMAML), and that by a learning rate is exact but for
    what it changes in later gradients. What acts through the inner loss alone (data weights, a
    regulariser) has no derivative.

    It knows gradients by ``torch.autograd.grad``, on which ``torch.func.grad`` and ``vjp`` are
    built; all of a step that is no such gradient is differentiated. A compiled step runs as it was
    written, for the compiler would hide its gradients.

    Example:
        >>> import torch
        >>> from torchopt.diff import FirstOrder, unroll
        >>> w0 = torch.tensor(1.0, requires_grad=True)
        >>> loss = lambda w: w**4
        >>> step = lambda w, _: (w - 0.1 * torch.func.grad(loss)(w), None)
        >>> w, _ = unroll(step, w0, length=3, adjoint=FirstOrder())
        >>> torch.autograd.grad(w, w0)
        (tensor(1.),)

    Reference:
        Finn, Abbeel and Levine, Model-Agnostic Meta-Learning, ICML 2017, section 5.2.
    """

    def in_block(self) -> InBlock:
        """Return that a block records its steps, with constant gradients."""
        return InBlock(first_order=True)

    def run(self, loop: Loop) -> tuple[list[Any], list[Any]]:
        """Run the loop; whatever is recording records it, without the gradients."""
        with uncompiled(), _ConstantGradients():
            return loop.plain()


class _ConstantGradients(TorchFunctionMode):
    """Cuts what ``torch.autograd.grad`` returns from the graph."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call a function."""
        result = func(*args, **(kwargs or {}))
        if func is not torch.autograd.grad:
            return result
        return tuple(x.detach() if isinstance(x, Tensor) else x for x in result)
