"""A linear operator over flat vectors, as a function of the tensors that it depends on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from typing_extensions import TypeAlias

from torchopt.base import tree
from torchopt.base.captured import Captured
from torchopt.base.levels import any_level
from torchopt.base.torch_internals import in_forward_mode
from torchopt.linear_solve.pulling import pull_back
from torchopt.linear_solve.sighting import Sighting
from torchopt.linear_solve.vectors import Layout
from torchopt.typing import PyTree, TensorTree


#: A linear map of flat vectors, the last dimension being that of the vector.
Map: TypeAlias = Callable[[Tensor], Tensor]

_TRANSPOSED = {"lower_triangular": "upper_triangular", "upper_triangular": "lower_triangular"}


class Source(Protocol):
    """What an operator is made of."""

    @property
    def fn(self) -> Callable[..., TensorTree]:
        """The product, ``fn(v, *consts)``."""
        ...

    @property
    def adjoint(self) -> Callable[..., TensorTree] | None:
        """The product with the adjoint, if it was given."""
        ...

    @property
    def consts(self) -> tuple[PyTree, ...]:
        """What it depends on."""
        ...

    @property
    def tags(self) -> frozenset[str]:
        """What is promised."""
        ...


class Transposed:
    """The adjoint of a linear map of flat vectors, derived by autograd, with one forward run."""

    def __init__(self, forward: Map) -> None:
        self.forward = forward
        self.pull: Callable[[Tensor], list[Tensor]] | None = None

    def _recorded(self, v: Tensor) -> Tensor:
        value = self.forward(v)
        if not any_level() and not value.requires_grad:
            raise RuntimeError(
                "The adjoint is needed (for a derivative, or by the solver) and cannot be derived: "
                "the product records no graph from v to its value. It is detached, under "
                "torch.no_grad(), or a gradient without create_graph=True. Record it, or write "
                "LinearOperator(fn, adjoint=...), or tags='symmetric' if it is."
            )
        return value

    def __call__(self, u: Tensor) -> Tensor:
        """Return the product; recorded where gradients are."""
        if any_level():  # what is recorded there does not outlive the level
            return pull_back(self._recorded, [torch.zeros_like(u)])(u)[0]
        if self.pull is None:
            self.pull = pull_back(self._recorded, [torch.zeros_like(u)])
        return self.pull(u)[0]


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
    def of(source: Source, layout: Layout, differentiated: bool = False) -> Product:
        """Return the product of functions of trees.

        Args:
            source: What an operator is made of.
            layout: Of the vectors.
            differentiated: Whether the derivative in the tensors that it depends on may be asked
                for, so that all of them have to be known.

        Raises:
            ValueError: If one is not.
        """
        leaves, spec = tree.flatten(source.consts)
        thing = (source.fn, source.adjoint, leaves)
        inside = any_level()
        recording = differentiated and (torch.is_grad_enabled() or in_forward_mode())
        captured = Captured(thing) if inside or recording else None

        def bind(values: Sequence[Tensor]) -> tuple[Map, Map]:
            fn, adjoint, found = captured.with_values(values) if captured else thing
            consts = tree.unflatten(spec, found)

            def forward(v: Tensor) -> Tensor:
                return layout.flatten(fn(layout.unflatten(v), *consts), "matvec(v)")

            if adjoint is None and "symmetric" in source.tags:
                return forward, forward
            if adjoint is None:
                return forward, Transposed(forward)

            def backward(u: Tensor) -> Tensor:
                return layout.flatten(adjoint(layout.unflatten(u), *consts), "adjoint(u)")

            return forward, backward

        values = captured.values if captured else []
        product = Product(bind, values, source.tags)
        if differentiated and captured:
            example = torch.linspace(0.5, 1.5, layout.numel, dtype=layout.dtype)
            seen = Sighting(lambda v: bind(v)[0], values, example.to(layout.device))
            if not inside and not seen.recorded:  # so it may work on a graph recorded before
                return Product.of(source, layout)
            seen.check()
        return product

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
