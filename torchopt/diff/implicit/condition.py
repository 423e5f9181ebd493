"""A user's condition of optimality as a system: which tensors it depends on, and its checks."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchopt.base import tree
from torchopt.base.captured import Captured, leaves_of
from torchopt.base.levels import any_level, is_tracked, is_wrapped, physical
from torchopt.base.misuse.given import given, short
from torchopt.base.torch_internals import in_forward_mode
from torchopt.diff.implicit.solution import LinearSystem, System, differentiable
from torchopt.diff.implicit.unknowns import Unknowns
from torchopt.diff.pullback import Flat, Tensors, pullback
from torchopt.linear_solve import LinearOperator, WarmStart, solve_auto
from torchopt.typing import PyTree


class Argument(NamedTuple):
    """What a condition is given besides the solution."""

    key: int | str  #: Its position, or its keyword.
    value: PyTree
    wanted: bool  #: Whether the solution is differentiated by it.
    name: str  #: What an error calls it.


class Condition(System):
    """That a function of a solution and of arguments is zero.

    Its parameters are the floating-point tensors in the arguments that are wanted, and tensors
    that the function uses without being given them.

    Args:
        function: Of the solution and the arguments; returns a tree like the solution.
        solution: A tree of tensors, constants.
        arguments: All that the function is given besides.
        solve: ``solve(matvec, b)`` of a linear system of trees like the solution.
        tags: What is known of its Jacobian, as of a :class:`torchopt.linear_solve.LinearOperator`.
        title: What errors call the function.
        context: Called as the function is; in the context that it returns products are taken.
    """

    def __init__(
        self,
        function: Callable[..., PyTree],
        solution: PyTree,
        arguments: Sequence[Argument],
        solve: Callable[..., PyTree] | None = None,
        tags: Sequence[str] = (),
        title: str = "",
        context: Callable[..., AbstractContextManager[None]] | None = None,
    ) -> None:
        self.context = context
        self.solve, self.tags = solve or default_solve(), tags
        self.title, self.arguments = title or given(function), arguments
        self.unknowns = Unknowns(solution, "The solution")
        flat = [tree.flatten(argument.value) for argument in arguments]
        self._specs = [spec for _, spec in flat]
        self._sizes = [len(leaves) for leaves, _ in flat]
        leaves = [x for leaves, _ in flat for x in leaves]
        wanted = [a.wanted for a, (leaves, _) in zip(arguments, flat) for _ in leaves]
        self._wanted = [k for k, x in enumerate(leaves) if wanted[k] and _has_derivative(x)]
        # objects may hold tensors too: they are searched and rebuilt with the function
        self._others = [k for k, x in enumerate(leaves) if not isinstance(x, Tensor)]
        self._constants = [x.detach() if isinstance(x, Tensor) else x for x in leaves]
        # below a level of torch.func nothing may come from it: what it has wrapped is handed down
        self._wrapped = [
            k
            for k, x in enumerate(self._constants)
            if isinstance(x, Tensor) and is_wrapped(x) and k not in self._wanted
        ]
        self._captured = Captured(
            functools.partial(_call, function, [leaves[k] for k in self._others])
        )
        found = self._captured.values
        self._hidden = [k for k, x in enumerate(found) if is_tracked(x) or is_wrapped(x)]
        self.parameters: Tensors = (
            *(leaves[k] for k in self._wanted),
            *(found[k] for k in self._hidden),
            *(self._constants[k] for k in self._wrapped),
        )

    @property
    def point(self) -> Tensors:
        """The solution as a tuple of reals."""
        return self.unknowns.values

    def residual(self, x: Tensors, theta: Tensors) -> Tensors:
        """Return what the function is of a solution and of parameters."""
        call, args, keywords = self._called_with(theta)
        result = call(self.unknowns.tree(x), args, keywords)
        return self.unknowns.flat(result, f"What {self.title} returned", ADVICE)

    def holding(self, x: Tensors, theta: Tensors) -> AbstractContextManager[None]:
        """Return the context of the function at a point, if it has one."""
        if self.context is None:
            return nullcontext()
        _, args, keywords = self._called_with(theta)
        return self.context(self.unknowns.tree(x), *args, **keywords)

    def _called_with(self, theta: Tensors) -> tuple[Any, list[Any], dict[str, Any]]:
        """Return the function and its arguments, for parameters."""
        n, m = len(self._wanted), len(self._wanted) + len(self._hidden)
        call: Any = self._captured.function
        if self._hidden:
            values = list(self._captured.values)
            for k, value in zip(self._hidden, theta[n:m]):
                values[k] = value
            call = self._captured.with_values(values)
        leaves = list(self._constants)
        changes = ((self._others, call.args[1]), (self._wanted, theta), (self._wrapped, theta[m:]))
        for places, values in changes:
            for k, value in zip(places, values):
                leaves[k] = value
        return call, *self._arguments(leaves)

    def _arguments(self, leaves: list[Any]) -> tuple[list[Any], dict[str, Any]]:
        args: list[Any] = []
        keywords: dict[str, Any] = {}
        for argument, spec, size in zip(self.arguments, self._specs, self._sizes):
            value = tree.unflatten(spec, leaves[:size])
            del leaves[:size]
            if isinstance(argument.key, str):
                keywords[argument.key] = value
            else:
                args.append(value)
        return args, keywords

    def solve_linear(self, system: LinearSystem, point: Tensors, b: Tensors) -> Tensors:
        """Let the linear solver solve a system of trees like the solution."""
        pairs, flat = self.unknowns.pairs, self.unknowns.flat_pairs

        def function(adjoint: bool) -> Callable[..., PyTree]:
            made: list[Flat] = []  # the condition is evaluated once for all products

            def fn(v: PyTree, *point_: Tensor) -> PyTree:
                if point_:
                    product = system.product(point_, adjoint)
                else:
                    made.extend([system.product(point, adjoint)] if not made else [])
                    product = made[0]
                return pairs(product(flat(v, "What the linear solver asks the product of")))

            return fn

        # where batches or derivatives are looked for, the product is a function of all its tensors
        consts = point if any_level() or in_forward_mode() else ()
        matvec = LinearOperator(
            Sealed(function(False)), *consts, tags=self.tags, adjoint=Sealed(function(True))
        )
        solve = self.solve
        if isinstance(solve, WarmStart):  # what another derivative asked for is no start for this
            solve = solve.part(system.kind)
        v = flat(solve(matvec, pairs(b)), "What the linear solver returned")
        if not any_level() and not all(bool(torch.isfinite(x).all()) for x in v):
            raise RuntimeError(_not_finite(self, b))
        return v

    # Checks --------------------------------------------------------------------------------------

    def check(self, bound: float | None) -> None:
        """Evaluate the condition at the solution.

        Raises:
            TypeError: If it returns no tree of tensors.
            ValueError: If that has another structure than the solution, or is larger than
                ``bound``. (One that does not depend on the solution is found to be singular when
                it is differentiated.)
            RuntimeError: If a tensor whose derivative is recorded reaches it in a way that is not
                seen.
        """
        x, theta = [v.detach() for v in self.point], [v.detach() for v in self.parameters]
        n = len(x)
        inputs: list[Tensor] = []

        def residual(xs: Tensors) -> Tensors:
            inputs[:] = xs
            return self.residual(xs[:n], xs[n:])

        value = pullback(residual, (*x, *theta))[0]
        if any_level():
            strays = [y for y in value if is_tracked(y)]
        else:
            known = inputs[: n + len(self._wanted)]
            leaves = {id(leaf): leaf for y in value for leaf in leaves_of(y, known)}
            hidden = inputs[len(known) : len(known) + len(self._hidden)]
            self._keep([id(copy) in leaves for copy in hidden])
            strays = [leaf for leaf in leaves.values() if all(leaf is not h for h in hidden)]
        if strays:
            raise RuntimeError(_stray(self, strays[0]))
        if bound is not None:
            size = max(_largest(y) for y in value)
            if not size <= bound:
                raise ValueError(_unsatisfied(self, size, bound))

    def is_differentiated(self, bound: float | None) -> bool:
        """Check the condition where that is asked for or recorded, and return whether it is."""
        recording = torch.is_grad_enabled() or any_level() or in_forward_mode()
        if recording or bound is not None:
            self.check(bound)
        return any(map(is_tracked, self.parameters))

    def _keep(self, used: list[bool]) -> None:
        """Drop tensors that the function could use, and does not: a network's own weights, say."""
        n, m = len(self._wanted), len(self._wanted) + len(self._hidden)
        kept = [x for x, use in zip(self.parameters[n:m], used) if use]
        self._hidden = [k for k, use in zip(self._hidden, used) if use]
        self.parameters = (*self.parameters[:n], *kept, *self.parameters[m:])

    def warn_of_constants(self, argnums: str, start: PyTree) -> None:
        """Warn of what requires grad, and does not get any."""
        names = [a.name for a in self.arguments if not a.wanted and _any_tracked(a.value)]
        for name in names:
            warnings.warn(
                f"The solution of {self.title} is not differentiated by {name}, which requires "
                f"grad, for argnums={argnums} does not name it. Add it to argnums, or detach it.",
                UserWarning,
                stacklevel=3,
            )
        if not any(map(is_tracked, self.parameters)) and not names and _any_tracked(start):
            warnings.warn(
                f"Only the start of the solver requires grad. The solution of {self.title} has no "
                "derivative by it: it satisfies the same condition wherever the solver began.",
                UserWarning,
                stacklevel=3,
            )

    def like_arguments(self, values: Sequence[Tensor | None]) -> tuple[PyTree, ...]:
        """Return values for the parameters that were given as a tuple of trees like the arguments.

        Other leaves become ``None``.
        """
        leaves: list[Any] = [None] * len(self._constants)
        for k, value in zip(self._wanted, values):
            leaves[k] = value
        return tuple(self._arguments(leaves)[0])

    def argument_leaves(self, trees: Sequence[PyTree]) -> list[Tensor | None]:
        """Return trees like the arguments, or ``None`` for one, as values for the parameters."""
        found: list[Any] = []
        for argument, spec, size, value in zip(self.arguments, self._specs, self._sizes, trees):
            if value is None:
                found += [None] * size
            else:
                what, like = f"The tangent of {argument.name}", argument.name
                found += tree.flatten_like(value, argument.value, spec, what, like)
        moved: list[Tensor | None] = [found[k] for k in self._wanted]
        return [*moved, *[None] * (len(self.parameters) - len(moved))]

    def solution(self) -> PyTree:
        """Return the solution as a function of the parameters."""
        return self.unknowns.tree(differentiable(self, self.point, self.parameters))


def default_solve() -> Callable[..., PyTree]:
    """Return the linear solver where none is given."""
    return solve_auto()


class Sealed:
    """A function that is not searched for tensors: it is given all of them."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., PyTree]) -> None:
        self.function = function

    def __call__(self, *args: PyTree) -> PyTree:
        """Call it."""
        return self.function(*args)


#: What to look at when a condition returns another structure than the solution has.
ADVICE = (
    " The condition returns one entry for each entry of the solution, as the gradient of an "
    "objective does. If the solver returns (solution, aux), pass has_aux=True."
)


def _call(
    function: Callable[..., PyTree], _: list[Any], x: PyTree, args: list[Any], keywords: Any
) -> PyTree:
    return function(x, *args, **keywords)


def _any_tracked(value: PyTree) -> bool:
    return any(map(is_tracked, tree.flatten(value)[0]))


def _has_derivative(x: Any) -> bool:
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def _largest(x: Tensor) -> float:
    x = physical(x)
    return x.abs().max().item() if x.numel() else 0.0


def _unsatisfied(condition: Condition, size: float, bound: float) -> str:
    found = "is not finite" if not math.isfinite(size) else f"has an entry of {size:.3g}"
    return (
        f"The solution does not satisfy the condition {condition.title}, which {found} there "
        f"(residual_check={bound:g}). Its derivative would be that of another point. Let the "
        "solver go on for longer, with a smaller tolerance, or allow more by residual_check."
    )


def _stray(condition: Condition, leaf: Tensor) -> str:
    return (
        f"{short(leaf)[:1].upper()}{short(leaf)[1:]}, which requires grad, reaches the condition "
        f"{condition.title} in a way that is not seen from outside (not as an argument, closure, "
        "default, global or attribute). Hand it over as an argument and name it in argnums, or "
        "detach it."
    )


def _not_finite(condition: Condition, b: Tensors) -> str:
    where = (
        ""
        if all(bool(torch.isfinite(x).all()) for x in b)
        else (" The derivative that came in is not finite itself.")
    )
    return (
        f"The linear solver {given(condition.solve)} returned numbers that are not finite for the "
        f"derivative of a solution of {condition.title}.{where} Its Jacobian may be singular "
        "there: add a regularisation to the problem, or a ridge to the solver."
    )
