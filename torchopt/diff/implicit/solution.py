r"""The node of the graph that a solution is, and linear systems, whose solutions are such nodes.

A solution :math:`x` of :math:`F(x, \theta) = 0` moves with :math:`\theta` so that the condition
goes on to hold: :math:`A \dot x + B \dot\theta = 0`, with :math:`A = \partial F / \partial x` and
:math:`B = \partial F / \partial \theta`. So

.. math::
    \dot x = -A^{-1} B \dot\theta, \qquad
    \bar\theta = -B^\top v, \quad A^\top v = \bar x.

The systems are conditions too, :math:`A(x, \theta)^\top v - \bar x = 0` of :math:`v`, whose
solution depends on :math:`x`, :math:`\theta` and :math:`\bar x`. They are therefore solved by the
same node, and derivatives of every order and mode follow from these two lines. For that :math:`x`
has to stay connected in the backward pass: it is an output of the node, saved as such.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from torchopt.base.batched_grads import over_batches
from torchopt.base.levels import primal
from torchopt.base.torch_internals import set_forward_grad_enabled
from torchopt.diff.implicit.running import run
from torchopt.diff.pullback import Flat, Tensors, inexact, pullback, pushforward


class System(abc.ABC):
    """A condition for unknowns, as a function of tuples of tensors."""

    @abc.abstractmethod
    def residual(self, x: Tensors, theta: Tensors) -> Tensors:
        """Return what is zero at the solution, in the shapes of ``x``."""

    def holding(self, x: Tensors, theta: Tensors) -> AbstractContextManager[None]:
        """Return the context in which products of derivatives at a point are taken."""
        return nullcontext()

    @abc.abstractmethod
    def solve_linear(self, system: LinearSystem, point: Tensors, b: Tensors) -> Tensors:
        """Return the solution, as numbers, of a linear system that a derivative asks for."""


class LinearSystem(System):
    r""":math:`A v = b` or :math:`A^\top v = b` with the Jacobian of another system.

    Its parameters are the point ``(x, theta)`` of that system, and ``b``.
    """

    def __init__(self, of: System, n: int, transposed: bool) -> None:
        self.of, self.n, self.transposed = of, n, transposed

    @property
    def kind(self) -> str:
        """Which derivatives ask for it, in words."""
        of = f" of {self.of.kind}" if isinstance(self.of, LinearSystem) else ""
        return ("adjoint" if self.transposed else "tangent") + of

    def residual(self, x: Tensors, theta: Tensors) -> Tensors:
        """Return the product with ``x`` less the right-hand side."""
        point, b = theta[: -self.n], theta[-self.n :]
        return tuple(a - c for a, c in zip(self.product(point)(x), b))

    def holding(self, x: Tensors, theta: Tensors) -> AbstractContextManager[None]:
        """Return the context of the system that this one belongs to, at its point."""
        point = theta[: -self.n]
        return self.of.holding(point[: self.n], point[self.n :])

    def product(self, point: Tensors, adjoint: bool = False) -> Flat:
        """Return the product with the matrix of the system at a point, or with its transpose."""
        x, theta = point[: self.n], point[self.n :]

        def residual(x: Tensors) -> Tensors:
            return self.of.residual(x, theta)

        if self.transposed is not adjoint:
            return pullback(residual, x)[1]
        return pushforward(residual, x)

    def solved(self, *theta: Tensor) -> Tensors:
        """Return the solution, as numbers."""
        return self.solve_linear(self, theta[: -self.n], theta[-self.n :])

    def solve_linear(self, system: LinearSystem, point: Tensors, b: Tensors) -> Tensors:
        """Let the system do it that this one belongs to."""
        return self.of.solve_linear(system, point, b)


class _Root(Function):
    """The identity of a solution, with the derivative that its condition gives it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(system: System, n: int, *tensors: Tensor) -> Tensors:  # pyright: ignore[reportIncompatibleMethodOverride]
        return tuple(x.clone() for x in tensors[:n])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensors) -> None:
        ctx.system, ctx.n, *_ = inputs
        saved = (*output, *inputs[2 + ctx.n :])
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        n, saved = ctx.n, ctx.saved_tensors

        def gradients(*cotangents: Tensor) -> tuple[Tensor | None, ...]:
            with ctx.system.holding(saved[:n], saved[n:]):
                return transposed_derivative(ctx.system, saved[:n], saved[n:], cotangents)

        return (None, None, *[None] * n, *over_batches(gradients, cotangents))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        # torch turns forward mode off in here, and levels below this one would be lost without a
        # word; with it on, the saved inputs must be taken without the tangent of this level
        with set_forward_grad_enabled(True):
            n, saved = ctx.n, tuple(primal(x) for x in ctx.saved_tensors)
            with ctx.system.holding(saved[:n], saved[n:]):
                return derivative(ctx.system, saved[:n], saved[n:], tangents[2 + n :])


def differentiable(system: System, x: Sequence[Tensor], theta: Sequence[Tensor]) -> Tensors:
    """Return a solution (numbers) as a function of the parameters of its condition."""
    return _Root.apply(system, len(x), *x, *theta)  # pyright: ignore[reportReturnType]


def linear_solution(
    system: System, x: Tensors, theta: Tensors, b: Tensors, transposed: bool
) -> Tensors:
    """Return the solution of the linear system with the Jacobian at a point, differentiable."""
    linear = LinearSystem(system, len(x), transposed)
    parameters = (*x, *theta, *b)
    return differentiable(linear, run(linear.solved, parameters), parameters)


def transposed_derivative(
    system: System, x: Tensors, theta: Tensors, cotangents: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    r"""Return :math:`-B^\top v` with :math:`A^\top v = \bar x`."""
    v = linear_solution(system, x, theta, tuple(cotangents), True)
    product = pullback(lambda theta: system.residual(x, theta), theta)[1]
    gradients: list[Tensor | None] = [None] * len(theta)
    for k, u in zip(inexact(theta), product(v)):
        gradients[k] = -u
    return tuple(gradients)


def derivative(
    system: System, x: Tensors, theta: Tensors, tangents: Sequence[Tensor | None]
) -> Tensors:
    r"""Return :math:`-A^{-1} B \dot\theta`; ``None`` is a tangent of zero."""
    moved = [(tangents[k], theta[k]) for k in inexact(theta)]
    product = pushforward(lambda theta: system.residual(x, theta), theta)
    b = product(tuple(torch.zeros_like(x) if t is None else t for t, x in moved))
    return linear_solution(system, x, theta, tuple(-u for u in b), False)
