"""Optimistic gradient descent: in the game that it is for."""

from __future__ import annotations

import torch
from torch import nn

import torchopt


def test_a_bilinear_game_converges_where_gradient_descent_diverges() -> None:
    distances = []
    for cls in (torchopt.OptimisticGradientDescent, torchopt.SGD):
        x, y = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(1.0))
        players = cls([x], 0.3), cls([y], 0.3, maximize=True)
        for _ in range(200):
            for player in players:
                player.zero_grad()
            (x * y).backward()
            for player in players:
                player.step()
        distances.append(float(x.detach().square() + y.detach().square()))
    assert distances[0] < 1e-6
    assert distances[1] > 1e3
