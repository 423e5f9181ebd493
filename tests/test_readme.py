"""The five code samples of the original README, as they stand."""

import contextlib
import re
from pathlib import Path
from typing import Any

import functorch
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import TorchOpt
import torchopt


STEPS = 40


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, x):
        return self.fc(x)


class Loader:
    """Batches of a regression task whose targets a ``Net`` can reach."""

    def __init__(self, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.xs = torch.randn(32, 3, generator=generator)
        self.ys = torch.sin(self.xs @ torch.randn(3, 2, generator=generator))

    def __iter__(self):
        return iter(torch.utils.data.DataLoader(list(zip(self.xs, self.ys)), batch_size=16))


@pytest.fixture(autouse=True)
def _double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(3)
    yield
    torch.set_default_dtype(before)


def epochs(loader, count=STEPS):
    for _ in range(count):
        yield from loader


def make_functional(net):
    """``functorch.make_functional``: still there in torch 2.13, but deprecated, and it warns."""
    with pytest.warns(FutureWarning, match="make_functional"):
        return functorch.make_functional(net)


def assert_falls(losses, batches=1):
    """Compare the first loss with the last one on the same batch."""
    assert losses[-batches] < 0.7 * losses[0]


def test_the_package_has_its_old_name():
    assert TorchOpt is torchopt
    assert TorchOpt.adam is torchopt.adam


def test_sample_1_functional():
    net, loader, loss_fn, losses = Net(), Loader(), F.mse_loss, []
    before = [p.detach().clone() for p in net.parameters()]

    optimizer = TorchOpt.adam(lr=0.02)
    func, params = make_functional(net)
    opt_state = optimizer.init(params)
    for xs, ys in epochs(loader):
        pred = func(params, xs)
        loss = loss_fn(pred, ys)
        grad = torch.autograd.grad(loss, params)
        updates, opt_state = optimizer.update(grad, opt_state)
        params = TorchOpt.apply_updates(params, updates)
        losses.append(loss.item())

    assert_falls(losses, batches=2)
    assert opt_state.step == 2 * STEPS
    assert all(p.requires_grad and p.is_leaf for p in params)
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before))


@pytest.mark.parametrize("lr", [None, 0.02], ids=["default_lr", "lr"])
def test_sample_2_like_torch(lr):
    net, loader, losses = Net(), Loader(), []
    options = {} if lr is None else {"lr": lr}

    optimizer = TorchOpt.Adam(net.parameters(), **options)
    for xs, ys in epochs(loader, STEPS if lr else 5 * STEPS):
        pred = net(xs)
        loss = F.mse_loss(pred, ys)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    assert losses[-2] < (0.7 if lr else 0.95) * losses[0]  # the same batch


def test_sample_3_differentiable_functional():
    net, loader, losses = Net(), Loader(), []
    start = list(net.parameters())

    optimizer = TorchOpt.adam(lr=0.02)
    func, params = make_functional(net)
    first = params
    opt_state = optimizer.init(params)
    for xs, ys in epochs(loader, 10):
        pred = func(params, xs)
        loss = F.mse_loss(pred, ys)
        grad = torch.autograd.grad(loss, params, create_graph=True)
        updates, opt_state = optimizer.update(grad, opt_state, inplace=False)
        params = TorchOpt.apply_updates(params, updates, inplace=False)
        losses.append(loss.item())

    assert losses[-1] < losses[0]
    assert all(p.grad_fn is not None for p in params)
    assert type(params) is type(first)
    grads = torch.autograd.grad(F.mse_loss(func(params, loader.xs), loader.ys), first)
    assert all(g.abs().max() > 0 for g in grads)
    assert all(torch.equal(p, s) for p, s in zip(first, start))


def test_sample_3_meta_gradient_against_central_differences():
    net, loader = Net(), Loader()
    func, first = make_functional(net)
    optimizer = TorchOpt.adam(lr=0.02)

    def outer(params):
        opt_state = optimizer.init(params)
        for xs, ys in epochs(loader, 2):
            loss = F.mse_loss(func(params, xs), ys)
            grad = torch.autograd.grad(loss, params, create_graph=True)
            updates, opt_state = optimizer.update(grad, opt_state, inplace=False)
            params = TorchOpt.apply_updates(params, updates, inplace=False)
        return F.mse_loss(func(params, loader.xs), loader.ys)

    grads = torch.autograd.grad(outer(first), first)
    directions = [torch.randn_like(p) for p in first]
    values = []
    for sign in (1e-6, -1e-6):
        shifted = [(p.detach() + sign * d).requires_grad_(True) for p, d in zip(first, directions)]
        values.append(outer(tuple(shifted)).detach())
    slope = sum((g * d).sum() for g, d in zip(grads, directions))
    assert slope.abs() > 1e-4
    torch.testing.assert_close(slope, (values[0] - values[1]) / 2e-6, rtol=1e-6, atol=1e-10)


def maml_losses(net, inner_optim, outer_optim, tasks, inner_iter, meta_iter):
    """Run the MAML sample; return the outer losses and the last meta-gradient."""
    history = []
    for _ in range(meta_iter):
        outer_loss = 0
        net_state = TorchOpt.extract_state_dict(net)
        optim_state = TorchOpt.extract_state_dict(inner_optim)
        for xs, ys in tasks:
            for _ in range(inner_iter):
                inner_loss = F.mse_loss(net(xs), ys)
                inner_optim.step(inner_loss)
            outer_loss = outer_loss + F.mse_loss(net(xs), ys)
            TorchOpt.recover_state_dict(inner_optim, optim_state)
            TorchOpt.recover_state_dict(net, net_state)
        outer_optim.zero_grad()
        outer_loss.backward()
        outer_optim.step()
        TorchOpt.stop_gradient(net)
        TorchOpt.stop_gradient(inner_optim)
        history.append(outer_loss.item())
    return history


def test_sample_4_maml():
    net, tasks = Net(), [next(iter(Loader(seed))) for seed in range(3)]
    start = list(net.parameters())
    inner_optim = TorchOpt.MetaAdam(net, lr=0.02)
    outer_optim = TorchOpt.Adam(net.parameters(), lr=0.02)
    losses = maml_losses(net, inner_optim, outer_optim, tasks, inner_iter=3, meta_iter=20)
    assert_falls(losses)
    assert all(p is s for p, s in zip(net.parameters(), start))
    assert TorchOpt.extract_state_dict(inner_optim)[0].step == 0


def test_sample_4_maml_with_the_defaults():
    net, tasks = Net(), [next(iter(Loader(seed))) for seed in range(2)]
    inner_optim = TorchOpt.MetaAdam(net)
    outer_optim = TorchOpt.Adam(net.parameters())
    losses = maml_losses(net, inner_optim, outer_optim, tasks, inner_iter=2, meta_iter=10)
    assert losses[-1] < losses[0]


def test_sample_4_meta_gradient_against_central_differences():
    net, tasks = Net(), [next(iter(Loader(seed))) for seed in range(2)]
    params = list(net.parameters())

    def outer_loss(gradient):
        inner_optim = TorchOpt.MetaAdam(net, lr=0.02)
        still = torch.optim.SGD(net.parameters(), lr=0.0)
        (value,) = maml_losses(net, inner_optim, still, tasks, inner_iter=3, meta_iter=1)
        if gradient:
            return [p.grad.clone() for p in params]
        return value

    grads = outer_loss(gradient=True)
    for _ in range(2):
        directions = [torch.randn_like(p) for p in params]
        values = []
        for sign in (1e-6, -1e-6):
            with torch.no_grad():
                for p, d in zip(params, directions):
                    p.add_(d, alpha=sign)
            values.append(outer_loss(gradient=False))
            with torch.no_grad():
                for p, d in zip(params, directions):
                    p.sub_(d, alpha=sign)
        slope = sum((g * d).sum() for g, d in zip(grads, directions)).item()
        expected = (values[0] - values[1]) / 2e-6
        assert abs(slope) > 1e-4
        assert slope == pytest.approx(expected, rel=1e-6)


def test_sample_5_state_and_stop_gradient():
    net, (xs, ys) = Net(), next(iter(Loader()))
    inner_optim = TorchOpt.MetaAdam(net, lr=0.02)

    net_state = TorchOpt.extract_state_dict(net)
    optim_state = TorchOpt.extract_state_dict(inner_optim)
    losses = []
    for _ in range(10):
        loss = F.mse_loss(net(xs), ys)
        inner_optim.step(loss)
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    TorchOpt.recover_state_dict(inner_optim, optim_state)
    TorchOpt.recover_state_dict(net, net_state)
    assert F.mse_loss(net(xs), ys).item() == losses[0]

    again = []
    for _ in range(10):
        loss = F.mse_loss(net(xs), ys)
        inner_optim.step(loss)
        TorchOpt.stop_gradient(net)
        TorchOpt.stop_gradient(inner_optim)
        again.append(loss.item())
        assert all(p.is_leaf for p in net.parameters())
    assert again == pytest.approx(losses, rel=1e-12)


# use_accelerated_op -----------------------------------------------------------------------------


FACES = {
    "adam": lambda net, **kw: TorchOpt.adam(lr=0.02, **kw),
    "Adam": lambda net, **kw: TorchOpt.Adam(net.parameters(), lr=0.02, **kw),
    "MetaAdam": lambda net, **kw: TorchOpt.MetaAdam(net, lr=0.02, **kw),
}


def one_step(face, net, optimizer):
    xs, ys = next(iter(Loader()))
    loss = F.mse_loss(net(xs), ys)
    if face == "MetaAdam":
        optimizer.step(loss)
    elif face == "Adam":
        loss.backward()
        optimizer.step()
    else:
        params = tuple(net.parameters())
        grads = torch.autograd.grad(loss, params)
        updates, _ = optimizer.update(grads, optimizer.init(params))
        TorchOpt.apply_updates(params, updates)
    return [p.detach().clone() for p in net.parameters()]


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("value", [None, False])
def test_use_accelerated_op_when_available_or_never(face, value):
    results = []
    for options in ({}, {"use_accelerated_op": value}):
        torch.manual_seed(0)
        net = Net()
        results.append(one_step(face, net, FACES[face](net, **options)))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("face", FACES)
def test_use_accelerated_op_required(face):
    """Required kernels are either there and used, or their absence is an error with the reason."""
    torch.manual_seed(0)
    net = Net()
    before = [p.detach().clone() for p in net.parameters()]
    available = TorchOpt.accelerated_op_available()
    refused = pytest.raises(RuntimeError, match=r"use_accelerated_op=True requires .*, but ")
    with contextlib.nullcontext() if available else refused:
        optimizer = FACES[face](net, use_accelerated_op=True)
    if available:
        moved = one_step(face, net, optimizer)
        assert all(not torch.equal(m, b) for m, b in zip(moved, before))
    else:
        assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before))


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("value", [1, "yes", 0.0], ids=repr)
def test_use_accelerated_op_of_another_type(face, value):
    with pytest.raises(TypeError, match="None, True or False"):
        FACES[face](Net(), use_accelerated_op=value)


README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.strip().splitlines()[-1][:40])
def test_every_block_of_our_readme_runs_alone(block: str, capsys) -> None:
    torch.set_default_dtype(torch.float32)
    exec(block.replace("range(1000)", "range(2)"), {})
    printed = capsys.readouterr().out
    if "validation loss after five steps" in block:
        (shown,) = re.findall(r"```text\n(.*?)```", README, re.DOTALL)
        numbers = [[float(x) for x in re.findall(r"\d+\.\d+", text)] for text in (printed, shown)]
        assert numbers[0] == pytest.approx(numbers[1], abs=2e-3)


def test_the_maml_of_our_readme_learns_to_learn() -> None:
    (block,) = [b for b in BLOCKS if "range(1000)" in b]
    lines = [line for line in block.splitlines() if line.strip()]
    assert len(lines) <= 16
    scope: dict[str, Any] = {}
    exec(block.replace("range(1000)", "range(150)"), scope)
    net = scope["net"]

    def after_one_step(network: torch.nn.Module) -> float:
        torch.manual_seed(3)
        losses = []
        for _ in range(100):
            amplitude, phase = 0.1 + 4.9 * torch.rand(1), 3.14 * torch.rand(1)
            x = 10 * torch.rand(20, 1) - 5
            y = amplitude * torch.sin(x + phase)
            with torchopt.inner_loop(network, torchopt.sgd(lr=0.01)) as inner:
                inner.step((network(x[:10]) - y[:10]).square().mean())
                losses.append((network(x[10:]) - y[10:]).square().mean().item())
        return sum(losses) / len(losses)

    torch.manual_seed(0)
    untrained = torch.nn.Sequential(torch.nn.Linear(1, 40), torch.nn.Tanh(), torch.nn.Linear(40, 1))
    assert after_one_step(net) < 0.95 * after_one_step(untrained)
