"""Networks, data and central differences for the tests that adapt a network."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from cases import Case
from torch import Tensor, nn

import torchopt


Data = tuple[Tensor, Tensor]


def mlp() -> Any:
    """A network without buffers."""
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def batch_normed() -> Any:
    """A network with buffers that move."""
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))


def batch(n: int = 6) -> Data:
    """Inputs and targets."""
    return torch.randn(n, 3), torch.randn(n, 2)


def mse(net: nn.Module, data: Data) -> Tensor:
    """The loss."""
    return (net(data[0]) - data[1]).square().mean()


def close(a: Any, b: Any, rtol: float = 1e-12) -> None:
    """Assert that tensors agree to some last bits."""
    torch.testing.assert_close(a, b, rtol=rtol, atol=1e-14)


def all_close(found: Any, expected: Any, rtol: float = 1e-12) -> None:
    """Assert that as many tensors agree to some last bits."""
    close([x.detach() for x in found], [x.detach() for x in expected], rtol)


def follow(peer: torch.optim.Optimizer, twin: nn.Module, data: Data) -> None:
    """Take a step with an optimizer of torch."""
    twin.zero_grad()
    mse(twin, data).backward()
    peer.step()


def with_peer(case: Case, net: nn.Module) -> tuple[Any, Any, torch.optim.Optimizer]:
    """Return the optimizer of a network, a copy of the network, and that of torch for the copy."""
    twin = copy.deepcopy(net)
    peer = case.torch_cls(twin.parameters(), **case.kwargs)
    return case.meta(net, **case.kwargs), twin, peer


def objects_of(net: nn.Module) -> list[tuple[str, Tensor]]:
    """Return parameters and buffers by all their names."""
    return [*net.named_parameters(remove_duplicate=False), *net.named_buffers()]


def snapshot(net: nn.Module) -> list[tuple[str, Tensor, Tensor]]:
    """Return parameters and buffers as objects and as bits."""
    return [(n, t, t.detach().clone()) for n, t in objects_of(net)]


def assert_unchanged(net: nn.Module, before: list[tuple[str, Tensor, Tensor]]) -> None:
    """Assert that a network consists of the same objects with the same bits."""
    now = objects_of(net)
    assert [n for n, _ in now] == [n for n, _, _ in before]
    for (_, t), (name, original, bits) in zip(now, before):
        assert t is original, f"{name} is another object"
        assert torch.equal(t, bits), f"{name} has another value"


def slope_of(grads: Sequence[Tensor], directions: Sequence[Tensor]) -> Tensor:
    """Return the derivative along directions."""
    return torch.stack([(g * d).sum() for g, d in zip(grads, directions)]).sum()


def central_difference(
    function: Callable[[], Tensor],
    tensors: Sequence[Tensor],
    directions: Sequence[Tensor],
    step: float = 1e-5,
) -> Tensor:
    """Return the derivative of ``function()`` along directions.

    By differences of fourth order, so that neither their truncation nor rounding shows.
    """
    total, start = torch.zeros(()), [t.detach().clone() for t in tensors]
    for shift, weight in ((1, 8), (-1, -8), (2, -1), (-2, 1)):
        with torch.no_grad():
            for t, s, d in zip(tensors, start, directions):
                t.copy_(s + shift * step * d)
        total = total + weight * function().detach()
    with torch.no_grad():
        for t, s in zip(tensors, start):
            t.copy_(s)
    return total / (12 * step)


def assert_derivative(
    function: Callable[[], Tensor], tensors: Sequence[Tensor], directions: int = 1
) -> None:
    """Compare the gradient of ``function()`` with differences along random directions."""
    grads = torch.autograd.grad(function(), tensors, materialize_grads=True)
    for _ in range(directions):
        along = [torch.randn_like(t) for t in tensors]
        slope, expected = slope_of(grads, along), central_difference(function, tensors, along)
        assert slope.abs() > 1e-7, "a slope of zero would be right by accident"
        torch.testing.assert_close(slope, expected, rtol=1e-6, atol=1e-10)


def adapted_loss(
    net: nn.Module, tx: Any, support: Data, query: Data, steps: int = 3
) -> Callable[[], Tensor]:
    """Return a function that adapts ``net`` anew and gives the outer loss."""

    def run() -> Tensor:
        with torchopt.inner_loop(net, tx) as inner:
            for _ in range(steps):
                inner.step(mse(net, support))
            return mse(net, query)

    return run


def graph_size(*tensors: Tensor) -> int:
    """Count the nodes of the graph behind tensors."""
    seen, todo = set(), [t.grad_fn for t in tensors if t.grad_fn is not None]
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions if parent is not None]
    return len(seen)
