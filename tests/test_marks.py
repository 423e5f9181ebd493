"""Hooks and attributes of a parameter stay with it, whatever takes its place in the network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerances import META_GRADIENT, assert_close, relative_error
from torch import Tensor, nn

import torchopt


IDS = torch.tensor([0, 2, 3, 3, 4])
MASK = torch.tensor([[0.0], [0.0], [1.0], [1.0], [1.0]], dtype=torch.float64)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.rows = nn.Embedding(5, 3).double()
        self.head = nn.Linear(3, 1).double()

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.rows(ids)))


def loss(net: nn.Module, ids: Tensor = IDS) -> Tensor:
    return (net(ids) - 0.3).square().sum()


def masked() -> Net:
    net = Net()
    net.rows.weight.register_hook(lambda grad: grad * MASK)
    return net


def trained(steps: int, optimizer: Callable[..., Any], **options: Any) -> Net:
    """Return what torch.optim makes of the masked network."""
    net = masked()
    other = optimizer(net.parameters(), **options)
    for _ in range(steps):
        other.zero_grad()
        loss(net).backward()
        other.step()
    return net


WAYS = {
    "differentiable": {},
    "first order": {"create_graph": False},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_mask_works_at_every_step(way: str) -> None:
    net = masked()
    inner = torchopt.MetaAdam(net, lr=0.05)
    for _ in range(4):
        inner.step(loss(net), **WAYS[way])
    assert_close(list(net.parameters()), list(trained(4, torch.optim.Adam, lr=0.05).parameters()))


def without_a_graph(net: Any, inner: Any) -> None:
    with torch.no_grad():
        inner.step(torch.enable_grad()(loss)(net))


def cut(net: Any, inner: Any) -> None:
    inner.step(loss(net))
    torchopt.stop_gradient(net)
    torchopt.stop_gradient(inner)


def recovered(by: str) -> Callable[[Any, Any], None]:
    def step(net: Any, inner: Any) -> None:
        inner.step(loss(net))
        torchopt.recover_state_dict(net, torchopt.extract_state_dict(net, by=by))

    return step


@pytest.mark.parametrize(
    "step",
    [without_a_graph, cut, recovered("reference"), recovered("copy"), recovered("deepcopy")],
    ids=["no_grad", "stop_gradient", "reference", "copy", "deepcopy"],
)
def test_a_mask_works_whatever_comes_between(step: Any) -> None:
    net = masked()
    inner = torchopt.MetaSGD(net, lr=0.05, momentum=0.5)
    for _ in range(4):
        step(net, inner)
    right = trained(4, torch.optim.SGD, lr=0.05, momentum=0.5)
    assert_close(list(net.parameters()), list(right.parameters()))


def test_a_leaf_in_its_place_masks_backward_too_and_once() -> None:
    calls: list[int] = []
    net = Net()
    net.rows.weight.register_hook(lambda grad: calls.append(1))
    net.rows.weight.register_post_accumulate_grad_hook(lambda p: calls.append(100))
    inner = torchopt.MetaSGD(net, lr=0.05)
    for _ in range(3):
        cut(net, inner)
    assert calls == [1, 1, 1]
    loss(net).backward()
    assert calls == [1, 1, 1, 1, 100]


def test_the_meta_gradient_is_that_of_the_steps_that_were_made() -> None:
    """A hook that is no projection would show if it met what flows from step to step."""
    net = Net()
    start = list(net.parameters())
    factor = 0.25 + torch.rand(5, 3, dtype=torch.float64)
    directions = [torch.randn_like(p) for p in start]

    def outer() -> Tensor:
        handle = net.rows.weight.register_hook(lambda grad: grad * factor + 0.1 * grad.square())
        with torchopt.inner_loop(net, torchopt.sgd(0.2, momentum=0.3)) as inner:
            for _ in range(3):
                inner.step(loss(net))
            handle.remove()  # or else it would also meet what arrives at the parameter
            return loss(net, IDS.flip(0)[:4])

    slope = sum((g * d).sum() for g, d in zip(torch.autograd.grad(outer(), start), directions))
    values = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            torch._foreach_add_(start, directions, alpha=step)
        values.append(outer().detach())
        with torch.no_grad():
            torch._foreach_add_(start, directions, alpha=-step)
    assert relative_error(slope, (values[0] - values[1]) / 2e-5) < META_GRADIENT


def test_what_arrives_at_the_parameter_meets_its_hook_once() -> None:
    def outer(net: Net) -> Tensor:
        with torchopt.inner_loop(net, torchopt.sgd(0.2)) as inner:
            for _ in range(3):
                inner.step(loss(net))
            return loss(net)

    net, twin = Net(), Net()
    handle = twin.rows.weight.register_hook(lambda grad: 2 * grad)
    net.rows.weight.register_hook(lambda grad: 2 * grad)
    value = outer(twin)
    handle.remove()
    value.backward()
    outer(net).backward()
    assert_close(net.rows.weight.grad, 2 * twin.rows.weight.grad)


def test_hooks_can_come_and_go_between_steps() -> None:
    net = Net()
    inner = torchopt.MetaSGD(net, lr=0.1)
    seen: list[str] = []
    first = net.rows.weight.register_hook(lambda grad: seen.append("first"))
    inner.step(loss(net))
    net.rows.weight.register_hook(lambda grad: seen.append("second"))
    inner.step(loss(net))
    inner.step(loss(net))
    assert sorted(seen) == ["first"] * 3 + ["second"] * 2
    first.remove()
    seen.clear()
    inner.step(loss(net))
    assert seen == ["second"]


def test_attributes_survive() -> None:
    net = Net()
    start = net.head.weight
    start.group = mark = object()  # pyright: ignore[reportAttributeAccessIssue]
    inner = torchopt.MetaSGD(net, lr=0.1)
    for _ in range(3):
        inner.step(loss(net))
        assert net.head.weight.group is mark
    net.head.weight.late = 1  # pyright: ignore[reportAttributeAccessIssue]
    without_a_graph(net, inner)
    torchopt.stop_gradient(net)
    inner.step(loss(net))
    assert (net.head.weight.group, net.head.weight.late) == (mark, 1)
    clone = torchopt.module_clone(net, by="copy")
    assert clone.head.weight.group is mark
    assert vars(start) == {"group": mark}
    assert vars(net.head.bias) == {}


def test_hooks_do_not_pile_up() -> None:
    net = masked()
    inner = torchopt.MetaSGD(net, lr=0.01)
    for _ in range(20):
        cut(net, inner)
        inner.step(loss(net))
    from torchopt.nn.marks import _HOOKS

    assert len(vars(net.rows.weight)[_HOOKS]) == 1
