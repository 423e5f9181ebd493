"""A network of two parts, and what trains each: of the tests of partitions."""

from __future__ import annotations

import torch
from torch import nn

import torchopt


TRANSFORMS = {
    "body": torchopt.adamw(0.03, weight_decay=0.2),
    "head": torchopt.sgd(0.1, momentum=0.9),
}
LABELS = {"0": "body", "2": "head"}


def make():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def loss_of(net):
    x = torch.linspace(-1, 1, 18).double().view(6, 3)
    return (net(x) - x.sum(1, keepdim=True)).square().mean()


def train(net, *optimizers, steps=3, schedulers=()):
    for _ in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_of(net).backward()
        for one in (*optimizers, *schedulers):
            one.step()


def two_optimizers(net):
    """The same by torch.optim: an optimizer for each part."""
    return (
        torch.optim.AdamW(net[0].parameters(), 0.03, weight_decay=0.2),
        torch.optim.SGD(net[2].parameters(), 0.1, momentum=0.9),
    )
