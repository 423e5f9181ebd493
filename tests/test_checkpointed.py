"""torch.utils.checkpoint inside an inner loop: computed again with the weights of that moment."""

from __future__ import annotations

import gc
import types
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from tolerances import META_GRADIENT, assert_close, relative_error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import torchopt
from torchopt.nn import checkpointing, moments


X = torch.linspace(-1.0, 1.5, 24, dtype=torch.float64).sin().reshape(8, 3)
Y = torch.linspace(0.5, -1.0, 8, dtype=torch.float64).reshape(8, 1)

again = partial(checkpoint, use_reentrant=False)


def plain(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def nested(block: Any, x: Tensor) -> Tensor:
    return again(lambda h: again(block[1:], again(block[0], h)), x)


class Net(nn.Module):
    """Two blocks, each computed by ``run(block, x)``."""

    def __init__(self, run: Any, make: Callable[[], nn.Module] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        make = make or (lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)))
        self.first, self.second = make().double(), make().double()
        self.last = nn.Linear(3, 1).double()
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        h = self.run(self.first, x) + x
        return self.last(torch.tanh(self.run(self.second, h)))


def loss(net: nn.Module) -> Tensor:
    return (net(X) - Y).square().mean()


def in_block(net: nn.Module, start: list[Tensor], steps: int = 2, inside: bool = False) -> Any:
    with torchopt.inner_loop(net, torchopt.sgd(0.3, momentum=0.5)) as inner:
        for _ in range(steps):
            inner.step(loss(net))
        outer = loss(net)
        if inside:
            return torch.autograd.grad(outer, start)
    return torch.autograd.grad(outer, start)


def by_hand(net: nn.Module, start: list[Tensor], steps: int = 2, inside: bool = False) -> Any:
    """Two tasks from one state, without inner_loop; all losses are differentiated at the end."""
    inner = torchopt.MetaAdam(net, lr=0.05)
    outer: Any = 0.0
    states = [torchopt.extract_state_dict(x) for x in (net, inner)]
    for task in range(2):
        for _ in range(steps):
            inner.step(loss(net) * (1 + task))
            outer = outer + 0.1 * loss(net)
        if not inside or task == 0:
            torchopt.recover_state_dict(net, states[0])
            torchopt.recover_state_dict(inner, states[1])
    return torch.autograd.grad(outer, start)


def assert_as_plain(way: Any, run: Any, make: Any = None, **options: Any) -> None:
    net, twin = Net(run, make), Net(plain, make)
    found = way(net, list(net.parameters()), **options)
    assert_close(found, way(twin, list(twin.parameters()), **options))


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("run", [again, nested])
@pytest.mark.parametrize("way", [in_block, by_hand])
def test_the_meta_gradient_is_that_of_the_plain_network(
    way: Any, run: Any, steps: int, inside: bool
) -> None:
    assert_as_plain(way, run, steps=steps, inside=inside)


def test_the_meta_gradient_agrees_with_central_differences() -> None:
    net = Net(again)
    start = list(net.parameters())
    directions = [torch.randn_like(p) for p in start]

    def outer() -> Tensor:
        with torchopt.inner_loop(net, torchopt.adam(0.05)) as inner:
            for _ in range(3):
                inner.step(loss(net))
            return loss(net)

    slope = sum((g * d).sum() for g, d in zip(torch.autograd.grad(outer(), start), directions))
    values = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            torch._foreach_add_(start, directions, alpha=step)
            values.append(outer_value(net))
            torch._foreach_add_(start, directions, alpha=-step)
    assert relative_error(slope, (values[0] - values[1]) / 2e-5) < META_GRADIENT


def outer_value(net: nn.Module) -> Tensor:
    with torch.enable_grad(), torchopt.inner_loop(net, torchopt.adam(0.05)) as inner:
        for _ in range(3):
            inner.step(loss(net))
        return loss(net).detach()


def test_first_order_and_a_step_without_graph() -> None:
    def first_order(net: nn.Module, start: list[Tensor]) -> Any:
        with torchopt.inner_loop(net, torchopt.adam(0.1), create_graph=False) as inner:
            for _ in range(3):
                inner.step(loss(net))
            kept = loss(net)
            with torch.no_grad():
                inner.step(kept, retain_graph=True)
        return torch.autograd.grad(kept, start)

    assert_as_plain(first_order, again)


def test_a_recurrent_network() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x.unsqueeze(0))[0].squeeze(0)

    assert_as_plain(in_block, again, Recurrent)


def test_buffers_and_mode_of_the_block() -> None:
    """The block's copies of the statistics are used again, not the network's own."""

    def way(net: nn.Module, start: list[Tensor]) -> Any:
        with torchopt.inner_loop(net, torchopt.sgd(0.1)) as inner:
            loss(net)
            net.eval()
            for _ in range(2):
                inner.step(loss(net))
            outer = loss(net)
        assert net.training
        before = [b.clone() for b in net.buffers()]
        found = torch.autograd.grad(outer, start)
        assert all(map(torch.equal, net.buffers(), before))
        assert net.training
        return found

    assert_as_plain(way, again, lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))


def test_what_the_module_holds_afterwards_is_what_it_held() -> None:
    net = Net(again)
    start = list(net.parameters())
    inner = torchopt.MetaSGD(net, lr=0.1)
    first = loss(net)
    inner.step(loss(net))
    held, names = list(net.parameters()), list(dict(net.named_parameters()))
    torch.autograd.grad(first, start)
    assert all(a is b for a, b in zip(held, net.parameters()))
    assert names == list(dict(net.named_parameters()))


def test_an_error_of_the_function_leaves_the_module_as_it_was() -> None:
    calls: list[int] = []

    def failing(block: Any, x: Tensor) -> Tensor:
        def function(h: Tensor) -> Tensor:
            calls.append(1)
            if len(calls) > 6:
                raise KeyError("mine")
            return block(h)

        return again(function, x)

    net = Net(failing)
    inner = torchopt.MetaSGD(net, lr=0.1)
    first = loss(net)
    inner.step(loss(net))
    held = list(net.parameters())
    with pytest.raises(KeyError, match="mine"):
        first.backward()
    assert all(a is b for a, b in zip(held, net.parameters()))
    torchopt.stop_gradient(net)  # a function in the graph of the weights that its module holds


def test_a_reentrant_checkpoint_in_the_outer_loss() -> None:
    """It refuses autograd.grad, and runs through the graph behind the weights once for each block.

    So only the outer loss can have one, and only in first order.
    """

    def way(net: Any, start: list[Tensor]) -> Any:
        run, net.run = net.run, plain
        with torchopt.inner_loop(net, torchopt.sgd(0.3), create_graph=False) as inner:
            inner.step(loss(net))
            net.run = run
            outer = (net(X.clone().requires_grad_()) - Y).square().mean()
        outer.backward()
        return [p.grad for p in start]

    assert_as_plain(way, partial(checkpoint, use_reentrant=True))


def test_the_context_of_the_user_stays() -> None:
    entered: list[str] = []

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
        entered.append(str(op))
        return torch.utils.checkpoint.CheckpointPolicy.PREFER_RECOMPUTE

    context_fn = partial(create_selective_checkpoint_contexts, policy)
    assert_as_plain(in_block, partial(again, context_fn=context_fn))
    assert entered


def test_weights_that_a_block_put_back_in_place_are_an_error() -> None:
    net = Net(again)
    with torchopt.inner_loop(net, torchopt.sgd(0.1)):
        with torch.no_grad():
            net.first[0].weight.mul_(2.0)  # pyright: ignore[reportIndexIssue]
        outer = loss(net)
    with pytest.raises(RuntimeError, match="had been changed in place"):
        outer.backward()


def test_nothing_is_kept_when_the_graph_is_gone() -> None:
    def alive() -> set[int]:
        return {id(moment()) for moment in moments.references if moment() is not None}

    net, before = Net(again), alive()
    in_block(net, list(net.parameters()), steps=3)
    inner = torchopt.MetaSGD(net, lr=0.1)
    inner.step(loss(net))
    fast = weakref.ref(net.last.weight)
    torchopt.stop_gradient(net)
    torchopt.stop_gradient(inner)
    gc.collect()
    assert fast() is None
    assert alive() <= before


def test_a_foreign_checkpoint_is_refused_and_told_from_a_known_one() -> None:
    known = torch.utils.checkpoint
    assert checkpointing.install(known)
    assert known._CheckpointFrame.__mro__.count(checkpointing._Remembers) == 1  # not twice
    assert not checkpointing.install(types.SimpleNamespace())
    other = types.SimpleNamespace(**vars(known))
    other._CheckpointFrame = object
    assert not checkpointing.install(other)


def test_where_the_classes_are_unknown_the_module_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    base = torch.utils.checkpoint._CheckpointFrame.__mro__[1]
    monkeypatch.setattr(torch.utils.checkpoint, "_CheckpointFrame", base)
    monkeypatch.setattr(moments, "noting", [True])
    handle = nn.modules.module.register_module_forward_pre_hook(checkpointing.refuse_in_backward)
    try:
        net = Net(again)
        with pytest.raises(RuntimeError, match="Do not checkpoint inside an inner loop"):
            in_block(net, list(net.parameters()))
    finally:
        handle.remove()
