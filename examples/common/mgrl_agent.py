"""Actor-critics of many seeds side by side, their environments, returns and losses.

Shapes: ``[seeds, environments, steps, ...]``. The networks of all seeds are one module whose
parameters have ``seeds`` in front, and a loss is one number for each seed: no gradient passes from
one seed to another, so the sum of the losses trains them independently.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.endings import missing


try:
    import gymnasium
    import numpy as np
except ImportError as error:
    missing("Reinforcement learning needs gymnasium", error)


class ActorCritic(nn.Module):
    """One policy and one value function for each seed, each with a hidden layer of its own.

    Args:
        seeds: Number of independent agents.
        observations: Numbers in an observation.
        actions: Number of discrete actions.
        hidden: Units of a hidden layer.
        generator: Of the initial weights.
    """

    def __init__(
        self, seeds: int, observations: int, actions: int, hidden: int, generator: torch.Generator
    ) -> None:
        super().__init__()

        def weights(inputs: int, outputs: int, gain: float = 1.0) -> nn.Parameter:
            noise = 2 * torch.rand(seeds, inputs, outputs, generator=generator) - 1
            return nn.Parameter(gain * noise / math.sqrt(inputs))

        def biases(outputs: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(seeds, 1, outputs))

        self.actor_in, self.actor_in_bias = weights(observations, hidden), biases(hidden)
        self.actor_out, self.actor_out_bias = weights(hidden, actions, 0.1), biases(actions)
        self.critic_in, self.critic_in_bias = weights(observations, hidden), biases(hidden)
        self.critic_out, self.critic_out_bias = weights(hidden, 1), biases(1)

    def logits(self, observations: Tensor) -> Tensor:
        """Return the logits of the actions, ``[seeds, ..., actions]``."""
        x = observations.flatten(1, -2)
        hidden = torch.tanh(x @ self.actor_in + self.actor_in_bias)
        logits = hidden @ self.actor_out + self.actor_out_bias
        return logits.unflatten(1, observations.shape[1:-1])

    def values(self, observations: Tensor) -> Tensor:
        """Return the estimated returns, ``[seeds, ...]``."""
        x = observations.flatten(1, -2)
        hidden = torch.tanh(x @ self.critic_in + self.critic_in_bias)
        values = (hidden @ self.critic_out + self.critic_out_bias).squeeze(-1)
        return values.unflatten(1, observations.shape[1:-1])


@dataclass
class Experience:
    """Some steps of all environments, ``[seeds, environments, steps, ...]``.

    Attributes:
        observations: One more than steps: the last one is where the next experience begins.
        actions: Taken.
        rewards: Received.
        terminated: Whether the step ended the episode for good.
        truncated: Whether it ended it by the limit of time.
        valid: Whether it was a step at all: Gymnasium resets an environment in the step after
            the end of an episode, whatever the action.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    terminated: Tensor
    truncated: Tensor
    valid: Tensor


class Sampler:
    """Lets the agents of all seeds act in their environments, and goes on where it was.

    Args:
        name: A Gymnasium environment with discrete actions.
        seeds: Number of agents.
        copies: Environments of each agent.
        steps: Steps of one experience.
        seed: Of environments and actions.
        device: Of the agents.
        reward_scale: Multiplies what the agents see of the rewards.
    """

    def __init__(
        self,
        name: str,
        seeds: int,
        copies: int,
        steps: int,
        seed: int,
        device: torch.device,
        reward_scale: float,
    ) -> None:
        self.env = gymnasium.make_vec(name, num_envs=seeds * copies)
        self.shape, self.steps = (seeds, copies), steps
        self.device, self.reward_scale = device, reward_scale
        self.generator = torch.Generator(device).manual_seed(seed)
        observation, _ = self.env.reset(seed=seed)
        self.observation = self._tensor(observation)
        self.begins = self._tensor(np.zeros(seeds * copies, dtype=bool))
        self.running = torch.zeros(self.shape)
        self.latest = torch.full(self.shape, float("nan"))

    def collect(self, agent: ActorCritic) -> Experience:
        """Return the next experience of all agents."""
        columns: list[tuple[Tensor, ...]] = []
        with torch.no_grad():
            for _ in range(self.steps):
                columns.append(self._step(agent))
        observations, *others = (torch.stack(column, 2) for column in zip(*columns))
        last = self.observation.unsqueeze(2)
        return Experience(torch.cat([observations, last], 2), *others)

    def mean_returns(self) -> list[float]:
        """Return, for each seed, the mean return of the episodes that ended last."""
        return self.latest.nanmean(1).tolist()

    def _step(self, agent: ActorCritic) -> tuple[Tensor, ...]:
        before, valid = self.observation, ~self.begins
        probabilities = agent.logits(before).softmax(-1).flatten(0, 1)
        actions = torch.multinomial(probabilities, 1, generator=self.generator).view(self.shape)
        observation, reward, terminated, truncated, _ = self.env.step(
            actions.flatten().cpu().numpy()
        )
        self.observation = self._tensor(observation)
        rewards = self._tensor(reward).float()
        ends, cut = self._tensor(terminated), self._tensor(truncated)
        self.begins = ends | cut
        self.running += rewards.cpu()
        over = self.begins.cpu()
        self.latest[over] = self.running[over]
        self.running[over] = 0.0
        return before, actions, self.reward_scale * rewards, ends, cut & ~ends, valid

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.as_tensor(array, device=self.device).unflatten(0, self.shape)


def lambda_returns(
    experience: Experience, values: Tensor, discount: Tensor, trace: Tensor
) -> Tensor:
    r"""Return :math:`G_t = r_t + \gamma ((1-\lambda) v_{t+1} + \lambda G_{t+1})` for each step.

    After the last step, and where an episode was cut off by the limit of time, the value stands for
    what would have followed; after a termination nothing follows.

    Args:
        experience: Of ``steps`` steps.
        values: Of its ``steps + 1`` observations, constant.
        discount: Gamma of each seed; the returns are differentiable in it.
        trace: Lambda of each seed, likewise.
    """
    discount, trace = discount.unsqueeze(-1), trace.unsqueeze(-1)
    total, returns = values[..., -1], []
    for t in reversed(range(experience.rewards.shape[-1])):
        following = values[..., t + 1]
        mixed = (1 - trace) * following + trace * total
        mixed = torch.where(experience.truncated[..., t], following, mixed)
        alive = (~experience.terminated[..., t]).to(values.dtype)
        total = experience.rewards[..., t] + discount * alive * mixed
        returns.append(total)
    return torch.stack(returns[::-1], -1)


def constant_values(agent: ActorCritic, experience: Experience) -> Tensor:
    """Return the values that returns and advantages are made of.

    They are constants to the gradient of a step, and so to the meta-gradient through it: it flows
    through the discount and the trace in the returns, and through the weights of the network.
    """
    return agent.values(experience.observations).detach()


def policy_loss(
    agent: ActorCritic, experience: Experience, discount: Tensor, trace: Tensor
) -> Tensor:
    """Return, for each seed, what has the gradient of minus the return: a policy gradient."""
    values = constant_values(agent, experience)
    returns = lambda_returns(experience, values, discount, trace)
    log_probs = agent.logits(experience.observations[:, :, :-1]).log_softmax(-1)
    chosen = log_probs.gather(-1, experience.actions.unsqueeze(-1)).squeeze(-1)
    return -_mean(chosen * (returns - values[..., :-1]), experience)


def actor_critic_loss(
    agent: ActorCritic,
    experience: Experience,
    discount: Tensor,
    trace: Tensor,
    value_weight: float = 0.5,
    entropy_weight: float = 0.003,
) -> Tensor:
    """Return the loss of an actor-critic, for each seed; its gradient depends on the discount.

    Args:
        agent: All agents.
        experience: What they did.
        discount: Gamma of each seed.
        trace: Lambda of each seed.
        value_weight: Of the squared error of the values.
        entropy_weight: Of the entropy, which keeps the agents exploring.
    """
    values = agent.values(experience.observations[:, :, :-1])
    constants = constant_values(agent, experience)
    returns = lambda_returns(experience, constants, discount, trace)
    errors = _mean((returns - values).square(), experience)
    log_probs = agent.logits(experience.observations[:, :, :-1]).log_softmax(-1)
    entropy = _mean(-(log_probs.exp() * log_probs).sum(-1), experience)
    policy = policy_loss(agent, experience, discount, trace)
    return policy + value_weight * errors - entropy_weight * entropy


def _mean(values: Tensor, experience: Experience) -> Tensor:
    """Return the mean over the valid steps of each seed."""
    valid = experience.valid.to(values.dtype)
    return (values * valid).sum((1, 2)) / valid.sum((1, 2))
