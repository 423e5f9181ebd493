"""The iterated prisoner's dilemma between players that remember one round.

A policy is five logits: to cooperate in the first round, and after each outcome of the last one,
written as own move, then the opponent's: CC, CD, DC, DD. All tensors have a leading dimension of
independent pairs. Returns are sums of discounted rewards; ``(1 - discount)`` times a return is a
mean reward for each step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


STATES = ("start", "CC", "CD", "DC", "DD")
TIT_FOR_TAT = (1.0, 1.0, 0.0, 1.0, 0.0)
_REWARDS = (-1.0, -3.0, 0.0, -2.0)  # of CC, CD, DC, DD for the player whose move stands first
_SEEN_BY_OPPONENT = (0, 2, 1, 3)


def joint_log_probabilities(own: Tensor, other: Tensor) -> Tensor:
    """Return the log-probabilities of CC, CD, DC, DD in each state, ``[pairs, 5, 4]``.

    Args:
        own: Logits of the players whose move stands first, ``[pairs, 5]``.
        other: Logits of their opponents, each as that player sees the states.
    """
    other = other[..., [0, 1, 3, 2, 4]]
    log = torch.nn.functional.logsigmoid
    mine, theirs = (torch.stack([log(x), log(-x)], dim=-1) for x in (own, other))
    return (mine.unsqueeze(-1) + theirs.unsqueeze(-2)).flatten(-2)


def exact_returns(own: Tensor, other: Tensor, discount: float) -> tuple[Tensor, Tensor]:
    r"""Return the expected discounted returns of both players, differentiable in both policies.

    With the Markov chain's transition matrix :math:`P`, the law :math:`p_0` of the first outcome
    and the rewards :math:`r` of the outcomes, the return is :math:`p_0^\top (I - \gamma P)^{-1} r`.
    """
    law = joint_log_probabilities(own, other).exp()
    first, transition = law[..., 0, :], law[..., 1:, :]
    system = torch.eye(4, dtype=own.dtype, device=own.device) - discount * transition
    rewards = own.new_tensor(_REWARDS)
    both = torch.stack([rewards, rewards[list(_SEEN_BY_OPPONENT)]], dim=-1)
    values = torch.linalg.solve(system, both.expand(*own.shape[:-1], 4, 2))
    returns = (first.unsqueeze(-1) * values).sum(-2)
    return returns[..., 0], returns[..., 1]


def forgiveness_limit(discount: float) -> float:
    r"""Return how often tit-for-tat may forgive before defecting against it pays.

    Whoever defects once gains 1 now. In the next round the exploited player cooperates with
    probability :math:`f`, and retaliates otherwise, which costs 2 against one who has returned to
    cooperation: defecting pays if :math:`1 > 2 \gamma (1 - f)`.
    """
    return 1 - 1 / (2 * discount)


class Games(NamedTuple):
    """Sampled games.

    Attributes:
        states: The state before each round, 0 to 4, ``[pairs, games, rounds]``.
        outcomes: The outcome of each round, 0 to 3 for CC, CD, DC, DD.
    """

    states: Tensor
    outcomes: Tensor


@torch.no_grad()
def play(own: Tensor, other: Tensor, games: int, rounds: int, generator: torch.Generator) -> Games:
    """Sample ``games`` games of ``rounds`` rounds for each pair."""
    bounds = joint_log_probabilities(own, other).exp().cumsum(-1)[..., :3]
    pairs = len(own)
    uniform = torch.rand(rounds, pairs, games, 1, generator=generator, device=own.device)
    # the outcome in every state that might be reached, so that the walk is a mere look-up
    tables = (uniform > bounds[:, None, :, 0]).to(torch.uint8)
    tables += uniform > bounds[:, None, :, 1]
    tables += uniform > bounds[:, None, :, 2]
    state = torch.zeros(pairs, games, 1, dtype=torch.long, device=own.device)
    states, outcomes = [], []
    for table in tables:
        states.append(state)
        outcomes.append(table.gather(-1, state).long())
        state = outcomes[-1] + 1
    return Games(torch.cat(states, dim=-1), torch.cat(outcomes, dim=-1))


def rewards_of(games: Games, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rewards of both players in each round."""
    rewards = like.new_tensor(_REWARDS)
    return rewards[games.outcomes], rewards[list(_SEEN_BY_OPPONENT)][games.outcomes]


def discounts(rounds: int, discount: float, like: Tensor) -> Tensor:
    """Return 1, ``discount``, its square and so on."""
    return discount ** torch.arange(rounds, dtype=like.dtype, device=like.device)


def magic_box(log_probability: Tensor) -> Tensor:
    r"""The operator of DiCE: 1, with the derivatives :math:`\nabla^n \exp(\log p) / p`."""
    return (log_probability - log_probability.detach()).exp()


def dice_returns(
    own: Tensor,
    other: Tensor,
    games: Games,
    discount: float,
    baselines: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Return both players' mean returns, whose derivatives of any order are unbiased estimates.

    With :math:`\square_t`, the magic box of all moves up to round :math:`t`, and a baseline
    :math:`b` of the state before the moves, it is

    .. math:: \sum_t \gamma^t \left(\square_t r_t + (\square_{t-1} - \square_t)\, b(s_t)\right).

    The second term has mean zero for any policies, so every derivative of it has, too: it
    lowers the variance of derivatives of every order.

    Args:
        own: Logits of the first players, ``[pairs, 5]``; ``games`` was sampled from them.
        other: Logits of their opponents.
        games: Sampled games.
        discount: Discount factor.
        baselines: For both players, the value of each state as that player sees it,
            ``[pairs, 5]``.
    """
    table = joint_log_probabilities(own, other).flatten(1)
    chosen = (4 * games.states + games.outcomes).flatten(1)
    log_moves = table.gather(1, chosen).view(games.states.shape)
    box = magic_box(log_moves.cumsum(-1))
    before = torch.cat([torch.ones_like(box[..., :1]), box[..., :-1]], dim=-1)
    weights = discounts(games.states.shape[-1], discount, own)
    totals = []
    for player, rewards in enumerate(rewards_of(games, own)):
        terms = box * rewards
        if baselines is not None:
            values = baselines[player] if player == 0 else baselines[1][:, [0, 1, 3, 2, 4]]
            at = values.gather(1, games.states.flatten(1)).view_as(box)
            terms = terms + (before - box) * at
        totals.append((weights * terms).sum(-1).mean(-1))
    return totals[0], totals[1]


def observed_values(games: Games, discount: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the first player got on average from each state on, and how often it occurred.

    Occurrences are weighted by the discount: what was cut off at the end of the games counts
    little then, as it does in the derivatives.

    Returns:
        Two tensors ``[pairs, 5]``; the value is 0 where a state did not occur.
    """
    rewards = rewards_of(games, like)[0]
    weights = discounts(rewards.shape[-1], discount, like)
    # the return from round t on is the discounted sum of what follows, over the discount so far
    to_go = (weights * rewards).flip(-1).cumsum(-1).flip(-1)  # discounted to the start
    visits = torch.nn.functional.one_hot(games.states, 5).to(like.dtype)
    mass = (visits * weights.unsqueeze(-1)).sum((1, 2))
    total = (visits * to_go.unsqueeze(-1)).sum((1, 2))
    return torch.where(mass > 0, total / mass.clamp_min(1e-30), 0.0), mass
