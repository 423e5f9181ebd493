"""Products with the derivative of a solution, as pure functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torchopt.base.misuse.given import given
from torchopt.diff.implicit.condition import Argument, Condition
from torchopt.diff.implicit.decorators import check_solve
from torchopt.diff.implicit.solution import derivative, transposed_derivative
from torchopt.diff.pullback import Tensors
from torchopt.typing import PyTree


def root_vjp(
    optimality_fn: Callable[..., PyTree],
    sol: PyTree,
    args: Sequence[PyTree],
    cotangent: PyTree,
    solve: Callable[..., PyTree] | None = None,
) -> tuple[PyTree, ...]:
    r"""Return a cotangent of a solution as cotangents of what it depends on.

    .. math::
        \bar\theta = -\Big(\frac{\partial F}{\partial\theta}\Big)^\top v, \qquad
        \Big(\frac{\partial F}{\partial x}\Big)^\top v = \bar x
        \qquad\text{where } F(x, \theta) = 0

    For use where :func:`custom_root` does not fit: in a backward pass of your own, with a solution
    that was saved. Pure; the result can be differentiated in ``sol``, ``args``, ``cotangent`` and
    what ``optimality_fn`` closes over.

    Args:
        optimality_fn: :math:`F`, called as ``optimality_fn(sol, *args)``; returns a tree like
            ``sol``.
        sol: :math:`x`, a tree of floating-point or complex tensors.
        args: :math:`\theta`, a tuple of trees.
        cotangent: :math:`\bar x`, a tree like ``sol``.
        solve: The linear solver, as of :func:`custom_root`.

    Returns:
        A tuple like ``args``, with ``None`` for leaves that are no tensors of real or complex
        numbers.

    Raises:
        TypeError: If ``args`` is no tuple, or ``sol`` or ``cotangent`` holds something else.
        ValueError: If ``cotangent``, or what ``optimality_fn`` returns, is not like ``sol``.
        RuntimeError: If the linear solver returns numbers that are not finite.

    Example:
        >>> import torch
        >>> from torchopt.diff.implicit import root_vjp
        >>> theta = torch.tensor(4.0)
        >>> root_vjp(lambda x, theta: x * x - theta, torch.tensor(2.0), (theta,), torch.tensor(1.0))
        (tensor(0.2500),)

    Reference:
        Blondel et al., Efficient and modular implicit differentiation, NeurIPS 2022,
        https://arxiv.org/abs/2105.15183.
    """
    condition, point, values = _at(optimality_fn, sol, args, solve)
    bars = condition.unknowns.flat(cotangent, "cotangent")
    gradients = transposed_derivative(condition, point, values, bars)
    return condition.like_arguments(gradients)


def root_jvp(
    optimality_fn: Callable[..., PyTree],
    sol: PyTree,
    args: Sequence[PyTree],
    tangents: Sequence[PyTree],
    solve: Callable[..., PyTree] | None = None,
) -> PyTree:
    r"""Return how a solution moves with what it depends on.

    .. math::
        \frac{\partial F}{\partial x}\, \dot x = -\frac{\partial F}{\partial\theta}\, \dot\theta
        \qquad\text{where } F(x, \theta) = 0

    Pure, as :func:`root_vjp` is; its product with :math:`\partial F / \partial\theta` takes second
    derivatives in reverse mode.

    Args:
        optimality_fn: :math:`F`, called as ``optimality_fn(sol, *args)``.
        sol: :math:`x`.
        args: :math:`\theta`, a tuple of trees.
        tangents: :math:`\dot\theta`, a tuple like ``args``; ``None``, for a whole argument or a
            leaf, is zero.
        solve: The linear solver, as of :func:`custom_root`.

    Returns:
        A tree like ``sol``.

    Raises:
        TypeError: If ``args`` or ``tangents`` is no tuple, or ``sol`` holds something else than
            tensors.
        ValueError: If ``tangents`` is not like ``args``, or what ``optimality_fn`` returns is not
            like ``sol``.
        RuntimeError: If the linear solver returns numbers that are not finite.

    Example:
        >>> import torch
        >>> from torchopt.diff.implicit import root_jvp
        >>> theta = torch.tensor(4.0)
        >>> root_jvp(lambda x, theta: x * x - theta, torch.tensor(2.0), (theta,), (torch.ones(()),))
        tensor(0.2500)

    Reference:
        Blondel et al., Efficient and modular implicit differentiation, NeurIPS 2022,
        https://arxiv.org/abs/2105.15183.
    """
    condition, point, values = _at(optimality_fn, sol, args, solve)
    tangents = _sequence(tangents, "tangents")
    if len(tangents) != len(args):
        raise ValueError(
            f"tangents must be a tuple like args, of length {len(args)}, got one of length "
            f"{len(tangents)}."
        )
    moved = condition.argument_leaves(tangents)
    return condition.unknowns.tree(derivative(condition, point, values, moved))


def _at(
    optimality_fn: Any, sol: PyTree, args: Any, solve: Any
) -> tuple[Condition, Tensors, Tensors]:
    """Return the condition at a point, with the point connected."""
    if not callable(optimality_fn):
        raise TypeError(
            f"optimality_fn must be a function of the solution, got {given(optimality_fn)}."
        )
    check_solve(solve)
    arguments = [
        Argument(k, value, True, f"args[{k}]") for k, value in enumerate(_sequence(args, "args"))
    ]
    condition = Condition(optimality_fn, sol, arguments, solve)
    return condition, condition.point, condition.parameters


def _sequence(values: Any, name: str) -> tuple[PyTree, ...]:
    if not isinstance(values, (tuple, list)):
        raise TypeError(
            f"{name} must be a tuple with one entry for each argument after the solution, got "
            f"{given(values)}. Write (theta,) for a single one."
        )
    return tuple(values)
