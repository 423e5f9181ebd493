"""Learning with opponent-learning awareness (LOLA) for many independent pairs at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import torchopt
from common.prisoners_dilemma import (
    Games,
    dice_returns,
    exact_returns,
    observed_values,
    play,
)


OUTER_OPTIMIZERS = {"sgd": torchopt.SGD, "adam": torchopt.Adam}


@dataclass(frozen=True)
class Steps:
    """Learning rates and where the players start.

    Attributes:
        lr_in: Of the steps that each player expects of its opponent.
        lr_out: Of the players themselves.
        outer: ``sgd`` or ``adam``, by which the players learn.
        initial_std: Standard deviation of the initial logits.
        expand: Take the return after the opponent's step to first order in ``lr_in``, as the LOLA
            paper does, instead of making the step; for one look-ahead.
    """

    lr_in: float
    lr_out: float
    outer: str
    initial_std: float
    expand: bool = False


class Estimator(Protocol):
    """Something that knows the returns of both players."""

    dtype: torch.dtype

    def __call__(self, own: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """Return the returns of both, differentiable in both policies."""

    def learn(self) -> None:
        """Learn from the last call, once in each iteration."""


class Exact:
    """Expected returns in closed form, in double precision."""

    dtype = torch.float64

    def __init__(self, discount: float) -> None:
        self.discount = discount

    def __call__(self, own: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """Return the expected returns."""
        return exact_returns(own, other, self.discount)

    def learn(self) -> None:
        """Do nothing: there is nothing to estimate."""


class Dice:
    """Returns of sampled games, differentiable any number of times by DiCE.

    Args:
        discount: Discount factor.
        games: Games of each pair for each estimate.
        first_games: The same, in the first iterations: as long as a policy is undecided, its
            steps are large, and a wrong one is hard to undo.
        first_iterations: How many those are.
        rounds: Rounds of each game.
        lr_value: Learning rate of the value functions that serve as baselines; 0 for none.
        generator: Source of all randomness.
    """

    dtype = torch.float32

    def __init__(
        self,
        discount: float,
        games: int,
        first_games: int,
        first_iterations: int,
        rounds: int,
        lr_value: float,
        generator: torch.Generator,
    ) -> None:
        self.discount, self.rounds = discount, rounds
        self.games, self.first_games, self.left = games, first_games, first_iterations
        self.lr_value, self.generator = lr_value, generator
        self.values: Tensor | None = None
        self.last: Games | None = None

    def __call__(self, own: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean returns of fresh games."""
        count = self.first_games if self.left > 0 else self.games
        games = play(own, other, count, self.rounds, self.generator)
        if self.values is None and self.lr_value:
            # without games of the initial policies the first steps would be mostly noise
            self.values = observed_values(games, self.discount, own.detach())[0]
            games = play(own, other, count, self.rounds, self.generator)
        self.last = games
        both = None if self.values is None else (self.values, swapped(self.values))
        return dice_returns(own, other, games, self.discount, both)

    def learn(self) -> None:
        """Move the value of each visited state towards what the last games gave."""
        self.left -= 1
        if self.values is None or self.last is None:
            return
        seen, mass = observed_values(self.last, self.discount, self.values)
        step = self.lr_value * (seen - self.values)
        self.values = torch.where(mass > 0, self.values + step, self.values)


def swapped(players: Tensor) -> Tensor:
    """Return the opponents of players that stand as all first, then all second ones."""
    first, second = players.chunk(2)
    return torch.cat([second, first])


def shaped_return(own: Tensor, look_aheads: int, lr_in: float, estimator: Estimator) -> Tensor:
    """Return what each player expects after its opponent's next learning steps.

    The gradient passes through those steps, so a player feels how it shapes the other's learning.
    With no look-ahead it is the ordinary return of a naive learner.
    """
    opponents = nn.ParameterList([swapped(own.detach())])
    with torchopt.inner_loop(opponents, torchopt.sgd(lr_in, maximize=True)) as imagined:
        for _ in range(look_aheads):
            # the pairs are independent, so the gradient of the sum is the gradient of each
            imagined.step(estimator(own, opponents[0])[1].sum())
        return estimator(own, opponents[0])[0]


def expanded_return(own: Tensor, lr_in: float, estimator: Estimator) -> Tensor:
    """Return what each player expects after one step of its opponent, to first order in it.

    Without the own naive return it is the shaping term of the LOLA paper: how much the opponent's
    step, which the player influences, helps the player at its present policy.
    """
    opponents = swapped(own.detach()).requires_grad_()
    mine, theirs = estimator(own, opponents)
    (step,) = torch.autograd.grad(theirs.sum(), opponents, create_graph=True)
    (use,) = torch.autograd.grad(mine.sum(), opponents, retain_graph=True)
    return mine + lr_in * (use * step).sum(-1)


def learn(
    estimator: Estimator,
    steps: Steps,
    look_aheads: int,
    pairs: int,
    iterations: int,
    record_every: int,
    discount: float,
    generator: torch.Generator,
) -> Iterator[dict[str, Any]]:
    """Let pairs of learners play; both learn at once and in the same way.

    Yields:
        After every ``record_every`` iterations, and the last, their number, each pair's mean
        reward for a step (exact) and its policies, ``[pairs, 2, 5]``.
    """
    device = generator.device
    start = torch.randn(2 * pairs, 5, generator=generator, device=device, dtype=estimator.dtype)
    logits = (steps.initial_std * start).requires_grad_()
    optimizer = OUTER_OPTIMIZERS[steps.outer]([logits], lr=steps.lr_out, maximize=True)
    for iteration in range(1, iterations + 1):
        optimizer.zero_grad()
        if steps.expand and look_aheads:
            objective = expanded_return(logits, steps.lr_in, estimator)
        else:
            objective = shaped_return(logits, look_aheads, steps.lr_in, estimator)
        objective.sum().backward()
        optimizer.step()
        estimator.learn()
        if iteration % record_every and iteration != iterations:
            continue
        with torch.no_grad():
            first, second = logits.double().chunk(2)
            returns = sum(exact_returns(first, second, discount)) / 2
            policies = torch.stack([first, second], dim=1).sigmoid()
        yield {
            "iteration": iteration,
            "returns": _rounded((1 - discount) * returns),
            "policies": _rounded(policies),
        }


def _rounded(x: Tensor) -> list[Any]:
    return x.mul(1e5).round().div(1e5).tolist()


def is_tit_for_tat(policies: Tensor) -> Tensor:
    """Whether the deterministic strategy next to each policy ``[..., 5]`` is tit-for-tat."""
    wanted = torch.tensor([True, True, False, True, False])
    return ((policies > 0.5) == wanted).all(-1)


def is_forgiving(policies: Tensor) -> Tensor:
    """Whether it is tit-for-tat that rather cooperates also after having been exploited (CD)."""
    wanted = torch.tensor([True, True, True, True, False])
    return ((policies > 0.5) == wanted).all(-1)
