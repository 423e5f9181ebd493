"""Optimistic gradient descent: beside Optax, and in the game that it is for."""

from __future__ import annotations

import torch
from tolerances import assert_close
from torch import nn

import torchopt


def test_values_of_optax() -> None:
    """``optax.optimistic_gradient_descent(0.1, alpha=1.2, beta=0.7)`` of Optax 0.2.8, float64."""
    p = torch.tensor([0.5, -1.0, 2.0, 0.1], dtype=torch.float64)
    grads = [
        [0.3, -0.2, 1.0, -0.5],
        [-0.6, 0.1, -0.2, 0.9],
        [0.02, 0.3, -0.05, -0.1],
        [-0.1, -0.02, -0.3, -0.2],
    ]
    tx = torchopt.optimistic_gradient_descent(0.1, 1.2, 0.7)
    state = tx.init(p)
    for g in grads:
        p, state = tx.apply_gradients(torch.tensor(g, dtype=torch.float64), state, p, inplace=False)
    assert_close(p, torch.tensor([0.5736, -1.0342, 2.037, 0.067], dtype=torch.float64))


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
