"""Exact returns of finite Markov decision processes by dynamic programming: the oracles.

All functions take ``transitions`` ``[..., states, actions, next states]`` and mean ``rewards``
``[..., states, actions]``; episodes begin in state 0 and take ``horizon`` steps.
"""

from __future__ import annotations

import torch
from torch import Tensor


def expected_return(
    transitions: Tensor, rewards: Tensor, policy: Tensor, horizon: int, discount: float = 1.0
) -> Tensor:
    """Return the expected return of a policy; differentiable in it.

    Args:
        transitions: Transition probabilities.
        rewards: Mean rewards.
        policy: Probabilities ``[..., states, actions]``.
        horizon: Steps of an episode.
        discount: Of each step.
    """
    values = torch.zeros_like(rewards[..., 0])
    for _ in range(horizon):
        values = (policy * _action_values(transitions, rewards, values, discount)).sum(-1)
    return values[..., 0]


def optimal_return(
    transitions: Tensor, rewards: Tensor, horizon: int, discount: float = 1.0
) -> Tensor:
    """Return the highest expected return that any policy has that knows the process and the time.

    It is a bound for the policies of the example, which do not know the time.
    """
    values = torch.zeros_like(rewards[..., 0])
    for _ in range(horizon):
        values = _action_values(transitions, rewards, values, discount).amax(-1)
    return values[..., 0]


def _action_values(transitions: Tensor, rewards: Tensor, values: Tensor, discount: float) -> Tensor:
    return rewards + discount * (transitions @ values[..., None, :, None])[..., 0]
