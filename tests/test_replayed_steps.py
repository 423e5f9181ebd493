"""inner_loop(adjoint=...): steps that are computed again give the derivatives of recorded ones."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torchopt
from torchopt.diff import Checkpointed, FirstOrder, Offloaded, Truncated, Unrolled
from torchopt.diff.replay.store import MemoryStore


STEPS = 7


class Net(nn.Module):
    """Attributes, a hook, a frozen weight, a tied one, dropout, and a checkpointed block."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6) if norm else nn.Identity()
        self.middle, self.last = nn.Linear(6, 6), nn.Linear(6, 2, bias=False)
        self.frozen = nn.Parameter(torch.randn(6), requires_grad=False)
        self.drop, self.logged, self.scale = nn.Dropout(0.3), [], 1.0
        self.first.bias.register_hook(lambda g: 2 * g)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.drop(self.norm(self.first(x)).tanh() * self.frozen)
        hidden = checkpoint(self.middle, hidden, use_reentrant=False)
        return self.scale * self.last(hidden.tanh())

    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]

    def training_step(self, batch: Any) -> Tensor:
        x, y = batch
        loss = (self(x) - y).square().mean()
        self.logged.append(loss.detach())
        return loss


def derivatives(
    make: Callable[[Any], Any],
    adjoint: Any,
    *,
    norm: bool = True,
    between: bool = False,
    second: bool = False,
) -> list[Tensor]:
    """Return results and derivatives by weights, learned numbers, and tensors in the loss."""
    torch.manual_seed(0)
    net = Net(norm).double()
    start = net.trained()
    lr, decay = torch.tensor(0.1).double().requires_grad_(), torch.tensor(0.2).double()
    decay.requires_grad_()
    xs = [torch.randn(8, 4).double().requires_grad_() for _ in range(STEPS)]
    with torchopt.inner_loop(net, make(lr), adjoint=adjoint) as inner:
        for x in xs:  # the function reads x, which the loop gives another value
            inner.step(
                lambda: (
                    net.training_step((x, x[:, :2].detach().sin()))  # noqa: B023
                    + decay * sum((p - q).square().sum() for p, q in zip(net.trained(), start))
                )
            )
            if between:
                net(xs[0])
        outer = net(xs[0]).square().sum() + net.first.weight.sum()
        buffers = [buffer.clone().double() for buffer in net.buffers()]
        by = [*start, lr, decay, *xs]
        grads = torch.autograd.grad(outer, by, create_graph=second)
        results = [outer.detach(), *buffers, torch.rand(2), *(g.detach() for g in grads)]
        if second:
            results += torch.autograd.grad(torch.stack([g.square().sum() for g in grads]).sum(), by)
    assert all(p is q for p, q in zip(start, net.trained()))
    return results


MAKERS = {
    "sgd": lambda lr: torchopt.sgd(lr, momentum=0.9),
    "adam": torchopt.adam,
    "nadam": torchopt.nadam,  # has a counter, which a learned number makes a tensor
}
ADJOINTS = [Checkpointed(), Checkpointed("sqrt", store="cpu"), Checkpointed("log")]


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_the_derivatives_of_recorded_steps(adjoint: Any) -> None:
    """With BatchNorm and dropout; once with the network being used between the steps."""
    for name, between in (("sgd", False), ("adam", True)):
        expected = derivatives(MAKERS[name], None, between=between)
        found = derivatives(MAKERS[name], adjoint, between=between)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["sgd", "nadam"])
def test_second_derivatives(name: str) -> None:
    expected = derivatives(MAKERS[name], Unrolled(), norm=False, second=True)
    found = derivatives(MAKERS[name], Checkpointed("log"), norm=False, second=True)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_a_hessian_against_central_differences() -> None:
    """Carries that are kept are values: were they part of the graph, this would be off by much."""
    net, x = nn.Linear(2, 1, bias=False).double(), torch.randn(5, 2).double()
    start = torch.tensor([[0.3, -0.4]]).double()

    def gradient(values: Tensor, create_graph: bool) -> Tensor:
        with torch.no_grad():
            net.weight.copy_(values)
        with torchopt.inner_loop(net, torchopt.adam(0.2), adjoint=Checkpointed("log")) as inner:
            for _ in range(6):
                inner.step(lambda: (net(x).sin() - 1).square().mean())
            outer = net(x).cos().sum()
            return torch.autograd.grad(outer, theta, create_graph=create_graph)[0]

    theta = net.weight
    g = gradient(start, True)
    rows = [torch.autograd.grad(g[0, k], theta, retain_graph=True)[0][0] for k in range(2)]
    eps, found = 1e-6, torch.stack(rows)
    for k in range(2):
        shift = torch.zeros_like(start)
        shift[0, k] = eps
        up, down = gradient(start + shift, False), gradient(start - shift, False)
        torch.testing.assert_close(found[k], (up - down)[0] / (2 * eps), rtol=1e-6, atol=1e-8)


def test_modes_numbers_and_schedules_are_those_of_the_step() -> None:
    def run(adjoint: Any) -> list[Tensor]:
        torch.manual_seed(0)
        net = Net(True).double()
        start, x = list(net.first.parameters()), torch.randn(8, 4).double()
        with torchopt.inner_loop(net, torchopt.sgd(0.1), adjoint=adjoint) as inner:
            for step in range(4):
                net.train(step % 2 == 0)
                inner.param_groups[0]["lr"] = 0.1 * (step + 1)
                inner.step(lambda: net(x).square().mean())
            net.eval()
            return list(torch.autograd.grad(net(x).sum(), start))

    torch.testing.assert_close(run(Checkpointed("log")), run(None), rtol=1e-10, atol=1e-10)


def test_autocast_is_that_of_the_step() -> None:
    def run(adjoint: Any) -> Tensor:
        torch.manual_seed(0)
        net, x = nn.Linear(8, 8), torch.randn(4, 8)
        start = net.weight
        with torchopt.inner_loop(net, torchopt.sgd(0.5), adjoint=adjoint) as inner:
            with torch.autocast("cpu", torch.bfloat16):
                for _ in range(3):
                    inner.step(lambda: net(x).float().square().mean())
            return torch.autograd.grad(net(x).sum(), start)[0]

    expected = run(None)
    torch.testing.assert_close(run(Checkpointed(2)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("every", "most"), [(1, 40), (8, 6), ("sqrt", 14), ("log", 12)])
def test_how_many_carries_are_kept(every: Any, most: int, monkeypatch: Any) -> None:
    """And no graph: neither of a step, nor of the block once it has been differentiated."""
    stores: list[MemoryStore] = []
    monkeypatch.setattr(
        "torchopt.diff.adjoints.checkpointed.STORES",
        {"memory": lambda: stores.append(MemoryStore()) or stores[-1]},
    )
    net, x, counts, weights = nn.Linear(3, 3), torch.randn(4, 3), [], []
    start = net.weight
    gc.collect()
    gc.disable()
    try:
        with torchopt.inner_loop(net, torchopt.sgd(0.1), adjoint=Checkpointed(every)) as inner:
            for _ in range(40):
                inner.step(lambda: net(x).square().mean())
                counts.append(len(stores[0].carries))
                weights.append(weakref.ref(net.weight))
            assert max(counts) <= most
            assert sum(w() is not None for w in weights) <= 2
            torch.autograd.grad(net(x).sum(), start)
        assert not any(w() is not None for w in weights)
        assert not stores[0].carries or max(stores[0].carries) == 0
    finally:
        gc.enable()


def test_a_loss_that_is_another_one_is_refused() -> None:
    net, batches = nn.Linear(2, 1), iter(torch.randn(20, 4, 2))
    start = net.weight
    with torchopt.inner_loop(net, torchopt.sgd(0.1), adjoint=Checkpointed()) as inner:
        loss = lambda: net(next(batches)).square().mean()  # noqa: E731
        with pytest.raises(RuntimeError, match=r"was .*, and is|gives another value"):
            inner.step(loss)
    held = [torch.randn(4, 2)]
    with torchopt.inner_loop(net, torchopt.sgd(0.1), adjoint=Checkpointed()) as inner:
        for _ in range(3):
            inner.step(lambda: net(held[0]).square().mean())
        held[0] = torch.randn(4, 2)
        with pytest.raises(RuntimeError, match=r"reads something that has changed.*partial"):
            torch.autograd.grad(net(held[0]).sum(), start)
        weight = net.weight
    assert net.weight is start
    assert weight is not start


def test_a_partial_keeps_its_batch() -> None:
    net, held = nn.Linear(2, 1), [torch.randn(4, 2)]
    start = net.weight

    def loss(x: Tensor) -> Tensor:
        return net(x).square().mean()

    with torchopt.inner_loop(net, torchopt.sgd(0.1), adjoint=Checkpointed()) as inner:
        inner.step(functools.partial(loss, held[0]))
        held[0] = torch.randn(4, 2)
        torch.autograd.grad(net(held[0]).sum(), start)


def test_under_no_grad_nothing_is_kept_and_the_block_ends_as_ever() -> None:
    net, x = nn.Linear(2, 1), torch.randn(4, 2)
    optimizer, start = torchopt.MetaSGD(net, lr=0.1), net.weight
    with torchopt.inner_loop(net, optimizer, adjoint=Checkpointed()) as inner:
        with torch.no_grad():
            inner.step(lambda: net(x).square().mean())
        assert net.weight.is_leaf
        assert net.weight is not start
    assert net.weight is start
    optimizer.step(net(x).square().mean())  # takes a loss again
    assert net.weight is not start


def test_the_outer_loss_may_be_differentiated_after_the_block() -> None:
    """When the network is what it was before, and is so again afterwards."""

    def run(adjoint: Any) -> list[Tensor]:
        torch.manual_seed(0)
        net = Net(True).double()
        net.shared = net.norm  # a module that is there twice has its buffers twice
        x, start = torch.randn(8, 4).double(), net.trained()
        with torchopt.inner_loop(net, torchopt.adam(0.1), adjoint=adjoint) as inner:
            for _ in range(4):
                inner.step(lambda: net(x).square().mean())
            outer = net(x).sin().sum()
        before = [*net.parameters(), *net.buffers()]
        values = [tensor.detach().clone() for tensor in before]
        outer.backward()
        assert all(map(lambda a, b: a is b, before, [*net.parameters(), *net.buffers()]))
        assert all(map(torch.equal, before, values))
        return [p.grad for p in start if p.grad is not None]

    torch.testing.assert_close(run(Checkpointed("log")), run(None), rtol=1e-10, atol=1e-10)


class NeedsAll:
    """An adjoint that wants to see a whole loop."""

    def run(self, loop: Any) -> Any:
        raise NotImplementedError

    def __repr__(self) -> str:
        return "NeedsAll()"


@pytest.mark.parametrize(
    ("adjoint", "error", "message"),
    [
        (NeedsAll(), ValueError, r"NeedsAll\(\) needs all steps of a loop at once.*unroll"),
        (Offloaded(), ValueError, "save_on_cpu"),
        (Checkpointed("revolve"), ValueError, r'beforehand.*Checkpointed\("log"\)'),
        (Checkpointed(store="./somewhere"), ValueError, "cannot go on after a kill"),
        (Checkpointed(progress=print), ValueError, "progress is for unroll"),
        ("log", TypeError, r"expects adjoint=Checkpointed\(\).*'log'"),
    ],
)
def test_adjoints_that_do_not_fit(adjoint: Any, error: type[Exception], message: str) -> None:
    net = nn.Linear(2, 1)
    block = torchopt.inner_loop(net, torchopt.sgd(0.1), adjoint=adjoint)
    with pytest.raises(error, match=message):
        block.__enter__()


def test_bad_steps() -> None:
    net, x = nn.Linear(2, 1), torch.randn(4, 2)
    tx = torchopt.sgd(0.1, momentum=0.9)
    with torchopt.inner_loop(net, tx, adjoint=Checkpointed()) as inner:
        before = net.weight
        with pytest.raises(TypeError, match=r"takes a function that computes the loss, got"):
            inner.step(net(x).square().mean())  # pyright: ignore[reportArgumentType]
        with pytest.raises(ValueError, match="cannot be computed again"):
            inner.step(grads=[None, None])
        with pytest.raises(ValueError, match="scalar loss"):
            inner.step(lambda: net(x))
        assert net.weight is before
        assert inner.extract_state()[0].step == 0
        assert not any(inner.extract_state()[0].slots.values())


def learned_rate(adjoint: Any, cut: int | None = None) -> Tensor:
    """Return the derivative of a loss by a rate; before step ``cut`` the graph is cut by hand."""
    torch.manual_seed(0)
    net, x = nn.Linear(3, 3).double(), torch.randn(5, 3).double()
    lr = torch.tensor(0.1).double().requires_grad_()
    with torchopt.inner_loop(net, torchopt.adam(lr), adjoint=adjoint) as inner:
        for step in range(6):
            if step == cut:
                torchopt.stop_gradient(net)
                torchopt.stop_gradient(inner)
            inner.step(lambda: net(x).sin().square().mean())
        return torch.autograd.grad(net(x).square().sum(), lr)[0]


def test_truncation_and_first_order() -> None:
    found = learned_rate(Truncated(2))
    torch.testing.assert_close(found, learned_rate(None, cut=4), rtol=1e-10, atol=1e-10)
    assert (found - learned_rate(Checkpointed())).abs() > 1e-3
    first_order = learned_rate(FirstOrder())
    torch.manual_seed(0)
    net, x = nn.Linear(3, 3).double(), torch.randn(5, 3).double()
    lr = torch.tensor(0.1).double().requires_grad_()
    with torchopt.inner_loop(net, torchopt.adam(lr), create_graph=False) as inner:
        for _ in range(6):
            inner.step(net(x).sin().square().mean())
        expected = torch.autograd.grad(net(x).square().sum(), lr)[0]
    torch.testing.assert_close(first_order, expected, rtol=1e-12, atol=1e-12)
