"""A closure as an objective: what an object-oriented API hands to a solver."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchopt.base import misuse
from torchopt.base.distributed import mean_of_processes, spread_as
from torchopt.base.misuse.given import given
from torchopt.solvers.flat import Layout, Number, Objective


class ClosureObjective(Objective):
    """A closure of ``torch.optim`` as a function of the parameters as one vector.

    Args:
        closure: Clears the gradients, computes the loss, calls ``backward()`` and returns the loss.
        params: What the loss depends on; overwritten.
        title: Of the optimizer, for messages.

    Attributes:
        written: What the parameters hold.
        first: What the closure returned at first.
    """

    def __init__(self, closure: Any, params: Sequence[Tensor], title: str) -> None:
        if not callable(closure):
            raise TypeError(
                f"{title}.step needs a closure that clears the gradients, computes the loss, calls "
                f"backward() and returns the loss, got {given(closure)}. Write "
                "optimizer.step(closure)."
            )
        self.closure, self.params, self.title = closure, params, title
        self.layout = Layout(list(params), "Parameters")
        self.written = self.before = self.layout.join(params)
        self.first: Any = None

    def __call__(self, x: Tensor) -> tuple[Number, Tensor]:
        """Put a vector into the parameters, and return the loss and its gradient there."""
        self.write(x)
        with torch.enable_grad():
            loss = self.closure()
        value = self._value(loss)
        if self.first is None:
            self.first = loss
        grads = [p.grad for p in self.params]
        if all(grad is None for grad in grads):
            raise ValueError(
                "No parameter has a gradient after the closure. It has to call loss.backward(), "
                "after optimizer.zero_grad()."
            )
        dense = [_dense(p, grad) for p, grad in zip(self.params, grads)]
        return value, self.layout.join(dense)

    def _value(self, loss: Any) -> float:
        if isinstance(loss, numbers.Real):
            return float(loss)
        if not isinstance(loss, Tensor):
            advice = " Does it return the loss?" if loss is None else ""
            raise TypeError(
                f"The closure of {self.title}.step must return the loss, got {given(loss)}.{advice}"
            )
        if loss.numel() != 1 or loss.is_complex():
            raise ValueError(
                f"The closure of {self.title}.step must return one real number, got "
                f"{misuse.short(loss)}. Take its mean(), sum(), abs() or real."
            )
        return mean_of_processes(loss, self.params).item()

    def write(self, x: Tensor) -> None:
        """Put a vector into the parameters."""
        if x is not self.written:
            self.written = x
            for p, part in zip(self.params, self.layout.leaves(x)):
                p.copy_(spread_as(part, p))

    def restore(self) -> None:
        """Put back what the parameters held at first."""
        with torch.no_grad():
            self.write(self.before)


def _dense(param: Tensor, grad: Tensor | None) -> Tensor:
    if grad is None:
        return torch.zeros_like(param)
    return grad.to_dense() if grad.layout != torch.strided else grad
