r"""Gradients of an outer loss by what an inner problem depends on: exact ones and cheaper ones.

With :math:`w^\star(\lambda) = \arg\min_w f(w, \lambda)`,

.. math::
    \frac{d L(w^\star, \lambda)}{d\lambda}
    = \frac{\partial L}{\partial\lambda}
    - \frac{\partial^2 f}{\partial\lambda\, \partial w}\, q,
    \qquad q = \Big(\frac{\partial^2 f}{\partial w^2}\Big)^{-1} \frac{\partial L}{\partial w}

and the methods differ in what they take for :math:`q`, and in how they take the last product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from torchopt.base import misuse, tree
from torchopt.base.misuse.given import given
from torchopt.diff.implicit.adjoint import Implicit
from torchopt.diff.pullback import Tensors, pullback
from torchopt.diff.stationarity import gradient_of, scalar
from torchopt.typing import PyTree, TensorTree


class Method(Protocol):
    """How the second term of a hypergradient is computed."""

    def indirect(self, problem: Problem) -> Tensors:
        """Return the second term, a tensor for each leaf of the outer parameters."""
        ...


def hypergradient(
    outer_loss: Callable[[Any, Any], Tensor],
    inner_loss: Callable[[Any, Any], Tensor],
    inner_params: TensorTree,
    outer_params: TensorTree,
    method: Method | None = None,
) -> TensorTree:
    r"""Return the gradient of an outer loss at a solution of an inner problem, or an estimate.

    .. math::
        \frac{\partial L}{\partial\lambda}
        - \frac{\partial^2 f}{\partial\lambda\, \partial w}\,
        \Big(\frac{\partial^2 f}{\partial w^2}\Big)^{-1} \frac{\partial L}{\partial w}

    * ``Implicit(solve=...)`` solves the system to a tolerance: a product with the Hessian for each
      iteration of the linear solver; exact at a solution of the inner problem;
    * ``Neumann(terms)`` sums powers: one product for each term but the first;
    * ``T1T2(lr)`` takes ``lr`` times the identity for the inverse: no such product;
    * ``FiniteDifference(lr)`` does the same without second derivatives: two more gradients;
    * ``SAMA(tx, state)`` takes the derivative of an optimizer's step: three more gradients.

    Args:
        outer_loss: :math:`L`, called as ``outer_loss(inner_params, outer_params)``; a scalar.
        inner_loss: :math:`f`, called likewise. Of a network:
            ``lambda w, h: loss(torch.func.functional_call(net, w, x), h)``.
        inner_params: :math:`w`, any tree of floating-point tensors, at a minimum of
            ``inner_loss`` or on the way to it. Constants.
        outer_params: :math:`\lambda`, likewise.
        method: One of these; ``None`` is ``Implicit()``.

    Returns:
        A tree like ``outer_params``, without history. Nothing that was given has changed.

    Raises:
        TypeError: If a loss is no function or returns no tensor, or a leaf is no floating-point
            tensor.
        ValueError: If a loss is not scalar; if a Neumann series diverges.

    Example:
        >>> import torch
        >>> from torchopt.diff import T1T2, hypergradient
        >>> inner = lambda w, h: (w - 1).square().sum() + h * w.square().sum()
        >>> outer = lambda w, h: (w - 0.25).square().sum()
        >>> h = torch.tensor(1.0)
        >>> w = torch.tensor([0.5])  # 1 / (1 + h)
        >>> hypergradient(outer, inner, w, h)
        tensor(-0.1250)
        >>> hypergradient(outer, inner, w, h, T1T2(lr=0.1))
        tensor(-0.0500)

    Reference:
        Lorraine, Vicol and Duvenaud, Optimizing millions of hyperparameters by implicit
        differentiation, AISTATS 2020, https://arxiv.org/abs/1911.02590.
    """
    method = Implicit() if method is None else method
    if isinstance(method, type) or not callable(getattr(method, "indirect", None)):
        raise TypeError(
            "method must be one of torchopt.diff.Implicit(), Neumann(), T1T2(), "
            f"FiniteDifference() and SAMA(), got {given(method)}."
        )
    problem = Problem(outer_loss, inner_loss, inner_params, outer_params)
    found = method.indirect(problem)
    total = [a + b for a, b in zip(problem.direct, found)]
    return tree.unflatten(problem.outer_spec, [x.detach() for x in total])


class Problem:
    """An inner and an outer loss at a point, as functions of lists of tensors.

    Attributes:
        direct: The gradient of the outer loss by the outer parameters, the inner ones fixed.
        pull: That by the inner parameters.
    """

    def __init__(
        self,
        outer_loss: Callable[[Any, Any], Tensor],
        inner_loss: Callable[[Any, Any], Tensor],
        inner_params: TensorTree,
        outer_params: TensorTree,
    ) -> None:
        for name, loss in (("outer_loss", outer_loss), ("inner_loss", inner_loss)):
            if not callable(loss):
                raise TypeError(
                    f"{name} must be a function of inner and outer parameters, got {given(loss)}."
                )
        self.inner_loss = inner_loss
        self.w, self.inner_spec = _leaves(inner_params, "inner_params")
        self.h, self.outer_spec = _leaves(outer_params, "outer_params")
        n = len(self.w)

        def outer(*tensors: Tensor) -> Tensor:
            value = outer_loss(*self.trees(tensors[:n], tensors[n:]))
            return scalar(value, "outer_loss")

        with torch.no_grad():
            grads = gradient_of(outer, [*self.w, *self.h])
        self.pull, self.direct = grads[:n], grads[n:]

    def trees(self, w: Sequence[Tensor], h: Sequence[Tensor]) -> tuple[PyTree, PyTree]:
        """Return lists as the trees that the losses take."""
        return tree.unflatten(self.inner_spec, list(w)), tree.unflatten(self.outer_spec, list(h))

    def inner(self, w: Sequence[Tensor], h: Sequence[Tensor]) -> Tensor:
        """Return the inner loss."""
        return scalar(self.inner_loss(*self.trees(w, h)), "inner_loss")

    def inner_gradient(self, w: Sequence[Tensor], h: Sequence[Tensor]) -> Tensors:
        """Return the gradient of the inner loss by the inner parameters; it can be recorded."""
        return gradient_of(lambda *w: self.inner(w, h), w)

    def outer_gradient_at(self, w: Sequence[Tensor]) -> Tensors:
        """Return the gradient of the inner loss by the outer parameters, as numbers."""
        with torch.no_grad():
            return gradient_of(lambda *h: self.inner(w, h), self.h)

    def hessian(self) -> Callable[[Tensors], Tensors]:
        """Return the product with the Hessian by the inner parameters."""
        product = pullback(lambda w: self.inner_gradient(w, self.h), self.w)[1]
        return without_graph(product)

    def mixed(self, q: Sequence[Tensor]) -> Tensors:
        """Return the product with the second derivatives by outer and inner parameters."""
        product = pullback(lambda h: self.inner_gradient(self.w, h), self.h)[1]
        return without_graph(product)(tuple(q))

    def mixed_by_differences(self, q: Sequence[Tensor], scale: float | None) -> Tensors:
        """Return the same by a central difference of two gradients.

        Weights are not written to. Random numbers, of dropout, are the same for both.
        """
        size = norm(q)
        if size == 0:
            return tuple(torch.zeros_like(x) for x in self.h)
        rounding = max(torch.finfo(x.dtype).eps for x in self.w)
        step = (rounding ** (1 / 3) if scale is None else scale) * (norm(self.w) or 1.0) / size
        states = _random_states(self.w)
        above = self.outer_gradient_at([x + step * v for x, v in zip(self.w, q)])
        _set_random_states(states)
        below = self.outer_gradient_at([x - step * v for x, v in zip(self.w, q)])
        return tuple((a - b) / (2 * step) for a, b in zip(above, below))


def norm(tensors: Sequence[Tensor]) -> float:
    """Return the Euclidean norm of all tensors together."""
    return sum(float(x.detach().double().square().sum()) for x in tensors) ** 0.5


def _leaves(params: TensorTree, what: str) -> tuple[list[Tensor], Any]:
    leaves, spec = tree.flatten(params)
    for name, x in zip(tree.leaf_names(params), leaves):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            found = misuse.short(x) if isinstance(x, Tensor) else given(x)
            raise TypeError(
                f"{what} must be floating-point tensors, got {found} at {tree.quoted(name)}. Of a "
                "network write dict(net.named_parameters())."
            )
    if not leaves:
        raise ValueError(f"{what} holds no tensor.")
    return [x.detach() for x in leaves], spec


def without_graph(product: Callable[[Tensors], Tensors]) -> Callable[[Tensors], Tensors]:
    """Return a product that is not recorded."""

    def called(v: Tensors) -> Tensors:
        with torch.no_grad():
            return product(v)

    return called


def _random_states(like: Sequence[Tensor]) -> list[tuple[Any, Tensor]]:
    """Return the random states of the CPU and of the devices that tensors are on."""
    states: list[tuple[Any, Tensor]] = [(torch, torch.get_rng_state())]
    for device in {x.device for x in like if x.device.type == "cuda"}:
        states.append((device, torch.cuda.get_rng_state(device)))
    return states


def _set_random_states(states: Sequence[tuple[Any, Tensor]]) -> None:
    for owner, state in states:
        if owner is torch:
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, owner)
