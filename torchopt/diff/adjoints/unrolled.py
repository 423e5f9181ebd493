"""Differentiate a loop by recording it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from torchopt.diff.replay.loop import Loop
from torchopt.typing import PyTree, TensorTree


@dataclass(frozen=True)
class Unrolled:
    """Differentiate a loop, or a solver, by recording all of its steps.

    The result is differentiable in the start, in ``xs`` or the arguments of the function, in
    tensors that are closed over, and in hyperparameters that are tensors: exactly, at every order
    and in every mode, for the steps that were made. Memory grows with their number.

    Of a solver (:func:`torchopt.solvers.minimize`), lengths of steps are part of the graph;
    decisions (which steps to try, which pairs to remember, when to end) have no derivative.

    Example:
        >>> import torch, torchopt
        >>> from torchopt.diff import Unrolled, unroll
        >>> lr = torch.tensor(0.5, requires_grad=True)
        >>> w, _ = unroll(lambda w, _: (w - lr * w, None), torch.tensor(1.0), length=3)
        >>> torch.autograd.grad(w, lr)  # -3 (1 - lr) ** 2
        (tensor(-0.7500),)
        >>> target = torch.tensor(3.0, requires_grad=True)
        >>> fn = lambda p, target: (p - target).square()
        >>> solver = torchopt.solvers.GradientDescent(torchopt.sgd(0.25), max_iter=2)
        >>> start = torch.tensor(0.0)
        >>> solution = torchopt.solvers.minimize(fn, solver, start, target, adjoint=Unrolled())
        >>> torch.autograd.grad(solution.params, target)  # 1 - (1 - 2 * 0.25) ** 2
        (tensor(0.7500),)
    """

    def run(self, loop: Loop) -> tuple[list[Any], list[Any]]:
        """Run the loop; whatever is recording records it."""
        return loop.plain()

    def __call__(self, solver: Any, fn: Any, params: TensorTree, args: tuple[PyTree, ...]) -> Any:
        """Run a solver of ``fn(params, *args)``, recording it."""
        return solver.run(fn, params, *args, create_graph=torch.is_grad_enabled())
