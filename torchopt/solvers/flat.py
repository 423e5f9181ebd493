"""A tree of parameters as one flat vector of reals, and a function of it as solvers see it."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Union

import torch
from torch import Tensor
from typing_extensions import TypeAlias

from torchopt.base import layout, misuse, tree
from torchopt.base.distributed import whole
from torchopt.base.misuse.given import given
from torchopt.typing import PyTree, TensorTree


#: A number of the arithmetic between function calls: a float, or a 0-d tensor with its history
#: where the solver itself is differentiated.
Number: TypeAlias = Union[float, Tensor]


class Layout(layout.Layout):
    """How the leaves of a tree of parameters lie in one vector; every process has that of all.

    Raises:
        TypeError: If a leaf is no tensor of floating-point or complex numbers.
        ValueError: If there is no entry, or they are on several devices.
    """

    def __init__(self, params: TensorTree, what: str = "params") -> None:
        super().__init__(params, what, " Give constants as further arguments of the function.")
        if not self.numel:
            raise ValueError(f"{what} must have at least one entry, got none.")

    def flatten(self, params: TensorTree) -> Tensor:
        """Return the entries of a tree as a new vector."""
        return self.join(tree.flatten(params)[0])

    def reals(self, leaf: Tensor, dtype: torch.dtype | None) -> Tensor:
        """Return the entries of one leaf, whose place is of a dtype, as a vector."""
        return super().reals(whole(leaf), dtype)


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


class OfTree(Objective):
    """A function that is given the tree, as a solver sees it.

    Args:
        fn: Called as ``fn(params, *args)``.
        layout: Of ``params``.
        args: Passed on.
        create_graph: Record what is computed.
    """

    called: ClassVar[str]  #: By which function solvers of this kind are run.

    def __init__(
        self,
        fn: Callable[..., Any],
        layout: Layout,
        args: Sequence[PyTree] = (),
        create_graph: bool = False,
    ) -> None:
        if not callable(fn):
            raise TypeError(
                f"fn must be a function of the parameters, got {given(fn)}. Write "
                f"{self.called}(fn, solver, params)."
            )
        self.fn, self.layout, self.args, self.create_graph = fn, layout, args, create_graph


class TreeObjective(OfTree):
    """A function whose value, a real tensor with one entry, is to be small."""

    called: ClassVar[str] = "minimize"

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
