"""Loops to differentiate, as every library is given them."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional


#: What the main job's network is given: five classes of Omniglot, one image of each to learn from.
WAYS, SIZE, CHANNELS, BLOCKS = 5, 28, 32, 4


@dataclass(frozen=True)
class Problem:
    """A network that is trained for some steps, and then differentiated through them.

    Attributes:
        net: The network; its parameters are where the loop starts.
        loss: What the steps minimise, a function of the network.
        outer: What is differentiated after them.
        lr: The learning rate, a tensor by which there is a derivative too.
        optimizer: ``"sgd"``, plain gradient descent, or ``"adam"``.
        length: How many steps there are.
    """

    net: nn.Module
    loss: Callable[[nn.Module], Tensor]
    outer: Callable[[nn.Module], Tensor]
    lr: Tensor
    optimizer: str
    length: int

    @property
    def by(self) -> list[Tensor]:
        """What is differentiated by."""
        return [*self.net.parameters(), self.lr]


class Layer(nn.Module):
    """A matrix, a bias, and ``tanh`` if wanted."""

    def __init__(self, inputs: int, outputs: int, bent: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.bent = bent

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs."""
        x = torch.addmm(self.bias, x, self.weight)
        return x.tanh() if self.bent else x


def _regression(widths: list[int], batch: int, length: int, bent_to_the_end: bool) -> Problem:
    torch.manual_seed(0)
    last = len(widths) - 2
    pairs = enumerate(itertools.pairwise(widths))
    net = nn.Sequential(*(Layer(a, b, bent_to_the_end or i < last) for i, (a, b) in pairs))
    x, y = torch.randn(batch, widths[0]), torch.randn(batch, widths[-1])

    def loss(net: nn.Module) -> Tensor:
        return (net(x) - y).square().mean()

    lr = torch.tensor(0.01, requires_grad=True)
    return Problem(net, loss, loss, lr, "sgd", length)


def deep() -> Problem:
    """Return 16 steps of a tanh network of 16 layers: what a step saves is far above a carry."""
    return _regression([256] * 17, 2048, 16, True)


def long(length: int = 256) -> Problem:
    """Return many steps of a small network."""
    return _regression([32, 256, 1], 256, length, False)


def few_shot(length: int) -> Problem:
    """Return steps of Adam on the network of ``examples/few_shot.py``.

    The images are noise, which costs what real ones cost.
    """
    sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
    from common.networks import ConvNet

    torch.manual_seed(0)
    net = ConvNet(WAYS, SIZE, CHANNELS, BLOCKS)
    labels = torch.arange(WAYS)
    support, query = torch.rand(WAYS, 1, SIZE, SIZE), torch.rand(5 * WAYS, 1, SIZE, SIZE)

    def loss(net: nn.Module) -> Tensor:
        return functional.cross_entropy(net(support), labels)

    def outer(net: nn.Module) -> Tensor:
        return functional.cross_entropy(net(query), labels.repeat(5))

    return Problem(net, loss, outer, torch.tensor(1e-3, requires_grad=True), "adam", length)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "deep": deep,
    "long": long,
    "few-shot, 1,000 steps": lambda: few_shot(1_000),
    "few-shot, 10,000 steps": lambda: few_shot(10_000),
}
