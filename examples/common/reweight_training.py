"""Learning to reweight: the weight of each training example from one virtual step of SGD."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchopt
from common.digit_data import Images, Problem


WEIGHT_BINS = torch.linspace(
    0, 8, 33
)  # times an equal share; the last bin also takes what is above


def build_network(image_size: int, classes: int, channels: int) -> nn.Sequential:
    """Return a LeNet, of 5x5 convolutions for images of 28 pixels and of 3x3 for 8.

    Args:
        image_size: Height and width of the images.
        classes: Number of outputs.
        channels: Of the first convolution; the second has twice as many.
    """
    kernel, padding = (5, 0) if image_size > 16 else (3, 1)
    side = (image_size + 2 * padding - kernel + 1) // 2
    side = (side + 2 * padding - kernel + 1) // 2
    return nn.Sequential(
        nn.Conv2d(1, channels, kernel, padding=padding),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(channels, 2 * channels, kernel, padding=padding),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * channels * side * side, 84),
        nn.ReLU(),
        nn.Linear(84, classes),
    )


def example_gradient(network: nn.Module, losses: Tensor, clean: Images, lr: float) -> Tensor:
    """Return how the clean loss after one step of SGD changes with the weight of each example.

    The weights are zero, so the step leaves the network where it is; but the place it leads to
    moves with them. The clean loss there falls with the weight of an example whose gradient points
    as that of the clean loss does.

    Args:
        network: As it is before the step; it is the same afterwards.
        losses: The loss of each training example, with its graph, which is kept.
        clean: Clean examples.
        lr: Learning rate of the step.
    """
    weights = torch.zeros_like(losses, requires_grad=True)
    with torchopt.inner_loop(network, torchopt.sgd(lr=lr)) as inner:
        inner.step((weights * losses).sum())
        clean_loss = F.cross_entropy(network(clean.x), clean.y)
        (gradient,) = torch.autograd.grad(clean_loss, weights, retain_graph=True)
    return gradient


def example_weights(gradient: Tensor) -> Tensor:
    """Return weights that sum to 1: the negative gradient where it is positive, else 0.

    If no example helps, all weights are 0.
    """
    weights = (-gradient).clamp(min=0)
    total = weights.sum()
    return weights / torch.where(total > 0, total, 1)


@dataclass(frozen=True)
class Training:
    """How a network is trained; the same for all methods.

    Attributes:
        steps: Minibatches.
        batch: Images in a minibatch.
        lr: Initial learning rate. The virtual step has it too, but it only scales the weights,
            which are normalised.
        momentum: Of the real steps.
        decay: Whether the learning rate falls to zero as a half cosine.
        channels: Of the first convolution.
    """

    steps: int
    batch: int
    lr: float
    momentum: float
    decay: bool
    channels: int

    def optimizer(self, network: nn.Module, factor: float) -> torchopt.SGD:
        """Return the optimizer of the real steps, with ``factor`` times the learning rate."""
        lr = factor * self.lr
        schedule = torchopt.schedules.cosine_decay(lr, self.steps) if self.decay else lr
        return torchopt.SGD(network.parameters(), lr=schedule, momentum=self.momentum)


class Batch(NamedTuple):
    """What a weighting may look at."""

    network: nn.Module
    losses: Tensor
    labels: Tensor
    problem: Problem
    generator: torch.Generator
    lr: float


def _equal(batch: Batch) -> Tensor:
    return torch.full_like(batch.losses, 1 / len(batch.losses))


def _by_class(batch: Batch) -> Tensor:
    """Weight by the inverse frequency of the class in all that is trained on."""
    counts = torch.bincount(torch.cat([batch.problem.train.y, batch.problem.clean.y]))
    weights = 1 / counts[batch.labels].to(batch.losses.dtype)
    return weights / weights.sum()


def _random(batch: Batch) -> Tensor:
    """Weight by normal random numbers, the negative ones set to zero."""
    normal = torch.randn(len(batch.losses), generator=batch.generator)
    weights = normal.clamp(min=0).to(batch.losses)
    return weights / weights.sum().clamp(min=1e-12)


def _learned(batch: Batch) -> Tensor:
    clean = batch.problem.clean
    return example_weights(example_gradient(batch.network, batch.losses, clean, batch.lr))


class Method(NamedTuple):
    """How a method weights a minibatch, and its learning rate in units of the usual one."""

    weights: Callable[[Batch], Tensor]
    rate: float = 1.0


REWEIGHTED, PLAIN, FAST, CLEAN = "learned weights", "plain", "plain, lr x 10", "clean images only"
METHODS = {
    PLAIN: Method(_equal),
    FAST: Method(_equal, rate=10.0),
    CLEAN: Method(_equal),
    "class weights": Method(_by_class),
    "random weights": Method(_random),
    REWEIGHTED: Method(_learned),
}


def train(
    method: str, problem: Problem, training: Training, seed: int, measurements: int
) -> Iterator[dict[str, Any]]:
    """Train a network and measure it now and then.

    All methods but the learned weights, which have the clean images to judge by, train on the
    clean images as well.

    Args:
        method: A key of ``METHODS``.
        problem: What to train on.
        training: How.
        seed: Of the initial network and of the choice of minibatches.
        measurements: How often to measure, at even distances; also at the end.

    Yields:
        ``step``, ``loss`` (weighted, mean since the last measurement) and ``test_accuracy``; the
        last also ``marked_weight`` (see :class:`WeightRecord`) and its histograms.
    """
    examples, marked = _examples(method, problem)
    device = examples.x.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_network(examples.x.shape[-1], problem.classes, training.channels)
    generator = torch.Generator().manual_seed(seed)
    optimizer = training.optimizer(network.to(device), METHODS[method].rate)
    record = WeightRecord()
    losses_seen: list[Tensor] = []
    stops = {round(training.steps * (k + 1) / measurements) for k in range(measurements)}
    for step in range(1, training.steps + 1):
        chosen = torch.randint(len(examples), (training.batch,), generator=generator).to(device)
        batch = examples[chosen]
        losses = F.cross_entropy(network(batch.x), batch.y, reduction="none")
        seen = Batch(network, losses, batch.y, problem, generator, training.lr)
        weights = METHODS[method].weights(seen)
        loss = (weights * losses).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses_seen.append(loss.detach())
        if step > training.steps // 2:
            record.add(weights, marked[chosen])
        if step in stops:
            row = {"step": step, "loss": torch.stack(losses_seen).mean().item()}
            row["test_accuracy"] = accuracy(network, problem.test)
            losses_seen.clear()
            yield {**row, **record.summary()} if step == training.steps else row


def _examples(method: str, problem: Problem) -> tuple[Images, Tensor]:
    """Return what a method trains on, and which of it is rare or wrongly labelled."""
    unmarked = torch.zeros(len(problem.clean), dtype=torch.bool, device=problem.marked.device)
    if method == REWEIGHTED:
        return problem.train, problem.marked
    if method == CLEAN:
        return problem.clean, unmarked
    return Images.join(problem.train, problem.clean), torch.cat([problem.marked, unmarked])


def accuracy(network: nn.Module, images: Images) -> float:
    """Return the share of right answers in percent."""
    with torch.no_grad():
        right = network(images.x).argmax(-1) == images.y
    return 100 * right.double().mean().item()


class WeightRecord:
    """Which weights examples got, apart for the marked (rare or wrongly labelled) and the others.

    Weights are counted in equal shares: 1 is what an example has in plain training.
    """

    def __init__(self) -> None:
        self.weights: list[Tensor] = []
        self.marked: list[Tensor] = []

    def add(self, weights: Tensor, marked: Tensor) -> None:
        """Record a minibatch."""
        self.weights.append(weights.detach() * len(weights))
        self.marked.append(marked)

    def summary(self) -> dict[str, Any]:
        """Return the mean weight of both kinds and the histograms over ``WEIGHT_BINS``."""
        weights, marked = torch.cat(self.weights).cpu(), torch.cat(self.marked).cpu()
        result: dict[str, Any] = {}
        for name, part in (("marked", weights[marked]), ("other", weights[~marked])):
            counts, _ = torch.histogram(part.float().clamp(max=WEIGHT_BINS[-1]), WEIGHT_BINS)
            result[f"{name}_weight"] = part.mean().item() if len(part) else None
            result[f"{name}_counts"] = counts.long().tolist()
        return result
