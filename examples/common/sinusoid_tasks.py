"""What a network learns from waves: the tasks of :mod:`common.sinusoid`, adaptation, errors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

import torchopt


Params = dict[str, Tensor]
RANGE = 5.0  # points lie in [-RANGE, RANGE]
GRID = torch.linspace(-RANGE, RANGE, 101).unsqueeze(-1)  # where errors are measured
FINE_TUNING_RATES = (0.001, 0.003, 0.01, 0.02, 0.03, 0.05, 0.1)
CHUNK = 100  # waves that are fitted at once: their weights and activations stay in the cache
VALIDATION_WAVES = 200  # for each seed, to choose the step size of fine-tuning


# Waves ------------------------------------------------------------------------------------------


@dataclass
class Waves:
    """Sine waves: amplitudes and phases ``[..., 1, 1]``, functions of points ``[..., K, 1]``."""

    amplitude: Tensor
    phase: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Return the values at ``x``."""
        return self.amplitude * torch.sin(x + self.phase)

    def to(self, device: torch.device) -> Waves:
        """Return the waves on a device."""
        return Waves(self.amplitude.to(device), self.phase.to(device))

    def described(self, x: Tensor) -> Tensor:
        """Return ``x`` with amplitude and phase beside it: what the oracle is told."""
        shape = torch.broadcast_shapes(x.shape, self.amplitude.shape)
        columns = (x, self.amplitude, self.phase)
        return torch.cat([c.expand(shape) for c in columns], -1)


def sample_waves(shape: tuple[int, ...], generator: torch.Generator) -> Waves:
    """Draw waves of the paper's distribution."""
    amplitude, phase = torch.rand(2, *shape, 1, 1, generator=generator)
    return Waves(0.1 + 4.9 * amplitude, math.pi * phase)


def sample_points(shape: tuple[int, ...], count: int, generator: torch.Generator) -> Tensor:
    """Draw ``count`` points in the range for each of ``shape``."""
    return RANGE * (2 * torch.rand(*shape, count, 1, generator=generator) - 1)


# Networks ---------------------------------------------------------------------------------------


def make_network(inputs: int = 1) -> nn.Sequential:
    """Return the paper's network."""
    return nn.Sequential(
        *(nn.Linear(inputs, 40), nn.ReLU()),
        *(nn.Linear(40, 40), nn.ReLU()),
        nn.Linear(40, 1),
    )


def initial_params(seeds: int, seed: int, inputs: int = 1) -> Params:
    """Return the stacked initial weights ``[seeds, ...]`` of one network for each seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stacked, _ = stack_module_state([make_network(inputs) for _ in range(seeds)])
    return {name: p.detach() for name, p in stacked.items()}


NETWORKS = {inputs: make_network(inputs).to("meta") for inputs in (1, 3)}  # structure only


def predict(params: Params, x: Tensor) -> Tensor:
    """Return the network's outputs ``[K, 1]`` at the points ``x``."""
    return functional_call(NETWORKS[x.shape[-1]], params, (x,))


def squared_error(params: Params, x: Tensor, y: Tensor) -> Tensor:
    """Return the mean squared error on points ``[K, 1]``."""
    return (predict(params, x) - y).square().mean()


def adaptation(
    params: Params, x: Tensor, y: Tensor, lr: float, steps: int, first_order: bool = False
) -> list[Params]:
    """Return the weights before and after each gradient step on the points of one wave."""
    tx = torchopt.sgd(lr)
    state = tx.init(params)
    path = [params]
    for _ in range(steps):
        grads = grad(squared_error)(params, x, y)
        if first_order:
            grads = {name: g.detach() for name, g in grads.items()}
        updates, state = tx.update(grads, state, params, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)
        path.append(params)
    return path


# Tests ------------------------------------------------------------------------------------------


@dataclass
class Condition:
    """What a learner is tested on.

    Attributes:
        shots: Points of a wave.
        half: Whether all points lie at x > 0, and errors are measured at x < 0.
    """

    shots: int
    half: bool = False

    def __str__(self) -> str:
        return f"{self.shots} points" + (" at x > 0, error at x < 0" if self.half else "")

    def draw(self, seeds: int, waves: int, seed: int) -> tuple[Waves, Tensor]:
        """Return waves ``[seeds, waves]`` and their points, the same ones for the same ``seed``."""
        generator = torch.Generator().manual_seed(seed)
        drawn = sample_waves((seeds, waves), generator)
        x = sample_points((seeds, waves), self.shots, generator)
        return drawn, x.abs() if self.half else x

    def errors(self, predictions: Tensor, waves: Waves) -> Tensor:
        """Return the mean squared error of each seed after each step ``[seeds, steps + 1]``.

        Args:
            predictions: On the grid ``[seeds, waves, steps + 1, points of the grid]``.
            waves: The truth.
        """
        grid = GRID.flatten().to(predictions)
        squared = (predictions - waves(grid)).square()
        return (squared[..., grid < 0] if self.half else squared).mean((1, 3))


@torch.no_grad()  # the gradients of the steps are taken all the same; nothing else is recorded
def fits(
    params: Params, waves: Waves, x: Tensor, lr: float, steps: int, last: bool = False
) -> Tensor:
    """Return what the networks predict on the grid before and after each gradient step.

    Args:
        params: Stacked weights ``[seeds, ...]``.
        waves: Waves ``[seeds, waves]``.
        x: Their points ``[seeds, waves, K, 1]``.
        lr: Of the steps.
        steps: How many.
        last: Whether only the predictions after the last step are wanted.

    Returns:
        ``[seeds, waves, steps + 1 or 1, points of the grid]``.
    """
    kept = slice(-1, None) if last else slice(None)

    def one(params: Params, x: Tensor, y: Tensor) -> Tensor:
        path = adaptation(params, x, y, lr, steps)
        return torch.stack([predict(weights, GRID.to(x)).flatten() for weights in path[kept]])

    return vmap(vmap(one, in_dims=(None, 0, 0), chunk_size=CHUNK))(params, x, waves(x))


@torch.no_grad()
def told_fits(params: Params, waves: Waves) -> Tensor:
    """Return what an oracle's networks predict on the grid; as :func:`fits`, with no step."""
    told = waves.described(GRID.to(waves.phase))
    return vmap(vmap(predict, in_dims=(None, 0)))(params, told).transpose(-1, -2)


def tuned_rate(params: Params, condition: Condition, steps: int, seed: int) -> float:
    """Return the step size with which fine-tuning is best on validation waves."""
    some = next(iter(params.values()))
    waves, x = condition.draw(len(some), VALIDATION_WAVES, seed)
    waves, x = waves.to(some.device), x.to(some.device)

    def final_error(lr: float) -> float:
        after = fits(params, waves, x, lr, steps, last=True)
        final = condition.errors(after, waves).mean().item()
        return final if math.isfinite(final) else math.inf

    return min(FINE_TUNING_RATES, key=final_error)
