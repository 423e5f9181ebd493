"""Cheaper stand-ins for the inverse Hessian of a hypergradient."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from torchopt.base import tree
from torchopt.base.misuse.given import given
from torchopt.core import hyper
from torchopt.core.transform import GradientTransformation
from torchopt.diff.hypergradients import Problem, norm, without_graph
from torchopt.diff.pullback import Tensors, pullback


@dataclass(frozen=True)
class Estimate(abc.ABC):
    """A method that replaces the inverse by something cheaper."""

    @abc.abstractmethod
    def indirect(self, problem: Problem) -> Tensors:
        """Return the second term."""


@dataclass(frozen=True)
class T1T2(Estimate):
    r"""Take a multiple of the identity for the inverse Hessian.

    .. math:: q = \eta\, \frac{\partial L}{\partial w}

    It is the gradient through one step of gradient descent with the learning rate :math:`\eta`,
    taken at the point where the step ends.

    Args:
        lr: :math:`\eta > 0`.

    Example:
        >>> from torchopt.diff import T1T2
        >>> T1T2(lr=0.1)
        T1T2(lr=0.1)

    Reference:
        Luketina et al., Scalable gradient-based tuning of continuous regularization
        hyperparameters, ICML 2016, https://arxiv.org/abs/1511.06727.
    """

    lr: float = 1.0

    def __post_init__(self) -> None:
        hyper.check_number("lr", self.lr, hyper.HyperSpec(gt=0))

    def indirect(self, problem: Problem) -> Tensors:
        """Return the second term."""
        return problem.mixed([-self.lr * v for v in problem.pull])


@dataclass(frozen=True)
class Neumann(Estimate):
    r"""Take some terms of the Neumann series for the inverse Hessian.

    .. math:: q = \eta \sum_{j=0}^{n-1} (I - \eta H)^j\, \frac{\partial L}{\partial w}

    It is the gradient through the last ``terms`` steps of gradient descent with the learning rate
    :math:`\eta`, as if the Hessian had been the same in all. It converges for
    :math:`\eta < 2 / \lambda_\text{max}` and a positive definite :math:`H`, in about
    :math:`1 / (\eta\, \lambda_\text{min})` terms.

    Args:
        terms: :math:`n \ge 1`; one is :class:`T1T2`.
        lr: :math:`\eta > 0`; ``None`` is :math:`1 / \lambda_\text{max}`, which ten products with
            the Hessian estimate.

    Raises:
        ValueError: When used, if the terms grow.

    Example:
        >>> import torch
        >>> from torchopt.diff import Neumann, hypergradient
        >>> inner = lambda w, h: (w - 1).square() + h * w.square()
        >>> outer = lambda w, h: w.square()
        >>> w, h = torch.tensor(0.5), torch.tensor(1.0)
        >>> [
        ...     round(hypergradient(outer, inner, w, h, Neumann(n, 0.125)).item(), 4)
        ...     for n in (1, 2, 20)
        ... ]
        [-0.125, -0.1875, -0.25]

    Reference:
        Lorraine, Vicol and Duvenaud, Optimizing millions of hyperparameters by implicit
        differentiation, AISTATS 2020, algorithm 3, https://arxiv.org/abs/1911.02590.
    """

    terms: int = 10
    lr: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.terms, int) or isinstance(self.terms, bool) or self.terms < 1:
            raise ValueError(f"terms must be an integer >= 1, got {given(self.terms)}.")
        if self.lr is not None:
            hyper.check_number("lr", self.lr, hyper.HyperSpec(gt=0))

    def indirect(self, problem: Problem) -> Tensors:
        """Return the second term."""
        product = problem.hessian()
        lr = 1 / largest_eigenvalue(product, problem.pull) if self.lr is None else self.lr
        term = problem.pull
        total, first = list(term), norm(term)
        for _ in range(self.terms - 1):
            term = tuple(v - lr * u for v, u in zip(term, product(term)))
            total = [a + b for a, b in zip(total, term)]
        if not norm(term) <= max(first, 1e-300) * 1.0001:
            raise ValueError(
                f"The Neumann series diverges: its last term is {norm(term) / first:.3g} times the "
                f"first, with lr={lr:.3g}. Lower lr below 2 / (largest eigenvalue of the Hessian), "
                "or give lr=None; if that does not help, the Hessian is not positive definite "
                "here: train for longer, add weight decay, or take T1T2()."
            )
        return problem.mixed([-lr * v for v in total])


def largest_eigenvalue(product: Callable[[Tensors], Tensors], start: Tensors) -> float:
    """Return an estimate, from above, of the largest absolute eigenvalue, by power iteration."""
    size = norm(start)
    if size == 0:
        return 1.0
    generator = torch.Generator().manual_seed(0)  # so that the result can be had again
    noise = [torch.randn(x.shape, generator=generator).to(x) for x in start]
    v = tuple(x / size + 0.1 * n / norm(noise) for x, n in zip(start, noise))
    found = 0.0
    for _ in range(10):
        size = norm(v)
        v = product(tuple(x / size for x in v))
        found = norm(v)
        if found == 0:
            return 1.0
    return 1.1 * found


@dataclass(frozen=True)
class FiniteDifference(Estimate):
    r"""Like :class:`T1T2`, with a central difference instead of second derivatives.

    .. math::
        \frac{\partial^2 f}{\partial\lambda\, \partial w}\, v \approx
        \frac{\nabla_\lambda f(w + \epsilon v, \lambda) - \nabla_\lambda f(w - \epsilon v, \lambda)}
        {2 \epsilon}, \qquad
        \epsilon = c\, \frac{\lVert w \rVert}{\lVert v \rVert}

    No second derivative is taken, so the network may consist of any operations.

    Args:
        lr: :math:`\eta > 0`, as of :class:`T1T2`.
        scale: :math:`c > 0`; ``None`` is the cube root of the rounding of the dtype, 6e-6 in
            float64 and 5e-3 in float32. Half precision has too few digits.

    Example:
        >>> from torchopt.diff import FiniteDifference
        >>> FiniteDifference(lr=0.1)
        FiniteDifference(lr=0.1, scale=None)

    Reference:
        Liu, Simonyan and Yang, DARTS: Differentiable architecture search, ICLR 2019,
        https://arxiv.org/abs/1806.09055.
    """

    lr: float = 1.0
    scale: float | None = None

    def __post_init__(self) -> None:
        hyper.check_number("lr", self.lr, hyper.HyperSpec(gt=0))
        if self.scale is not None:
            hyper.check_number("scale", self.scale, hyper.HyperSpec(gt=0))

    def indirect(self, problem: Problem) -> Tensors:
        """Return the second term."""
        q = [-self.lr * v for v in problem.pull]
        return problem.mixed_by_differences(q, self.scale)


@dataclass(frozen=True)
class SAMA(Estimate):
    r"""Take the derivative of an optimizer's step for the inverse, and a central difference.

    .. math::
        \frac{d L}{d\lambda} \approx \frac{\partial L}{\partial\lambda}
        + \frac{\partial^2 f}{\partial\lambda\, \partial w}\, v, \qquad
        v = \Big(\frac{\partial u}{\partial g}\Big)^\top \frac{\partial L}{\partial w}

    with the step :math:`w \leftarrow w + u(g)` of an adaptive optimizer for the gradient
    :math:`g = \partial f / \partial w`. With gradient descent it is :class:`FiniteDifference`.

    Args:
        tx: The transformation that trains the inner parameters, such as ``torchopt.adam(1e-3)``.
        state: Its state, from that training; ``None`` makes a fresh one.
        scale: As of :class:`FiniteDifference`.

    Raises:
        TypeError: If ``tx`` is no transformation.

    Example:
        >>> import torch, torchopt
        >>> from torchopt.diff import SAMA, hypergradient
        >>> inner = lambda w, h: (w - 1).square() + h * w.square()
        >>> outer = lambda w, h: w.square()
        >>> w, h = torch.tensor(0.5).double(), torch.tensor(1.0).double()
        >>> round(hypergradient(outer, inner, w, h, SAMA(torchopt.sgd(0.125))).item(), 6)
        -0.125

    Reference:
        Choe et al., Making scalable meta learning practical, NeurIPS 2023,
        https://arxiv.org/abs/2310.05674.
    """

    tx: GradientTransformation
    state: Any = dataclasses.field(default=None, repr=False)
    scale: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.tx, GradientTransformation):
            raise TypeError(
                "tx must be the transformation that trains the inner parameters, such as "
                f"torchopt.adam(1e-3), got {given(self.tx)}."
            )
        if self.scale is not None:
            hyper.check_number("scale", self.scale, hyper.HyperSpec(gt=0))

    def indirect(self, problem: Problem) -> Tensors:
        """Return the second term."""
        params = tree.unflatten(problem.inner_spec, problem.w)
        state = self.tx.init(params) if self.state is None else self.state
        with torch.no_grad():
            grads = problem.inner_gradient(problem.w, problem.h)

        def step(g: Tensors) -> Tensors:
            updates = self.tx.update(
                tree.unflatten(problem.inner_spec, list(g)), state, params, inplace=False
            )[0]
            return tuple(tree.flatten(updates)[0])

        q = without_graph(pullback(step, grads)[1])(tuple(problem.pull))
        return problem.mixed_by_differences(q, self.scale)
