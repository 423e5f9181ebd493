"""Loops whose later steps are not like the first, and results that are used or changed."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from test_unroll_closures import ADJOINTS, REPLAYED, W, number
from torch import Tensor, nn

import torchopt
from torchopt.diff import Checkpointed, Forward, Unrolled, unroll
from torchopt.diff.replay.random_state import RandomState


@pytest.mark.parametrize("adjoint", [Checkpointed(), Checkpointed("log"), Forward()], ids=repr)
def test_what_the_first_step_alone_leaves_constant(adjoint: Any) -> None:
    def run(adjoint: Any, only: int | None = None) -> Tensor:
        def step(carry: Any, _: None) -> Any:
            w, m, n = carry
            y = w.sum() if (n % 2 if only is None else n == only) else torch.zeros(()).double()
            m = 0.9 * m + w.cos() if n else torch.zeros_like(w).detach()
            return (w - 0.1 * m, m, n + 1), y

        (w, m, _), ys = unroll(step, (W, torch.zeros_like(W), 0), length=5, adjoint=adjoint)
        return torch.autograd.grad(w.sum() + m.sin().sum() + ys.sum(), W)[0]

    torch.testing.assert_close(run(adjoint), run(Unrolled()), rtol=1e-10, atol=1e-12)
    if isinstance(adjoint, Forward):  # which knows of every step
        torch.testing.assert_close(run(adjoint, 2), run(Unrolled(), 2), rtol=1e-10, atol=1e-12)
        return
    with pytest.raises(RuntimeError, match=r"In the first step y is a constant"):
        run(adjoint, 2)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
@pytest.mark.parametrize("name", REPLAYED)
def test_a_network_that_is_only_a_template_is_left_alone(name: str) -> None:
    """As with functional_call: its own parameters are in sight, and no step reads them."""
    net, x = nn.Linear(2, 2).double(), torch.randn(3, 2).double()
    called: list[Any] = []
    for p in net.parameters():
        p.register_hook(called.append)

    def step(carry: Any, _: None) -> Any:
        w, th = carry
        loss = lambda w: torch.func.functional_call(net, w, x).square().mean()  # noqa: E731
        return ({n: w[n] - th * g for n, g in torch.func.grad(loss)(w).items()}, th), None

    start = {n: torch.randn_like(p) for n, p in net.named_parameters()}
    th = number(0.1)
    (w, _), _ = unroll(step, (start, th), length=4, adjoint=ADJOINTS[name])
    loss = torch.func.functional_call(net, w, x).sum()
    with torch.no_grad():
        net.weight.add_(1)
    net.requires_grad_(False)
    loss.backward(create_graph=True)
    net.requires_grad_(True)
    assert th.grad is not None
    assert [p.grad for p in net.parameters()] == [None, None]
    assert not called
    (w, _), _ = unroll(step, (start, th.detach()), length=4, adjoint=ADJOINTS[name])
    assert not any(t.requires_grad for t in w.values())


@pytest.mark.parametrize("name", REPLAYED)
def test_what_is_asked_for_its_shape_alone_may_be_written_to(name: str) -> None:
    x = torch.ones(2, dtype=torch.float64)

    def step(w: Tensor, _: None) -> Any:
        return (w * len(x) * x.size(0) / x.numel()).view_as(x) + torch.zeros_like(x), None

    w, _ = unroll(step, W, length=4, adjoint=ADJOINTS[name])
    x.add_(1)
    torch.testing.assert_close(torch.autograd.grad(w.sum(), W)[0], torch.full_like(W, 16.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_small_rate_that_has_changed_is_noticed(dtype: torch.dtype) -> None:
    """The last step moves no weight by more than rounding might, were that guessed generously."""

    class Rates:
        lr = 1e-3 if dtype is torch.float32 else 1e-6

    start = torch.ones(2, dtype=dtype, requires_grad=True)
    w, _ = unroll(lambda w, _: (w - Rates.lr * w**2, None), start, length=3, adjoint=Checkpointed())
    Rates.lr *= 3
    with pytest.raises(RuntimeError, match="another value"):
        torch.autograd.grad(w.sum(), start)


def test_what_is_written_to_between_orders_is_refused() -> None:
    x, th = torch.ones((), dtype=torch.float64), number(2.0)
    start = torch.ones((), dtype=torch.float64)
    w, _ = unroll(lambda w, _: (w * th * x, None), start, length=3, adjoint=Checkpointed())
    (g,) = torch.autograd.grad(w, th, create_graph=True)
    x.mul_(10)
    with pytest.raises(RuntimeError, match=r"read 'x', which was changed|inplace operation"):
        torch.autograd.grad(g, th)


@pytest.mark.parametrize("name", ["1", "log"])
def test_torch_func_names_what_a_later_step_reads_first(name: str) -> None:
    def outer(k: Tensor) -> Tensor:
        step = lambda c, _: ((c[0] * 0.9 + (k if c[1] else 0.0), c[1] + 1), None)  # noqa: E731
        return unroll(step, (k.sin(), 0), length=4, adjoint=ADJOINTS[name])[0][0]

    for derivative in (torch.func.grad, torch.func.jacfwd, torch.func.hessian):
        with pytest.raises(RuntimeError, match=r"depends on 'k'.*first step does not read"):
            derivative(outer)(torch.tensor(1.0).double())


@pytest.mark.parametrize("name", REPLAYED)
def test_results_may_be_changed_before_the_backward_pass(name: str) -> None:
    """A leaf that a step in the middle makes and others hand on is kept somewhere, and returned."""

    def run(adjoint: Any, change: bool) -> Tensor:
        def step(carry: Any, _: None) -> Any:
            w, b, n = carry
            y = (w * b).sum()
            w = (w * 1.1).sin()
            return (w, w * w if n == 2 else b, n + 1), y

        (_, b, _), ys = unroll(step, (W, 1 * W, 0), length=13, adjoint=adjoint)
        loss = ys.sum()
        if change:
            with torch.no_grad():
                b.mul_(0)
        return torch.autograd.grad(loss, W)[0]

    expected = run(Unrolled(), False)
    torch.testing.assert_close(run(ADJOINTS[name], True), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", REPLAYED)
def test_writing_to_what_is_read_is_refused_where_no_carry_shows_it(name: str) -> None:
    scale = torch.ones(2, dtype=torch.float64)

    def run(late: bool) -> None:
        def step(carry: Any, _: None) -> Any:
            w, n = carry
            if late and n == 2:
                scale.mul_(2)
            return (w.sin(), n + 1), (w * scale).sum()

        _, ys = unroll(step, (W, 0), length=4, adjoint=ADJOINTS[name])
        scale.add_(1)
        torch.autograd.grad(ys.sum(), W)

    for late in (False, True):
        with pytest.raises(RuntimeError, match="read 'scale', which was changed in place"):
            run(late)


@pytest.mark.parametrize("name", REPLAYED)
def test_writing_to_what_only_later_steps_read_is_refused(name: str) -> None:
    scale = torch.ones(2, dtype=torch.float64)

    def step(carry: Any, _: None) -> Any:
        w, n = carry
        return (w.sin(), n + 1), (w * (scale if n else 1)).sum()

    _, ys = unroll(step, (W, 0), length=4, adjoint=ADJOINTS[name])
    scale.add_(1)
    with pytest.raises(RuntimeError, match="read 'scale', which was changed in place"):
        torch.autograd.grad(ys.sum(), W)


def test_retained_gradients_are_not_added_up_in_parts() -> None:
    found = []
    for adjoint in (Unrolled(), Checkpointed("sqrt")):
        h = number(0.7) * 1
        h.retain_grad()
        w, _ = unroll(lambda w, _: (w * h, None), W, length=3, adjoint=adjoint)  # noqa: B023
        w.sum().backward()
        found.append(h.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=0)


def test_buffers_of_the_last_carry_serve_a_query_in_train_mode() -> None:
    """BatchNorm writes to what the loop has returned, and counts it nowhere."""

    def run(adjoint: Any) -> Tensor:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).double()
        x, params = torch.randn(4, 2).double(), dict(net.named_parameters())

        def loss(p: Any, b: Any) -> Tensor:
            return torch.func.functional_call(net, {**p, **b}, x).sin().mean()

        def step(carry: Any, _: None) -> Any:
            p, b = carry
            b = {name: t.detach().clone() for name, t in b.items()}
            grads = torch.autograd.grad(loss(p, b), list(p.values()), create_graph=True)
            return ({n: t - 0.1 * g for (n, t), g in zip(p.items(), grads)}, b), None

        (p, b), _ = unroll(step, (params, dict(net.named_buffers())), length=3, adjoint=adjoint)
        return torch.autograd.grad(loss(p, b), params["0.weight"])[0]

    torch.testing.assert_close(run(Checkpointed()), run(Unrolled()), rtol=1e-10, atol=1e-12)


@torch.jit.script
def scripted(x: Tensor, k: Tensor) -> Tensor:
    """Hide from everybody which tensors it reads."""
    return x * k


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_what_a_script_reads_is_differentiated_or_named() -> None:
    def outer(h: Tensor, adjoint: Any) -> Tensor:
        k = h * 1.5
        step = lambda w, _: (scripted(w, k) * h, None)  # noqa: E731
        return unroll(step, torch.ones((), dtype=torch.float64), length=3, adjoint=adjoint)[0]

    h = number(2.0)
    expected, found = (
        torch.autograd.grad(outer(h, adjoint), h)[0] for adjoint in (Unrolled(), Checkpointed())
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match=r"torch.jit.script.*\(k\).*under torch.func"):
        torch.func.grad(lambda h: outer(h, Checkpointed()))(h.detach())


@pytest.mark.parametrize("name", REPLAYED)
def test_a_graph_from_outside_of_vmap_may_be_mapped_over_cotangents(name: str) -> None:
    def jacobian(adjoint: Any) -> Tensor:
        w, _ = unroll(lambda w, _: ((w * rate).sin(), None), W, length=5, adjoint=adjoint)

        def row(v: Tensor) -> list[Tensor]:
            return list(torch.autograd.grad(w, (W, rate), v, retain_graph=True))

        rows = torch.func.vmap(row)(torch.eye(len(W), dtype=torch.float64))
        return torch.cat([r.reshape(len(W), -1) for r in rows], 1)

    rate = number(0.7)
    expected = jacobian(Unrolled())
    torch.testing.assert_close(jacobian(ADJOINTS[name]), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", REPLAYED)
def test_batched_gradients_of_random_steps(name: str) -> None:
    def jacobian(adjoint: Any) -> Tensor:
        torch.manual_seed(0)
        step = lambda w, _: ((w * torch.rand_like(w)).sin(), None)  # noqa: E731
        w, _ = unroll(step, W, length=5, adjoint=adjoint)
        eye = torch.eye(len(W), dtype=torch.float64)
        return torch.autograd.grad(w, W, eye, is_grads_batched=True)[0]

    expected = jacobian(Unrolled())
    torch.testing.assert_close(jacobian(ADJOINTS[name]), expected, rtol=1e-10, atol=1e-12)


def test_two_starts_in_one_block_are_differentiated_in_any_order() -> None:
    def run(adjoint: Any, first: int) -> list[Tensor]:
        torch.manual_seed(0)
        net, x = nn.Linear(2, 1).double(), torch.randn(4, 2).double()
        starts, losses = [net.weight, torch.ones(1, 2, dtype=torch.float64)], []
        starts[1].requires_grad_()
        with torchopt.inner_loop(net, torchopt.sgd(0.1), adjoint=adjoint) as inner:
            for start in starts:
                net._parameters["weight"] = start
                for _ in range(3):
                    inner.step(lambda: net(x).square().mean())
                losses.append(net(x).square().mean())
            found: dict[int, Tensor] = {}
            for k in (first, 1 - first):
                (found[k],) = torch.autograd.grad(losses[k], starts[k])
        return [found[0], found[1]]

    for first in (0, 1):
        expected, found = (run(adjoint, first) for adjoint in (None, Checkpointed("sqrt")))
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_random_states_of_other_devices_are_not_the_same() -> None:
    cpu = RandomState.now([])
    both = RandomState(cpu.cpu, {0: cpu.cpu})
    assert cpu.same(RandomState.now([], cpu))
    assert not cpu.same(both)
    assert not both.same(cpu)


def test_what_a_dead_proxy_stands_for_is_not_looked_at() -> None:
    class Trainer:
        """Gone when the loop is run."""

    class Model:
        trainer = weakref.proxy(Trainer())

        def __init__(self) -> None:
            self.owner = weakref.proxy(Trainer())
            self.t = torch.ones(2, dtype=torch.float64)

    model, k = Model(), number(0.5).detach()

    def outer(k: Tensor, adjoint: Any) -> Tensor:
        step = lambda w, _: (w * k * (model is not None), None)  # noqa: E731
        return unroll(step, torch.ones((), dtype=torch.float64), length=3, adjoint=adjoint)[0]

    found = torch.func.grad(lambda k: outer(k, Checkpointed()))(k)
    torch.testing.assert_close(found, 3 * k**2)
    with pytest.raises(ValueError, match=r"changes 'model\.t' in place"):
        unroll(lambda w, _: (w + model.t.add_(1), None), W, length=2, adjoint=Checkpointed())
