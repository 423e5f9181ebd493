"""Solvers of any kind, made differentiable by the condition that their solutions satisfy."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch import Tensor
from typing_extensions import ParamSpec

from torchopt.base import tree
from torchopt.base.eager import eager
from torchopt.base.misuse.given import given, short
from torchopt.core import hyper
from torchopt.diff.implicit.binding import Argnums, Binding, check_argnums
from torchopt.diff.implicit.condition import Condition
from torchopt.diff.implicit.solving import solved
from torchopt.typing import PyTree


P = ParamSpec("P")
T = TypeVar("T")


def custom_root(
    optimality_fn: Callable[..., PyTree],
    argnums: Argnums,
    has_aux: bool = False,
    solve: Callable[..., PyTree] | None = None,
    *,
    residual_check: float | None = None,
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    r"""Differentiate the solutions of a solver by the condition that they satisfy.

    .. math::
        F(x^\star(\theta), \theta) = 0 \quad\Longrightarrow\quad
        \frac{\partial x^\star}{\partial\theta}
        = -\Big(\frac{\partial F}{\partial x}\Big)^{-1} \frac{\partial F}{\partial \theta}
        \quad\text{at } (x^\star, \theta)

    However the solver came there, a derivative costs one linear system, in memory that does not
    grow with its iterations. It is that of the exact solution: as good as the solution is.

    The result has derivatives of every order in reverse and forward mode, in any nesting, plain or
    by :mod:`torch.func`, and under ``vmap`` (where the solver is called once for each member if it
    cannot take all at once). Tensors that require grad and that ``optimality_fn`` closes over, in
    variables, globals, attributes or modules, are differentiated as arguments are.

    Args:
        optimality_fn: :math:`F`, called as ``optimality_fn(x, *args)`` with the arguments of the
            solver after the start; returns a tree like ``x``. Such as
            ``torch.func.grad(objective)``. Arguments are matched by name where the names are the
            same, else by position; what only the solver knows (a limit) is left out.
        argnums: What to differentiate by: positions (or names) in the call of the solver, or a
            tuple of them. 0 is the start, by which a solution has no derivative. The arguments are
            any trees; tensors in them that hold no real or complex numbers, and other objects, are
            constants.
        has_aux: Whether the *solver* returns ``(x, aux)``. ``aux`` is handed on as constants.
        solve: The linear solver, called as ``solve(matvec, b)``, such as
            :func:`torchopt.linear_solve.solve_cg`; the matrix is the Jacobian of ``optimality_fn``
            by ``x``, or its transpose. By default a solver is chosen by size.
        residual_check: The largest absolute entry of :math:`F` that is accepted at the solution;
            ``None`` does not look. The derivative of a point that is no solution is wrong.

    Returns:
        A decorator of ``solver(x0, *args, **kwargs)``. The solver runs as under
        ``torch.no_grad()``, on tensors without history; only the start keeps ``requires_grad``. Its
        solution is any tree of floating-point or complex tensors.

    Raises:
        TypeError: If an argument is of another type; when called, if the solution holds no tensors,
            or an argument that requires grad has no place in ``optimality_fn``.
        ValueError: If ``argnums`` is out of range or names the start; when called, if
            ``optimality_fn`` returns another structure than the solution has, or more than
            ``residual_check`` at the solution.
        RuntimeError: If a tensor that requires grad reaches ``optimality_fn`` unseen; in a backward
            pass, if the linear solver returns numbers that are not finite.

    Example:
        The root of :math:`x^2 - \theta`, whose derivative is :math:`1 / (2 \sqrt\theta)`:

        >>> import torch, torchopt
        >>> def condition(x, theta):
        ...     return x * x - theta
        >>> @torchopt.diff.implicit.custom_root(condition, argnums=1)
        ... def root(x, theta):
        ...     while (x * x - theta).abs() > 1e-6 * theta:  # no graph is recorded in here
        ...         x = (x + theta / x) / 2
        ...     return x
        >>> theta = torch.tensor(4.0, requires_grad=True)
        >>> x = root(torch.tensor(1.0), theta)
        >>> torch.autograd.grad(x, theta)
        (tensor(0.2500),)

    Reference:
        Blondel et al., Efficient and modular implicit differentiation, NeurIPS 2022,
        https://arxiv.org/abs/2105.15183.
    """
    if not callable(optimality_fn):
        raise TypeError(
            f"optimality_fn must be a function of the solution, got {given(optimality_fn)}."
        )
    check_argnums(argnums)
    check_solve(solve)
    check_residual(residual_check)

    def decorate(solver: Callable[..., Any]) -> Callable[..., Any]:
        if not callable(solver):
            raise TypeError(
                f"custom_root(...) decorates a solver, a function of the start, got "
                f"{given(solver)}."
            )
        binding = Binding(solver, optimality_fn, argnums)

        @functools.wraps(solver)
        @eager
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            positional, keywords, arguments = binding(args, kwargs)
            solution, aux = solved(solver, positional, keywords, has_aux)
            condition = Condition(optimality_fn, solution, arguments, solve)
            condition.warn_of_constants(short(argnums), positional[0])
            with of_other_structure(solver, solution, positional[0], has_aux):
                if condition.is_differentiated(residual_check):
                    solution = condition.solution()
            return (solution, aux) if has_aux else solution

        return wrapped

    return decorate


@contextlib.contextmanager
def of_other_structure(
    solver: Callable[..., Any], solution: PyTree, start: PyTree, has_aux: bool
) -> Iterator[None]:
    """Say so, where the condition fails at a solution that is unlike the start.

    Raises:
        TypeError: From what the condition has raised.
    """
    try:
        yield
    except (TypeError, KeyError, AttributeError, IndexError) as error:  # the user's own
        found, expected = tree.leaf_paths(solution), tree.leaf_paths(start)
        if found == expected:
            raise
        aux = "" if has_aux else " If it returns more than the solution, pass has_aux=True."
        raise TypeError(
            f"The condition failed at what {given(solver)} returned, whose structure is not that "
            f"of the start: {tree.first_difference(found, expected)}.{aux} It raised "
            f"{type(error).__name__}: {error}"
        ) from error


def custom_fixed_point(
    fixed_point_fn: Callable[..., PyTree],
    argnums: Argnums,
    has_aux: bool = False,
    solve: Callable[..., PyTree] | None = None,
    *,
    residual_check: float | None = None,
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    r"""Differentiate the solutions of a solver as fixed points of a map.

    .. math::
        x^\star = T(x^\star, \theta) \quad\Longrightarrow\quad
        \frac{\partial x^\star}{\partial\theta}
        = \Big(I - \frac{\partial T}{\partial x}\Big)^{-1} \frac{\partial T}{\partial \theta}

    It is :func:`custom_root` with :math:`F(x, \theta) = x - T(x, \theta)`; see there for all
    arguments and errors.

    Args:
        fixed_point_fn: :math:`T`, called as ``fixed_point_fn(x, *args)``; returns a tree like
            ``x``.
        argnums: What to differentiate by, in the call of the solver.
        has_aux: Whether the solver returns ``(x, aux)``.
        solve: The linear solver.
        residual_check: The largest absolute entry of :math:`x - T(x)` that is accepted.

    Returns:
        A decorator of ``solver(x0, *args, **kwargs)``.

    Raises:
        TypeError: As of :func:`custom_root`.
        ValueError: As of :func:`custom_root`.

    Example:
        A layer that is defined by an equilibrium, with weights that it closes over:

        >>> import torch, torchopt
        >>> w = torch.tensor(0.5, requires_grad=True)
        >>> def layer(z, x):
        ...     return torch.tanh(w * z + x)
        >>> @torchopt.diff.implicit.custom_fixed_point(layer, argnums=1)
        ... def equilibrium(z, x):
        ...     for _ in range(50):
        ...         z = layer(z, x)
        ...     return z
        >>> x = torch.tensor(0.25, requires_grad=True)
        >>> z = equilibrium(torch.tensor(0.0), x)
        >>> slope = 1 - z.item() ** 2
        >>> by_x, by_w = torch.autograd.grad(z, [x, w])
        >>> abs(by_x.item() - slope / (1 - 0.5 * slope)) < 1e-5
        True
        >>> abs(by_w.item() - z.item() * by_x.item()) < 1e-5
        True

    Reference:
        Bai, Kolter and Koltun, Deep equilibrium models, NeurIPS 2019,
        https://arxiv.org/abs/1909.01377.
    """
    if not callable(fixed_point_fn):
        raise TypeError(
            f"fixed_point_fn must be a function of the solution, got {given(fixed_point_fn)}."
        )
    return custom_root(
        residual_of(fixed_point_fn), argnums, has_aux, solve, residual_check=residual_check
    )


def residual_of(fixed_point_fn: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """Return ``x - T(x, ...)``, whose Jacobian is positive where T is a contraction."""

    @functools.wraps(fixed_point_fn)
    def residual(x: PyTree, *args: Any, **kwargs: Any) -> PyTree:
        image = fixed_point_fn(x, *args, **kwargs)
        what = f"What {given(fixed_point_fn)} returned"
        return moved(x, image, what, "its argument", lambda x, image: x - image)

    return residual


def moved(
    x: PyTree,
    image: PyTree,
    what: str,
    like: str,
    difference: Callable[[Tensor, Tensor], Tensor],
) -> PyTree:
    """Return what a map does to its argument, leaf by leaf.

    Args:
        x: The argument, a tree; ``None`` in it stays.
        image: What the map returned.
        what: What an error calls that.
        like: What it calls the argument.
        difference: Of a leaf and its image.

    Raises:
        ValueError: If the two are not alike. A difference of other shapes would be stretched to the
            larger one without a word.
    """
    leaves, spec = tree.flatten(x)
    images = tree.flatten_like(image, x, spec, what, like)
    for k, (leaf, other) in enumerate(zip(leaves, images)):
        if leaf is None:
            continue
        if not isinstance(other, Tensor) or leaf.shape != other.shape:
            raise ValueError(
                f"{what} must be like {like}, which is {given(leaf)} at "
                f"{tree.quoted(tree.leaf_names(x)[k])}, got {given(other)}."
            )
    pairs = zip(leaves, images)
    return tree.unflatten(spec, [None if a is None else difference(a, b) for a, b in pairs])


def check_solve(solve: Any) -> None:
    """Refuse what is no linear solver.

    Raises:
        TypeError: Naming what was given.
    """
    if solve is None:
        return
    advice = "Write solve=torchopt.linear_solve.solve_cg()."
    taken = callable(solve)
    if taken:
        try:
            inspect.signature(solve).bind(None, None)
        except TypeError:  # it is what makes a linear solver, say
            taken, name = False, getattr(solve, "__name__", "")
            advice = f"Call it: {name}(...)." if name.startswith("solve_") else advice
        except ValueError:  # of a function that is not written in Python
            pass
    if not taken:
        raise TypeError(
            f"solve must be a linear solver, called as solve(matvec, b), got {given(solve)}. "
            f"{advice}"
        )


def check_residual(value: Any) -> None:
    """Refuse what is no bound of a residual.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is negative.
    """
    if value is not None:
        hyper.check_number("residual_check", value, hyper.HyperSpec(ge=0))
