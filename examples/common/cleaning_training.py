"""Data hyper-cleaning: a weight for each training example, by the loss on clean ones.

The inner problem trains a linear classifier on weighted examples; the outer one asks for weights
with which its loss on clean examples is small. What differs between the methods is how the trained
classifier is differentiated by the weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import torchopt
from common.digit_data import Images, Problem
from common.memory import peak
from torchopt.diff import Checkpointed, Unrolled, custom_root, unroll
from torchopt.linear_solve import solve_cg


Params = dict[str, Tensor]


@dataclass(frozen=True)
class Cleaning:
    """How weights are learned; the same for all methods.

    Attributes:
        inner_steps: Steps of gradient descent with momentum from zero.
        lr: Of those.
        momentum: Of those.
        ridge: Times the squared weights of the classifier, so that there is one solution.
        outer_steps: Updates of the examples' weights.
        outer_lr: Of Adam, which makes them.
        final_steps: Steps of the training at the end.
    """

    inner_steps: int
    lr: float
    momentum: float
    ridge: float
    outer_steps: int
    outer_lr: float
    final_steps: int


class Inner:
    """The inner problem: a classifier trained on weighted examples.

    Args:
        images: To train on.
        settings: How.
    """

    def __init__(self, images: Images, settings: Cleaning) -> None:
        self.x, self.y, self.settings = images.x.flatten(1), images.y, settings
        self.tx = torchopt.sgd(lr=settings.lr, momentum=settings.momentum)

    def start(self) -> Params:
        """Return a classifier that knows nothing."""
        return {"w": self.x.new_zeros(self.x.shape[1], 10), "b": self.x.new_zeros(10)}

    def loss(self, params: Params, weights: Tensor) -> Tensor:
        """Return the weighted mean cross-entropy with a ridge, strictly convex."""
        losses = F.cross_entropy(logits(params, self.x), self.y, reduction="none")
        ridge = sum(p.square().sum() for p in params.values())
        return (weights * losses).mean() + self.settings.ridge * ridge

    def gradient(self, params: Params, weights: Tensor) -> Params:
        """Return the derivative of the loss by the classifier, which is zero at the solution."""
        return torch.func.grad(self.loss)(params, weights)

    def trained(self, weights: Tensor, steps: int, adjoint: Any = Unrolled()) -> Params:  # noqa: B008
        """Return the classifier after some steps, differentiated as the adjoint says."""

        def step(carry: Any, _: None) -> tuple[Any, None]:
            params, state = carry
            grads = self.gradient(params, weights)
            return self.tx.apply_gradients(grads, state, params, inplace=False), None

        start = self.start()
        (params, _), _ = unroll(step, (start, self.tx.init(start)), length=steps, adjoint=adjoint)
        return params


def logits(params: Params, x: Tensor) -> Tensor:
    """Return what a linear classifier says of flat images."""
    return x @ params["w"] + params["b"]


# Ways to differentiate the trained classifier by the weights ----------------------------------


def _unrolled(inner: Inner, weights: Tensor, steps: int) -> Params:
    return inner.trained(weights, steps)


def _checkpointed(inner: Inner, weights: Tensor, steps: int) -> Params:
    return inner.trained(weights, steps, Checkpointed("sqrt"))


def _at_the_solution(inner: Inner, weights: Tensor, steps: int, solve: Any) -> Params:
    """Differentiate by the condition that the gradient is zero, whatever the steps were."""

    @custom_root(inner.gradient, argnums=1, solve=solve)
    def solver(start: Params, weights: Tensor) -> Params:
        return inner.trained(weights, steps)

    return solver(inner.start(), weights)


def _implicit(inner: Inner, weights: Tensor, steps: int) -> Params:
    return _at_the_solution(inner, weights, steps, solve_cg(maxiter=100, rtol=1e-4))


def _t1_t2(inner: Inner, weights: Tensor, steps: int) -> Params:
    """Take the identity for the inverse Hessian: the derivative of one step at the solution."""
    lr = inner.settings.lr
    return _at_the_solution(
        inner, weights, steps, lambda matvec, b: {name: lr * x for name, x in b.items()}
    )


NONE, CLEAN, ORACLE = "no cleaning", "clean images only", "right labels only"
UNROLLED, CHECKPOINTED, IMPLICIT, T1_T2 = "unrolled", "checkpointed", "implicit", "T1-T2"
LEARNED: dict[str, Callable[[Inner, Tensor, int], Params]] = {
    UNROLLED: _unrolled,
    CHECKPOINTED: _checkpointed,
    IMPLICIT: _implicit,
    T1_T2: _t1_t2,
}
METHODS = (NONE, CLEAN, ORACLE, *LEARNED)


def hypergradient(
    method: str, inner: Inner, clean: Images, scores: Tensor, steps: int
) -> tuple[float, Tensor]:
    """Return the loss on clean images and its derivative by scores, whose sigmoid are weights."""
    scores = scores.detach().requires_grad_()
    params = LEARNED[method](inner, scores.sigmoid(), steps)
    loss = F.cross_entropy(logits(params, clean.x.flatten(1)), clean.y)
    (gradient,) = torch.autograd.grad(loss, scores)
    return loss.item(), gradient


def learn(method: str, problem: Problem, settings: Cleaning) -> Iterator[tuple[float, Tensor]]:
    """Yield, after each update, the loss on clean images before it and the weights."""
    inner = Inner(problem.train, settings)
    scores = torch.zeros(len(problem.train), device=problem.train.x.device)
    outer = torchopt.Adam([scores], lr=settings.outer_lr)
    for _ in range(settings.outer_steps):
        loss, gradient = hypergradient(method, inner, problem.clean, scores, settings.inner_steps)
        scores.grad = gradient
        outer.step()
        yield loss, scores.sigmoid()


def clean_up(method: str, problem: Problem, settings: Cleaning) -> dict[str, Any]:
    """Clean a training set, train on it and on the clean images, and measure.

    Returns:
        ``test_accuracy`` in percent; for learned weights also ``losses`` on clean images,
        ``wrong_weight`` and ``right_weight``, the mean weights of examples with wrong and with
        right labels, ``found``, the share of examples of which a weight above or below a half says
        rightly what they are, and ``seconds`` for each update.
    """
    wrong = problem.marked
    row: dict[str, Any] = {}
    if method in LEARNED:
        began = time.perf_counter()
        losses, weights = zip(*learn(method, problem, settings))
        seconds = (time.perf_counter() - began) / settings.outer_steps
        last = weights[-1]
        row = {
            "losses": [round(loss, 5) for loss in losses],
            "wrong_weight": last[wrong].mean().item(),
            "right_weight": last[~wrong].mean().item(),
            "found": 100 * ((last < 0.5) == wrong).double().mean().item(),
            "seconds": seconds,
        }
    else:
        given = {NONE: torch.ones_like(wrong), CLEAN: torch.zeros_like(wrong), ORACLE: ~wrong}
        last = given[method].to(problem.train.x)
    everything = Inner(Images.join(problem.train, problem.clean), settings)
    last = torch.cat([last, last.new_ones(len(problem.clean))])
    with torch.no_grad():
        weights = last * len(last) / last.sum()
        params = everything.trained(weights, settings.final_steps)
        right = logits(params, problem.test.x.flatten(1)).argmax(-1) == problem.test.y
    return {"test_accuracy": 100 * right.double().mean().item(), **row}


def memory_and_error(
    method: str, problem: Problem, settings: Cleaning, steps: int
) -> dict[str, float]:
    """Return the memory of a hypergradient in MiB, and its distance to that of the unrolled steps.

    The latter relative to its length, at equal weights.
    """
    inner, scores = Inner(problem.train, settings), torch.zeros(len(problem.train))
    scores = scores.to(problem.train.x)
    hypergradient(method, inner, problem.clean, scores, 2)  # loads what it needs
    found: list[Tensor] = []

    def work() -> None:
        found.append(hypergradient(method, inner, problem.clean, scores, steps)[1])

    memory = peak(work, scores.device)
    exact = hypergradient(UNROLLED, inner, problem.clean, scores, steps)[1]
    error = (found[0] - exact).norm() / exact.norm()
    return {"memory": memory, "error": error.item()}
