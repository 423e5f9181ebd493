"""Data hyper-cleaning: a weight for each training example, by the loss on clean ones.

The inner problem trains a linear classifier on weighted examples; the outer one asks for weights
with which its loss on clean examples is small. What differs between the methods is how the trained
classifier is differentiated by the weights.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import torchopt
from common.digit_data import Images, Problem
from common.memory import peak
from torchopt.diff import T1T2, Checkpointed, Implicit, Unrolled, hypergradient, unroll
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


NONE, CLEAN, ORACLE = "no cleaning", "clean images only", "right labels only"
UNROLLED, CHECKPOINTED, IMPLICIT, T1_T2 = "unrolled", "checkpointed", "implicit", "T1-T2"
#: How the trained classifier is differentiated: through its steps, or at the solution.
THROUGH_STEPS = {UNROLLED: Unrolled(), CHECKPOINTED: Checkpointed("sqrt")}
AT_THE_SOLUTION = {IMPLICIT: Implicit(solve=solve_cg(maxiter=100, rtol=1e-4)), T1_T2: T1T2()}
LEARNED = (*THROUGH_STEPS, *AT_THE_SOLUTION)
METHODS = (NONE, CLEAN, ORACLE, *LEARNED)


def derivative(
    method: str, inner: Inner, clean: Images, scores: Tensor, steps: int
) -> tuple[float, Tensor]:
    """Return the loss on clean images and its derivative by scores, whose sigmoid are weights."""

    def outer_loss(params: Params, scores: Tensor) -> Tensor:
        return F.cross_entropy(logits(params, clean.x.flatten(1)), clean.y)

    def inner_loss(params: Params, scores: Tensor) -> Tensor:
        return inner.loss(params, scores.sigmoid())

    if method in THROUGH_STEPS:
        scores = scores.detach().requires_grad_()
        loss = outer_loss(inner.trained(scores.sigmoid(), steps, THROUGH_STEPS[method]), scores)
        (gradient,) = torch.autograd.grad(loss, scores)
    else:
        with torch.no_grad():
            params = inner.trained(scores.sigmoid(), steps)
            loss = outer_loss(params, scores)
        how = AT_THE_SOLUTION[method]
        gradient = hypergradient(outer_loss, inner_loss, params, scores, how)
    return loss.item(), gradient


def learn(method: str, problem: Problem, settings: Cleaning) -> Iterator[tuple[float, Tensor]]:
    """Yield, after each update, the loss on clean images before it and the weights."""
    inner = Inner(problem.train, settings)
    scores = torch.zeros(len(problem.train), device=problem.train.x.device)
    outer = torchopt.Adam([scores], lr=settings.outer_lr)
    for _ in range(settings.outer_steps):
        loss, gradient = derivative(method, inner, problem.clean, scores, settings.inner_steps)
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
    derivative(method, inner, problem.clean, scores, 2)  # loads what it needs
    found: list[Tensor] = []

    def work() -> None:
        found.append(derivative(method, inner, problem.clean, scores, steps)[1])

    memory = peak(work, scores.device)
    exact = derivative(UNROLLED, inner, problem.clean, scores, steps)[1]
    error = (found[0] - exact).norm() / exact.norm()
    return {"memory": memory, "error": error.item()}
