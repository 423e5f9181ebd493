"""Buffers in a block: what a step reads of them is what they were, also where nobody counts writes.

BatchNorm writes to its statistics without raising their version. Steps in training mode and in eval
mode, which reads them, alternate here, so that a derivative with later statistics would be wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import torchopt
from tests.tolerances import META_GRADIENT, relative_error
from torchopt.diff import Checkpointed, Truncated, Unrolled


ADJOINTS = [Checkpointed(), Checkpointed("log", store="cpu"), Truncated(last=9)]
STEPS = 5


class Average(nn.Module):
    """A moving average of what came in, and a counter, changed in place or replaced."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("average", torch.linspace(0.2, 0.9, 4))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            mean = 0.3 * x.detach().mean(0)
            if self.how == "in place":
                self.average.mul_(0.7).add_(mean)
            elif self.how == "data":
                self.average.data.mul_(0.7).add_(mean)
            else:
                self.average = 0.7 * self.average + mean
            self.count += 1
        return x * (1 + self.average) / (1 + 0.1 * self.count)


class Reshaped(nn.Module):
    def __init__(self, inner: nn.Module, *shape: int) -> None:
        super().__init__()
        self.inner, self.shape = inner, shape

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.view(-1, *self.shape)).reshape(-1, 4)


#: What comes first in the network, so that its buffers depend on the data only.
FIRST: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.BatchNorm1d(4),
    "batch norm, mean of all": lambda: nn.BatchNorm1d(4, momentum=None),
    "batch norm 2d": lambda: Reshaped(nn.BatchNorm2d(2), 2, 2, 1),
    "no statistics": lambda: nn.BatchNorm1d(4, track_running_stats=False),
    "instance norm": lambda: Reshaped(
        nn.InstanceNorm1d(2, affine=True, track_running_stats=True), 2, 2
    ),
    "in place": lambda: Average("in place"),
    "data": lambda: Average("data"),
    "replaced": lambda: Average("replaced"),
    "dropout": lambda: nn.Dropout(0.3),
}


def run(first: Callable[[], nn.Module], adjoint: Any, shift: float = 0.0, hidden: Any = nn.Linear):
    """Return an outer loss, the buffers at the end, and derivatives by all weights."""
    torch.manual_seed(0)
    net = nn.Sequential(first(), hidden(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    weights = list(net.parameters())
    with torch.no_grad():
        for p in weights:
            p.add_(0.1 * torch.randn_like(p))
        for p in weights:
            p.add_(shift * torch.randn_like(p))
    lr = torch.tensor(0.2).double().requires_grad_()
    xs = torch.randn(STEPS, 8, 4).double()
    losses = []
    with torchopt.inner_loop(net, torchopt.sgd(lr, momentum=0.5), adjoint=adjoint) as inner:
        for t, x in enumerate(xs):
            net.train(t % 2 == 0)

            def loss(x: Tensor = x) -> Tensor:
                read = sum(b.double().sum() for b in net.buffers())
                return ((net(x) - x[:, :2].sin()).square() + 0.01 * read * net(x)).mean()

            inner.step(loss if adjoint is not None else loss())
            net.eval()
            losses.append(net(xs[0]).square().mean())  # reads what the next step will change
        outer = torch.stack(losses).sum()
        buffers = [b.detach().clone() for b in net.buffers()]
        return outer, buffers, torch.autograd.grad(outer, [*weights, lr])


@pytest.mark.parametrize("kind", FIRST)
def test_the_derivative_with_the_buffers_of_each_step(kind: str) -> None:
    expected, buffers, grads = run(FIRST[kind], None)
    up, down = (run(FIRST[kind], None, shift)[0] for shift in (1e-6, -1e-6))
    torch.manual_seed(0)
    net = nn.Sequential(FIRST[kind](), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    weights = list(net.parameters())
    for p in weights:
        torch.randn_like(p)
    along = sum((g * torch.randn_like(p)).sum() for g, p in zip(grads, weights))
    assert relative_error(along, (up - down) / 2e-6) < META_GRADIENT
    for adjoint in ADJOINTS:
        found, at_end, derivatives = run(FIRST[kind], adjoint)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(at_end, buffers, rtol=0, atol=0)
        torch.testing.assert_close(derivatives, grads, rtol=1e-10, atol=1e-10)


def test_buffers_that_depend_on_the_weights() -> None:
    def normed(n: int, m: int) -> nn.Module:
        return nn.Sequential(spectral_norm(nn.Linear(n, m)), nn.BatchNorm1d(m))

    _, buffers, grads = run(nn.Identity, Unrolled(), hidden=normed)
    for adjoint in ADJOINTS:
        _, at_end, derivatives = run(nn.Identity, adjoint, hidden=normed)
        torch.testing.assert_close(at_end, buffers, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(derivatives, grads, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("adjoint", [None, Checkpointed()], ids=repr)
def test_the_block_leaves_no_hooks_and_keeps_the_buffers_themselves(adjoint: Any) -> None:
    norm = nn.BatchNorm1d(2)
    before = norm.running_mean
    with torchopt.inner_loop(norm, torchopt.sgd(0.1), restore_buffers=False, adjoint=adjoint):
        norm.eval()
        norm(torch.randn(3, 2))
        assert norm.running_mean is before
        with pytest.raises(ValueError, match="2D or 3D"):
            norm(torch.randn(3))
        assert norm.running_mean is before
    assert not norm._forward_hooks
    assert not norm._forward_pre_hooks
    assert not norm._forward_hooks_always_called


def test_a_buffer_computed_from_the_present_weights_is_refused() -> None:
    net = nn.Linear(2, 2)
    net.register_buffer("offset", torch.zeros(2))
    x = torch.randn(3, 2)
    with torchopt.inner_loop(net, torchopt.sgd(0.1), adjoint=Checkpointed()) as inner:
        net.offset = net(x).mean(0)
        with pytest.raises(ValueError, match=r"'buffer offset'.*Compute it inside"):
            inner.step(lambda: (net(x) + net.offset).square().mean())
        net.offset = net.offset.detach()
        inner.step(lambda: (net(x) + net.offset).square().mean())
