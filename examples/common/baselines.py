"""What a few-shot learner must beat: no meta-training, and ordinary pre-training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

import torchopt
from common.datasets import ImageClasses
from common.episodes import EpisodeSampler
from common.maml import Accuracy, Learner, Params, initial_rates, measured_accuracy


FINE_TUNING_RATES = (0.01, 0.03, 0.1, 0.3)
FINE_TUNING_STEPS = (5, 20, 50)
CHOICE_SHARE = 15  # settings are chosen on a fifteenth of the number of test tasks


def best_fine_tuning(
    learner: Learner,
    params: Params,
    choice: Callable[[], EpisodeSampler],
    tasks: int,
    counts: Sequence[int],
) -> tuple[float, int]:
    """Return learning rate and number of SGD steps that do best on tasks of training classes.

    The baselines are not meta-trained, so they may take more steps than the meta-trained network;
    how many, of ``counts``, is chosen without a look at the test classes.
    """
    learner = replace(learner, optimizer="sgd")

    def accuracy(setting: tuple[float, int]) -> float:
        rates = initial_rates(params, setting[0])
        return measured_accuracy(learner, params, rates, choice(), setting[1], tasks).mean

    return max(((lr, n) for lr in FINE_TUNING_RATES for n in counts), key=accuracy)


def fine_tuned(
    learner: Learner,
    params: Params,
    choice: Callable[[], EpisodeSampler],
    test: Callable[[], EpisodeSampler],
    tasks: int,
    counts: Sequence[int] = FINE_TUNING_STEPS,
) -> tuple[Accuracy, str]:
    """Return the test accuracy of fine-tuning ``params``, and its settings in words."""
    lr, steps = best_fine_tuning(learner, params, choice, max(10, tasks // CHOICE_SHARE), counts)
    learner = replace(learner, optimizer="sgd")
    accuracy = measured_accuracy(learner, params, initial_rates(params, lr), test(), steps, tasks)
    return accuracy, f"{steps} SGD steps, lr {lr}"


def pretrain(
    network: nn.Module,
    classes: ImageClasses,
    iterations: int,
    seed: int,
    report: Callable[[int, float, float], None],
    batch_size: int = 128,
    lr: float = 3e-3,
) -> None:
    """Train a network in place to tell all training classes apart, by Adam with cosine decay.

    Args:
        network: Has one output for each class.
        classes: The training classes.
        iterations: Number of minibatches.
        seed: Of the choice of minibatches.
        report: Called after each iteration with its number, loss and accuracy.
        batch_size: Images in a minibatch.
        lr: Initial learning rate.
    """
    device = next(network.parameters()).device
    images = torch.cat(classes.images)
    labels = torch.cat([torch.full((len(x),), k) for k, x in enumerate(classes.images)])
    generator = torch.Generator().manual_seed(seed)
    optimizer = torchopt.Adam(network.parameters(), lr=lr)
    for iteration in range(1, iterations + 1):
        fraction = (iteration - 1) / iterations
        optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * fraction))
        chosen = torch.randint(len(images), (batch_size,), generator=generator)
        x, y = images[chosen].to(device), labels[chosen].to(device)
        logits = network(x)
        loss = F.cross_entropy(logits, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        report(iteration, loss.item(), (logits.argmax(-1) == y).double().mean().item())


def with_fresh_head(body: Params, fresh: Params) -> Params:
    """Return the pre-trained weights with the head of a network for the tasks."""
    weights = {name: fresh[name] if name.startswith("head.") else body[name] for name in fresh}
    return {name: weight.detach().clone() for name, weight in weights.items()}
