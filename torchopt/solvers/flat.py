"""A tree of parameters as one flat vector of reals, and a function of it as solvers see it."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Sequence
from typing import Any, Union

import torch
from torch import Tensor
from typing_extensions import TypeAlias

from torchopt.base import misuse, tree
from torchopt.base.distributed import whole
from torchopt.base.misuse.given import given
from torchopt.base.numerics import as_pairs, from_pairs, to_compute_dtype
from torchopt.typing import PyTree, TensorTree


#: A number of the arithmetic between function calls: a float, or a 0-d tensor with its history
#: where the solver itself is differentiated.
Number: TypeAlias = Union[float, Tensor]


class Layout:
    """How the leaves of a tree lie in one vector, each after the other in the order of the tree.

    The vector has the widest dtype of the leaves, float32 for half precision; complex numbers are
    pairs of reals. ``None`` is no parameter and stays.

    Raises:
        TypeError: If a leaf is no tensor of floating-point or complex numbers.
        ValueError: If there is none, or they are on several devices.
    """

    def __init__(self, params: TensorTree, what: str = "params") -> None:
        leaves, self.spec = tree.flatten(params)
        for k, leaf in enumerate(leaves):
            if leaf is not None and not _is_parameter(leaf):
                name = tree.quoted(tree.leaf_names(params)[k])
                raise TypeError(
                    f"{what} must be tensors of floating-point or complex numbers, got "
                    f"{given(leaf)} at {name}. Give constants as further arguments of the function."
                )
        present = [leaf for leaf in leaves if leaf is not None]
        devices = {leaf.device for leaf in present}
        if not any(leaf.numel() for leaf in present) or len(devices) > 1:
            found = f"tensors on {', '.join(map(str, devices))}" if devices else "none"
            raise ValueError(
                f"{what} must have at least one entry and be on one device, got {found}."
            )
        self.device = devices.pop()
        self.shapes = [None if leaf is None else leaf.shape for leaf in leaves]
        self.dtypes = [None if leaf is None else leaf.dtype for leaf in leaves]
        self.dtype = functools.reduce(torch.promote_types, map(_real_dtype, present))
        self.sizes = [leaf.numel() * (2 if leaf.is_complex() else 1) for leaf in present]
        self.numel = sum(self.sizes)

    def flatten(self, params: TensorTree) -> Tensor:
        """Return the entries of a tree as a new vector."""
        return self.join(tree.flatten(params)[0])

    def join(self, leaves: Sequence[Tensor | None]) -> Tensor:
        """Return the entries of leaves as a new vector."""
        return torch.cat([self._reals(leaf) for leaf in leaves if leaf is not None])

    def _reals(self, leaf: Tensor) -> Tensor:
        leaf = whole(leaf)  # every process has the vector of all
        if leaf.is_complex():
            leaf = as_pairs(leaf)
        return leaf.reshape(-1).to(self.dtype)

    def unflatten(self, x: Tensor) -> TensorTree:
        """Return a vector as a tree, in the dtypes that its leaves had."""
        return tree.unflatten(self.spec, self.leaves(x))

    def leaves(self, x: Tensor) -> list[Any]:
        """Return a vector as leaves, in the dtypes that they had."""
        parts = iter(x.split(self.sizes))
        return [
            None if shape is None or dtype is None else _shaped(next(parts), shape, dtype)
            for shape, dtype in zip(self.shapes, self.dtypes)
        ]


def _is_parameter(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def _real_dtype(leaf: Tensor) -> torch.dtype:
    kind = leaf.new_empty(0)
    return to_compute_dtype(torch.view_as_real(kind) if leaf.is_complex() else kind).dtype


def _shaped(part: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    if dtype.is_complex:
        part = from_pairs(part.reshape(*shape, 2))
    return part.reshape(shape).to(dtype)


class Objective(abc.ABC):
    """A function of a tree as a solver sees it: value and gradient at a flat vector."""

    layout: Layout
    #: Whether gradients are recorded, so that what is computed from them can be differentiated.
    create_graph: bool = False

    @abc.abstractmethod
    def __call__(self, x: Tensor) -> tuple[Number, Tensor]:
        """Return value and gradient; nothing of the graph that was not asked for."""

    def number(self, x: Tensor) -> Number:
        """Return a tensor with one entry as a number of the arithmetic between calls.

        It keeps its dtype, so that steps in float32 are those of ``torch.optim`` to the bit.
        """
        if self.create_graph:
            return x.reshape(())
        return x.item() if x.dtype == torch.float64 else x.detach().reshape(()).cpu()


class TreeObjective(Objective):
    """A function that is given the tree.

    Args:
        fn: ``fn(params, *args)`` returns the value, a real tensor with one entry.
        layout: Of ``params``.
        args: Passed on.
        create_graph: Record gradients.
    """

    def __init__(
        self,
        fn: Callable[..., Tensor],
        layout: Layout,
        args: Sequence[PyTree] = (),
        create_graph: bool = False,
    ) -> None:
        if not callable(fn):
            raise TypeError(
                f"fn must be a function of the parameters, got {given(fn)}. Write "
                "minimize(fn, solver, params)."
            )
        self.fn, self.layout, self.args, self.create_graph = fn, layout, args, create_graph

    def __call__(self, x: Tensor) -> tuple[Number, Tensor]:
        """Return value and gradient."""
        with torch.enable_grad():
            if not (self.create_graph and x.requires_grad):
                x = x.detach().requires_grad_()
            value = self.fn(self.layout.unflatten(x), *self.args)
            check_value(value, "fn")
            (grad,) = torch.autograd.grad(
                value, x, create_graph=self.create_graph, allow_unused=True
            )
        if grad is None:
            raise ValueError(
                "The value of fn does not depend on its first argument, the parameters. Compute "
                "it from them, not from tensors of the same content outside of fn."
            )
        return (value.reshape(()) if self.create_graph else value.item()), grad


def check_value(value: Any, title: str) -> None:
    """Refuse what is no differentiable scalar.

    Raises:
        TypeError: If it is no tensor.
        ValueError: If it has several entries, is complex or has no graph.
    """
    if not isinstance(value, Tensor):
        advice = " Does it return the value?" if value is None else ""
        raise TypeError(f"{title} must return a scalar tensor, got {given(value)}.{advice}")
    if value.numel() != 1 or value.is_complex():
        raise ValueError(
            f"{title} must return one real number, got {misuse.short(value)}. Take its mean(), "
            "sum(), abs() or real."
        )
    if not value.requires_grad:
        raise ValueError(
            f"{title} returned a tensor without a graph: it was computed under torch.no_grad() or "
            "inference_mode(), or detached (detach, item, numpy)."
        )
