"""Solvers under the adjoints of loops: iterations that can be taken again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchopt import diff
from torchopt.base.levels import any_level
from torchopt.base.misuse.given import given
from torchopt.base.torch_internals import in_forward_mode
from torchopt.diff.unrolling import unroll
from torchopt.solvers.flat import Layout
from torchopt.typing import PyTree, TensorTree


def replayed(
    adjoint: Any,
    solver: Any,
    fn: Callable[..., Any],
    params: TensorTree,
    args: tuple[PyTree, ...],
) -> Any:
    """Return a solution whose iterations are differentiated as the steps of a loop.

    The solver runs once by itself, to tell how many iterations there are; then they are the steps
    of :func:`torchopt.diff.unroll`.

    Raises:
        TypeError: If the solver remembers more than a loop can carry, or the adjoint has to see
            the gradients of a step, which a solver computes inside.
    """
    inside = (
        (diff.Mixed, diff.Forward)
        if solver.first_order
        else (diff.Mixed, diff.Forward, diff.FirstOrder)
    )
    if isinstance(adjoint, inside):
        raise TypeError(
            f"adjoint={adjoint!r} has to see how a step computes its gradients, and "
            f"{type(solver).__name__} computes them, or products with their derivatives, by "
            "itself. Write adjoint=torchopt.diff.Checkpointed(), Unrolled() or Implicit()."
        )
    solver.carries(adjoint)
    found = solver.run(fn, params, *args)
    if found.iterations == 0 or not recording():
        return solver.run(fn, params, *args, create_graph=recording())
    layout = Layout(params)

    def objective() -> Any:
        return solver.objective(fn, layout, args, recording())

    def step(carry: PyTree, _: Any) -> tuple[PyTree, None]:
        problem = objective()
        return solver.packed(solver.advance(problem, solver.unpacked(problem, carry))), None

    first = solver.start(objective(), layout.flatten(params))
    # the derivative of the value comes from the function, at the last point
    carry, _ = unroll(step, solver.packed(first), length=found.iterations, adjoint=adjoint)
    last = solver.unpacked(objective(), carry)
    state = dataclasses.replace(found.state, x=last.x, value=last.value, grad=last.grad)
    return dataclasses.replace(found, params=last.params, value=last.value, state=state)


def recording() -> bool:
    """Whether what is computed now may be differentiated."""
    return torch.is_grad_enabled() or any_level() or in_forward_mode()


def numbered(value: float | Tensor, like: Tensor) -> Tensor:
    """Return a number as a tensor, with its history."""
    return value.to(like) if isinstance(value, Tensor) else torch.full_like(like.sum(), value)


def check_adjoint(adjoint: Any) -> None:
    """Refuse what is no way to differentiate a solution.

    Raises:
        TypeError: Naming what was given, and what to write.
    """
    runs = callable(adjoint) or callable(getattr(adjoint, "run", None))
    if isinstance(adjoint, type) or not runs:
        write = f"{adjoint.__name__}()" if isinstance(adjoint, type) else "Implicit()"
        raise TypeError(
            "adjoint must be torchopt.diff.Implicit(), torchopt.diff.Unrolled() or another such "
            f"object, or None, got {given(adjoint)}. Write adjoint={write}."
        )
