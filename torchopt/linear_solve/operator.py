"""Linear operators: a product, the tensors that it depends on, its adjoint, and what is known of it.

:class:`LinearOperator` is what a user gives; :class:`Product` is the same over flat vectors, as a
function of explicit tensors, so that it can be batched and differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import TypeAlias

from torchopt.base import tree
from torchopt.base.captured import Captured, stray_leaf
from torchopt.base.misuse.given import given
from torchopt.base.torch_internals import in_forward_mode, peek_interpreter_stack
from torchopt.linear_solve.vectors import Layout
from torchopt.typing import PyTree, TensorTree


#: A linear map of flat vectors, the last dimension being that of the vector.
Map: TypeAlias = Callable[[Tensor], Tensor]

#: What can be said of an operator, and what follows from it.
TAGS = {
    "symmetric": frozenset({"symmetric"}),
    "positive_definite": frozenset({"positive_definite", "symmetric"}),
    "diagonal": frozenset({"diagonal", "symmetric", "lower_triangular", "upper_triangular"}),
    "lower_triangular": frozenset({"lower_triangular"}),
    "upper_triangular": frozenset({"upper_triangular"}),
}
_TRANSPOSED = {"lower_triangular": "upper_triangular", "upper_triangular": "lower_triangular"}


@dataclass(frozen=True, init=False, eq=False)
class LinearOperator:
    r"""A square linear operator that is known by its product with a vector.

    .. math:: v \mapsto A(c)\, v, \qquad u \mapsto A(c)^H u

    A function can be given to a solver as it is; an operator says more: tags choose a solver
    (:func:`solve_auto`) and save the adjoint, and tensors named as ``consts`` are differentiated
    even where they cannot be found in the function's closure.

    Args:
        fn: Called as ``fn(v, *consts)`` with a tree ``v``; returns a tree like it.
        *consts: Trees of what :math:`A` depends on.
        tags: What is promised, of ``"symmetric"`` (Hermitian, if complex), ``"positive_definite"``,
            ``"diagonal"``, ``"lower_triangular"``, ``"upper_triangular"``; entries are those of the
            flat vector, the leaves one after the other. :meth:`check` looks whether it is true.
        adjoint: The product with the adjoint, ``adjoint(u, *consts)``. By default autograd derives
            it from ``fn``.

    Raises:
        TypeError: If ``fn`` or ``adjoint`` is no function.
        ValueError: If a tag is unknown.

    Example:
        >>> import torch
        >>> from torchopt.linear_solve import LinearOperator, solve_auto
        >>> A = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
        >>> operator = LinearOperator(lambda v, A: A @ v, A, tags=("positive_definite",))
        >>> solve_auto()(operator, torch.tensor([1.0, 3.0]))
        tensor([0., 1.])
    """

    fn: Callable[..., TensorTree]
    consts: tuple[PyTree, ...]
    tags: frozenset[str]
    adjoint: Callable[..., TensorTree] | None

    def __init__(
        self,
        fn: Callable[..., TensorTree],
        *consts: PyTree,
        tags: Iterable[str] = (),
        adjoint: Callable[..., TensorTree] | None = None,
    ) -> None:
        for name, function in (("fn", fn), ("adjoint", adjoint)):
            if not callable(function) and not (name == "adjoint" and function is None):
                raise TypeError(
                    f"{name} must be a function of a vector that returns its product, got "
                    f"{given(function)}. Of a matrix A it is lambda v: A @ v."
                )
        tags = (tags,) if isinstance(tags, str) else tuple(tags)
        for tag in tags:
            if tag not in TAGS:
                raise ValueError(f"tags must be of {', '.join(map(repr, TAGS))}, got {tag!r}.")
        for name, value in (
            ("fn", fn),
            ("consts", consts),
            ("tags", frozenset().union(*(TAGS[tag] for tag in tags))),
            ("adjoint", adjoint),
        ):
            object.__setattr__(self, name, value)

    def __call__(self, v: TensorTree) -> TensorTree:
        """Return the product with a vector."""
        return self.fn(v, *self.consts)

    def adjoint_product(self, u: TensorTree) -> TensorTree:
        """Return the product of the adjoint with a vector."""
        product, layout = Product.of(self, u)
        return layout.unflatten(product.transposed().bind(product.values)[0](layout.flatten(u, "u")))

    def check(self, like: TensorTree, rtol: float = 1e-4) -> None:
        r"""Look with random vectors whether tags and adjoint are true.

        Args:
            like: A tree of the shapes of a vector.
            rtol: How much two numbers may differ that should be the same.

        Raises:
            ValueError: Naming what is not true, with the two numbers.
        """
        product, layout = Product.of(self, like)
        forward, backward = product.bind(product.values)
        u, v = torch.randn(2, layout.numel, dtype=layout.dtype, device=layout.device)
        with torch.no_grad():
            au, av = forward(u), forward(v)
            scale = float(u.norm() * av.norm() + v.norm() * au.norm()) / 2
            left, right = float(u.dot(av)), float(au.dot(v))
            if "symmetric" in self.tags and not abs(left - right) <= rtol * scale:
                raise ValueError(
                    f"The operator is not symmetric: <u, A v> = {left:.6g} and <A u, v> = "
                    f"{right:.6g} for random u and v."
                )
            if "positive_definite" in self.tags and not u.dot(au) > 0:
                raise ValueError(
                    f"The operator is not positive definite: <u, A u> = {float(u.dot(au)):.6g} for "
                    "a random u."
                )
            other = float(backward(u).dot(v)) if backward is not None else left
            if not abs(left - other) <= rtol * scale:
                raise ValueError(
                    f"adjoint is not the adjoint of fn: <u, A v> = {left:.6g} and <A^H u, v> = "
                    f"{other:.6g} for random u and v."
                )
            self._check_triangles(forward, u, rtol)

    def _check_triangles(self, forward: Map, u: Tensor, rtol: float) -> None:
        half = torch.arange(u.numel(), device=u.device) < u.numel() // 2
        for tag, kept in (("lower_triangular", ~half), ("upper_triangular", half)):
            product = forward(torch.where(kept, u, 0.0))
            wrong = torch.where(kept, 0.0, product).norm()
            if tag in self.tags and not wrong <= rtol * product.norm():
                raise ValueError(
                    f"The operator is not {tag.replace('_', ' ')}: of a vector with one half zero, "
                    f"the product has {float(wrong):.3g} where it should have 0."
                )


def as_operator(matvec: Any) -> LinearOperator:
    """Return a function as an operator, and an operator as it is.

    Raises:
        TypeError: If it is neither.
    """
    if isinstance(matvec, LinearOperator):
        return matvec
    if isinstance(matvec, Tensor) or not callable(matvec):
        advice = " Write lambda v: A @ v." if isinstance(matvec, Tensor) else ""
        raise TypeError(
            f"matvec must be a function that returns the product with a vector, or a "
            f"LinearOperator, got {given(matvec)}.{advice}"
        )
    return LinearOperator(matvec)


class Transposed:
    """The adjoint of a linear map of flat vectors, derived by autograd, with one forward run."""

    def __init__(self, forward: Map) -> None:
        self.forward = forward
        self.pull: Callable[[Tensor], Tensor] | None = None

    def __call__(self, u: Tensor) -> Tensor:
        """Return the product; recorded where gradients are."""
        if self.pull is None:
            pull = pull_back(lambda v: self.forward(v), [torch.zeros_like(u)])
            self.pull = lambda u: pull(u)[0]
        return self.pull(u)


@dataclass(frozen=True)
class Product:
    """A linear map of flat vectors as a function of tensors.

    Attributes:
        bind: Returns the product and the product with the adjoint, given tensors.
        values: The tensors, as they were found.
        tags: What is promised.
    """

    bind: Callable[[Sequence[Tensor]], tuple[Map, Map]]
    values: list[Tensor]
    tags: frozenset[str] = frozenset()

    @staticmethod
    def of(matvec: Any, like: TensorTree, layout: Layout | None = None) -> tuple[Product, Layout]:
        """Return the product of an operator or a function, and the layout of vectors."""
        operator = as_operator(matvec)
        layout = layout or Layout(like)
        leaves, spec = tree.flatten(operator.consts)
        thing = (operator.fn, operator.adjoint, leaves)
        captured = Captured(thing) if derivatives_possible() else None

        def bind(values: Sequence[Tensor]) -> tuple[Map, Map]:
            fn, adjoint, found = captured.with_values(values) if captured else thing
            consts = tree.unflatten(spec, found)

            def forward(v: Tensor) -> Tensor:
                return layout.flatten(fn(layout.unflatten(v), *consts), "matvec(v)")

            def backward(u: Tensor) -> Tensor:
                return layout.flatten(adjoint(layout.unflatten(u), *consts), "adjoint(u)")

            return forward, Transposed(forward) if adjoint is None else backward

        values = captured.values if captured else []
        return Product(bind, values, operator.tags), layout

    def transposed(self) -> Product:
        """Return the adjoint."""

        def bind(values: Sequence[Tensor]) -> tuple[Map, Map]:
            forward, backward = self.bind(values)
            return backward, forward

        tags = frozenset(_TRANSPOSED.get(tag, tag) for tag in self.tags)
        return Product(bind, self.values, tags)

    def shifted(self, ridge: float | Tensor) -> Product:
        """Return the operator plus ``ridge`` times the identity; a tensor is one more value."""
        learned = isinstance(ridge, Tensor)

        def bind(values: Sequence[Tensor]) -> tuple[Map, Map]:
            forward, backward = self.bind(values[:-1] if learned else values)
            shift = values[-1] if learned else ridge
            return lambda v: forward(v) + shift * v, lambda u: backward(u) + shift * u

        tags = self.tags
        return Product(bind, [*self.values, ridge] if learned else self.values, tags)

    def normal(self) -> Product:
        """Return the adjoint times the operator."""

        def bind(values: Sequence[Tensor]) -> tuple[Map, Map]:
            forward, backward = self.bind(values)

            def both(v: Tensor) -> Tensor:
                return backward(forward(v))

            return both, both

        return Product(bind, self.values, frozenset({"symmetric"}))

    def batched(self, dims: Sequence[int | None], size: int) -> Product:
        """Return the operator of a batch: each vector, and each value with a dim, has its own."""
        in_dims = (tuple(dims), 0)

        def each(k: int, values: Sequence[Tensor]) -> Map:
            def one(vals: tuple[Tensor, ...], v: Tensor) -> Tensor:
                return self.bind(vals)[k](v)

            mapped = torch.func.vmap(one, in_dims, randomness="same") if values else None
            alone = torch.func.vmap(lambda v: one((), v), randomness="same")
            return lambda v: mapped(tuple(values), v) if mapped else alone(v)

        def bind(values: Sequence[Tensor]) -> tuple[Map, Map]:
            forward = each(0, values)
            derived = isinstance(self.bind(values)[1], Transposed)
            return forward, Transposed(forward) if derived else each(1, values)

        return Product(bind, self.values, self.tags)

    def refuse_strays(self, n: int, like: Layout) -> None:
        """Refuse an operator with a tensor that requires grad and was not found.

        Raises:
            ValueError: Saying how to name it.
        """
        if not torch.is_grad_enabled() or peek_interpreter_stack() is not None:
            return
        v = torch.zeros(n, dtype=like.dtype, device=like.device)
        copies = [x.detach().requires_grad_(x.requires_grad) for x in self.values]
        stray = stray_leaf(self.bind(copies)[0](v), copies)
        if stray is not None:
            raise ValueError(
                f"The product depends on {given(stray)} that requires grad and was not found in "
                "the function: it stands in a graph that was recorded before, or where the "
                "methods of a class look it up. Name it, LinearOperator(fn, tensor) with "
                "fn(v, tensor), to have its derivative; or solve under torch.no_grad()."
            )


def derivatives_possible() -> bool:
    """Whether a graph may be recorded, or a transform of torch.func is at work."""
    return torch.is_grad_enabled() or peek_interpreter_stack() is not None or in_forward_mode()


def pull_back(
    function: Callable[..., Tensor], primals: Sequence[Tensor]
) -> Callable[[Tensor], list[Tensor]]:
    """Return the map from a cotangent of a function's value to those of its arguments.

    Where no transform of torch.func is at work it is autograd's own, under which functions may
    call ``torch.autograd.grad`` themselves. It is recorded where gradients are when it is called.
    """
    if peek_interpreter_stack() is not None:
        pull = torch.func.vjp(function, *primals)[1]
        return lambda u: list(pull(u))
    with torch.enable_grad():
        # a name of its own for each: one may have been computed from another
        inputs = [x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in primals]
        value = function(*inputs)

    def pull_plain(u: Tensor) -> list[Tensor]:
        if not value.requires_grad:
            return [torch.zeros_like(x) for x in inputs]
        grads = torch.autograd.grad(
            value,
            inputs,
            u,
            retain_graph=True,
            create_graph=torch.is_grad_enabled(),
            allow_unused=True,
        )
        return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads)]

    return pull_plain
