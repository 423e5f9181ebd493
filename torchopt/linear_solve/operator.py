"""Linear operators: a product, the tensors it depends on, its adjoint, and what is known of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchopt.base.misuse.given import given
from torchopt.linear_solve.product import Map, Product
from torchopt.linear_solve.vectors import Layout
from torchopt.typing import PyTree, TensorTree


#: What can be said of an operator, and what follows from it.
TAGS = {
    "symmetric": frozenset({"symmetric"}),
    "positive_definite": frozenset({"positive_definite", "symmetric"}),
    "diagonal": frozenset({"diagonal", "symmetric", "lower_triangular", "upper_triangular"}),
    "lower_triangular": frozenset({"lower_triangular"}),
    "upper_triangular": frozenset({"upper_triangular"}),
}


def tags_of(tags: Iterable[str]) -> frozenset[str]:
    """Return tags with those that follow from them.

    Raises:
        ValueError: If one is unknown.
    """
    tags = (tags,) if isinstance(tags, str) else tuple(tags)
    for tag in tags:
        if tag not in TAGS:
            raise ValueError(f"tags must be of {', '.join(map(repr, TAGS))}, got {tag!r}.")
    return frozenset().union(*(TAGS[tag] for tag in tags))


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
            flat vector, the leaves one after the other. A promise that is not kept gives wrong
            derivatives, for the adjoint of a symmetric operator is taken to be itself;
            :meth:`check` looks whether it is kept.
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
        for name, value in (
            ("fn", fn),
            ("consts", consts),
            ("tags", tags_of(tags)),
            ("adjoint", adjoint),
        ):
            object.__setattr__(self, name, value)

    def __call__(self, v: TensorTree) -> TensorTree:
        """Return the product with a vector."""
        return self.fn(v, *self.consts)

    def adjoint_product(self, u: TensorTree) -> TensorTree:
        """Return the product of the adjoint with a vector."""
        layout = Layout(u, "u")
        product = Product.of(self, layout)
        return layout.unflatten(
            product.transposed().bind(product.values)[0](layout.flatten(u, "u"))
        )

    def check(self, like: TensorTree, rtol: float = 1e-4) -> None:
        r"""Look with random vectors whether tags and adjoint are true.

        Args:
            like: A tree of the shapes of a vector.
            rtol: How much two numbers may differ that should be the same.

        Raises:
            ValueError: Naming what is not true, with the two numbers.
        """
        layout = Layout(like, "like")
        product = Product.of(self, layout)
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
            other = float(backward(u).dot(v))
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


def as_operator(matvec: Any, what: str = "matvec") -> LinearOperator:
    """Return a function as an operator, and an operator as it is.

    Args:
        matvec: What was given.
        what: What an error calls it.

    Raises:
        TypeError: If it is neither.
    """
    if isinstance(matvec, LinearOperator):
        return matvec
    if isinstance(matvec, Tensor) or not callable(matvec):
        advice = " Write lambda v: A @ v." if isinstance(matvec, Tensor) else ""
        raise TypeError(
            f"{what} must be a function that returns the product with a vector, or a "
            f"LinearOperator, got {given(matvec)}.{advice}"
        )
    return LinearOperator(matvec)
