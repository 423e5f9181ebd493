"""Policies, roll-outs and policy gradients of many tasks side by side.

Shapes: ``[tasks, trajectories, steps, ...]``. Parameters are dicts of tensors; those of adapted
policies have ``tasks`` in front.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import torchopt


Params = dict[str, Tensor]


class CategoricalPolicy(nn.Module):
    """A network that gives the logits of discrete actions."""

    def __init__(self, observations: int, actions: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.body = multilayer(observations, actions, hidden)

    def forward(self, observations: Tensor) -> Tensor:
        """Return the logits."""
        return self.body(observations)

    @staticmethod
    def log_prob(logits: Tensor, actions: Tensor) -> Tensor:
        """Return the log-probability of each action."""
        return logits.log_softmax(-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)

    @staticmethod
    def sample(logits: Tensor, generator: torch.Generator) -> Tensor:
        """Draw an action from each row of logits."""
        flat = logits.softmax(-1).flatten(0, -2)
        return torch.multinomial(flat, 1, generator=generator).view(logits.shape[:-1])


class GaussianPolicy(nn.Module):
    """A network that gives the means of continuous actions; their spread is learned as well."""

    def __init__(
        self, observations: int, actions: int, hidden: tuple[int, ...], spread: float
    ) -> None:
        super().__init__()
        self.body = multilayer(observations, actions, hidden)
        self.scale = spread  # actions are of this size, the network's outputs of size 1
        self.log_spread = nn.Parameter(torch.zeros(actions))

    def forward(self, observations: Tensor) -> Tensor:
        """Return means and logarithms of standard deviations, side by side."""
        mean = self.scale * self.body(observations)
        return torch.cat([mean, (self.log_spread + math.log(self.scale)).expand_as(mean)], -1)

    @staticmethod
    def log_prob(outputs: Tensor, actions: Tensor) -> Tensor:
        """Return the log-density of each action."""
        mean, log_spread = outputs.chunk(2, -1)
        deviation = (actions - mean) * (-log_spread).exp()
        return -(0.5 * deviation.square() + log_spread + 0.5 * math.log(2 * math.pi)).sum(-1)

    @staticmethod
    def sample(outputs: Tensor, generator: torch.Generator) -> Tensor:
        """Draw an action from each row."""
        mean, log_spread = outputs.chunk(2, -1)
        noise = torch.randn(mean.shape, generator=generator, device=generator.device)
        return mean + log_spread.exp() * noise.to(mean)


def multilayer(inputs: int, outputs: int, hidden: tuple[int, ...]) -> nn.Sequential:
    """Return a network with tanh units whose first outputs are near 0."""
    sizes, layers = (inputs, *hidden), []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.Tanh()]
    last = nn.Linear(sizes[-1], outputs)
    nn.init.zeros_(last.bias)
    with torch.no_grad():
        last.weight.mul_(0.1)
    return nn.Sequential(*layers, last)


Policy = CategoricalPolicy | GaussianPolicy


@dataclass
class Trajectories:
    """What was seen, done and received, ``[tasks, trajectories, steps, ...]``."""

    observations: Tensor
    actions: Tensor
    rewards: Tensor

    @property
    def returns(self) -> Tensor:
        """The undiscounted returns ``[tasks, trajectories]``."""
        return self.rewards.sum(-1)


def roll_out(
    env: Any, tasks: Any, policy: Policy, params: Params, generator: torch.Generator
) -> Trajectories:
    """Let the policy of each task act for one episode in all its copies.

    Args:
        env: A vector environment of :mod:`common.environments`.
        tasks: Its tasks.
        policy: Gives the shape of the computation; its own weights are not read.
        params: Adapted parameters, ``tasks`` in front.
        generator: Of the actions.
    """
    count, seen, done, received = len(tasks[0]), [], [], []
    device = next(iter(params.values())).device
    params = {name: p.detach() for name, p in params.items()}
    act = vmap(lambda p, x: functional_call(policy, p, (x,)))
    observation, _ = env.reset(options={"tasks": tasks})
    over = np.zeros(env.num_envs, dtype=bool)
    with torch.no_grad():
        while not over.all():
            x = torch.as_tensor(observation, device=device).unflatten(0, (count, -1))
            actions = policy.sample(act(params, x), generator)
            observation, reward, _, over, _ = env.step(actions.flatten(0, 1).cpu().numpy())
            seen.append(x)
            done.append(actions)
            received.append(torch.as_tensor(reward, dtype=x.dtype, device=device))
    rewards = torch.stack(received, -1).unflatten(0, (count, -1))
    return Trajectories(torch.stack(seen, 2), torch.stack(done, 2), rewards)


@dataclass(frozen=True)
class Advantages:
    """Generalised advantage estimates over a linear baseline (Duan et al. 2016, Finn et al. 2017).

    The baseline is fitted to the returns of the same trajectories by ridge regression, for each
    task again, on the observation, its square, and the powers of time up to 3.

    Attributes:
        discount: Gamma.
        trace: Lambda; 1 gives the returns minus the baseline.
        ridge: Of the regression, relative to the number of samples.
    """

    discount: float
    trace: float
    ridge: float = 1e-3

    def __call__(self, batch: Trajectories) -> Tensor:
        """Return the advantages, ``[tasks, trajectories, steps]``."""
        values = self.baseline(batch)
        following = torch.cat([values[..., 1:], torch.zeros_like(values[..., :1])], -1)
        errors = batch.rewards + self.discount * following - values
        return discounted_sums(errors, self.discount * self.trace)

    def baseline(self, batch: Trajectories) -> Tensor:
        """Return the fitted values of the states."""
        x = batch.observations
        steps = x.shape[2]
        time = torch.arange(steps, device=x.device, dtype=x.dtype).view(-1, 1) / steps
        time = torch.cat([time**power for power in range(4)], -1).expand(*x.shape[:3], 4)
        features = torch.cat([x, x.square(), time], -1).flatten(1, 2).double()
        target = discounted_sums(batch.rewards, self.discount).flatten(1).double()
        gram = features.mT @ features
        gram = gram + self.ridge * features.shape[1] * torch.eye(gram.shape[-1]).to(gram)
        weights = torch.linalg.solve(gram, features.mT @ target.unsqueeze(-1))
        return (features @ weights).view(batch.rewards.shape).to(x.dtype)


def discounted_sums(values: Tensor, discount: float) -> Tensor:
    """Return ``sum_k discount**k values[..., t + k]`` for each ``t``."""
    total, sums = torch.zeros_like(values[..., 0]), []
    for t in reversed(range(values.shape[-1])):
        total = values[..., t] + discount * total
        sums.append(total)
    return torch.stack(sums[::-1], -1)


def return_estimate(log_probs: Tensor, advantages: Tensor, estimator: str) -> Tensor:
    r"""Return what has the derivatives of the expected return, for each trajectory.

    ``"surrogate"`` is :math:`\sum_t A_t \log \pi(a_t|s_t)`, what the first papers on MAML
    differentiate: its gradient is a policy gradient, but its second derivative is not the Hessian
    of the expected return, for it ignores that the weights decide what is sampled.

    ``"dice"`` is right in the second order, too (Foerster et al. 2018, and Farquhar et al. 2019 for
    the form with advantages): with :math:`m(x) = \exp(x - \mathrm{stop}(x))`, of value 1, and
    :math:`l_t = \sum_{k \le t} \log \pi(a_k|s_k)`, it is :math:`\sum_t A_t (m(l_t) - m(l_{t-1}))`.

    Args:
        log_probs: ``[..., steps]``, connected to the weights.
        advantages: ``[..., steps]``, constant. A baseline in them adds no bias in either order.
        estimator: ``"dice"`` or ``"surrogate"``.
    """
    if estimator == "surrogate":
        return (log_probs * advantages).sum(-1)
    until = log_probs.cumsum(-1)
    before = until - log_probs
    return ((_magic(until) - _magic(before)) * advantages).sum(-1)


def _magic(x: Tensor) -> Tensor:
    return (x - x.detach()).exp()


@dataclass
class Learner:
    """How a policy learns one task by policy gradients.

    Attributes:
        policy: Gives the shape of the computation.
        advantages: Computes those of a batch.
        estimator: See :func:`return_estimate`.
        lr: Of the inner SGD.
    """

    policy: Policy
    advantages: Advantages
    estimator: str
    lr: float

    def adapt(self, params: Params, batch: Trajectories, lr: Any = None) -> Params:
        """Return the parameters of each task after one inner step on its trajectories.

        Args:
            params: Parameters with ``tasks`` in front.
            batch: What the policies with these parameters did.
            lr: Instead of ``self.lr``.
        """
        tx = torchopt.sgd(lr=self.lr if lr is None else lr)

        def one(p: Params, observations: Tensor, actions: Tensor, advantages: Tensor) -> Params:
            grads = grad(self.loss)(p, observations, actions, advantages)
            updates, _ = tx.update(grads, tx.init(p), p, inplace=False)
            return torchopt.apply_updates(p, updates, inplace=False)

        weighted = self.weighted_advantages(batch)
        return vmap(one)(params, batch.observations, batch.actions, weighted)

    def outer_loss(self, adapted: Params, batch: Trajectories) -> Tensor:
        """Return what has the gradient of minus the mean return of the adapted policies."""
        weighted = self.weighted_advantages(batch)
        return vmap(self.loss)(adapted, batch.observations, batch.actions, weighted).mean()

    def loss(
        self, params: Params, observations: Tensor, actions: Tensor, advantages: Tensor
    ) -> Tensor:
        """Return what has the derivatives of minus the expected return in one task."""
        outputs = functional_call(self.policy, params, (observations,))
        log_probs = self.policy.log_prob(outputs, actions)
        return -return_estimate(log_probs, advantages, self.estimator).mean()

    def weighted_advantages(self, batch: Trajectories) -> Tensor:
        """Return the advantages, each with the discount of its time."""
        steps = torch.arange(batch.rewards.shape[-1]).to(batch.rewards)
        return self.advantages(batch) * self.advantages.discount**steps


def for_each_task(params: Params, tasks: int) -> Params:
    """Return shared parameters as those of each task, connected to them."""
    return {name: p.expand(tasks, *p.shape) for name, p in params.items()}
