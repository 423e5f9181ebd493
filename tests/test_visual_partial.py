"""What explain says of cuts, beside a twin of the program without the cut.

Each program is run twice, with a cut and without. Where the two gradients differ, the first line
says so and the pictures mark a cut; where they are the same, it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import nonzero
from torch import Tensor, nn
from visual_words import explain

import torchopt
from torchopt.visual.graph import build


X = torch.tensor([[0.3, -0.7], [1.1, 0.4], [-0.6, 0.9]], dtype=torch.float64)
Program = Callable[[bool], tuple[Tensor, Tensor]]


def network() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()


def square(net: nn.Module) -> Tensor:
    return net(X).square().mean()


def learned(value: float = 0.13) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def norm(loss: Tensor, tensor: Tensor) -> float:
    (found,) = torch.autograd.grad(loss, [tensor], retain_graph=True)
    return float(found.norm())


def gradient_of(loss: Tensor, tensor: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(loss, [tensor], retain_graph=True)
    return found


def is_partial(loss: Tensor, tensor: Tensor) -> bool:
    """Return what the first line says; the norm beside it is that of autograd."""
    first = explain(loss, tensor).splitlines()[0]
    assert "its gradient arrives" in first, first
    assert f"its norm is {norm(loss, tensor):.3g}" in first
    return "but only in part" in first


def meta(net: nn.Module, rule: str, accelerated: bool | None, **options: Any) -> Any:
    recipe = {
        "adam": torchopt.adam,
        "sgd": torchopt.sgd,
        "momentum": lambda lr, **o: torchopt.sgd(lr, momentum=0.9, **o),
    }[rule]
    lr = options.pop("lr", 0.1)
    return torchopt.MetaOptimizer(net, recipe(lr, use_accelerated_op=accelerated, **options))


def unrolled(
    rule: str,
    accelerated: bool | None,
    cut: Callable[[nn.Module, Any, int], None] = lambda net, inner, step: None,
    of: str = "start",
    inner_loss: Callable[[nn.Module], Tensor] = square,
    sum_of_losses: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Return the loss after three steps, and the initial weights or the learning rate."""
    net = network()
    lr = learned()
    inner = meta(net, rule, accelerated, lr=lr if of == "lr" else 0.1)
    start = net[0].weight
    losses = []
    for step in range(1, 4):
        inner.step(inner_loss(net), **options)
        losses.append(square(net))
        cut(net, inner, step)
    loss = torch.stack(losses[:2]).sum() + square(net) if sum_of_losses else square(net)
    return loss, lr if of == "lr" else start


def stop_net(net: nn.Module, inner: Any, step: int) -> None:
    if step == 2:
        torchopt.stop_gradient(net)


def stop_state(net: nn.Module, inner: Any, step: int) -> None:
    if step == 2:
        torchopt.stop_gradient(inner)


def stop_both(net: nn.Module, inner: Any, step: int) -> None:
    stop_net(net, inner, step)
    stop_state(net, inner, step)


def stop_half(net: Any, inner: Any, step: int) -> None:
    if step == 2:
        torchopt.stop_gradient(net[0])


def recover_copy(net: nn.Module, inner: Any, step: int) -> None:
    if step == 2:
        torchopt.recover_state_dict(net, torchopt.extract_state_dict(net, by="deepcopy"))


def step_without_grad(net: nn.Module, inner: Any, step: int) -> None:
    if step == 2:
        loss = square(net)
        with torch.no_grad():
            inner.step(loss)


def nothing(net: nn.Module, inner: Any, step: int) -> None:
    pass


ACCELERATED = pytest.mark.parametrize("accelerated", [None, False], ids=["fused", "rules"])
STATEFUL = pytest.mark.parametrize("rule", ["adam", "momentum"])


def check_cut(
    loss: Tensor, tensor: Tensor, whole: tuple[Tensor, Tensor], *words: str, drawn: bool = True
) -> None:
    """Check a program beside its uncut twin."""
    assert not torch.allclose(gradient_of(loss, tensor), gradient_of(*whole), rtol=1e-6)
    assert is_partial(loss, tensor)
    assert not is_partial(*whole)
    text = explain(loss, tensor)
    for word in words:
        assert word in text, text
    assert not drawn or any(node.cuts for node in build(loss).nodes)
    assert not any(node.cuts for node in build(whole[0]).nodes)


# Between steps ------------------------------------------------------------------------------------


@ACCELERATED
@STATEFUL
@pytest.mark.parametrize("cut", [stop_net, stop_state, stop_half, recover_copy])
def test_cut_in_mid_loop(rule: str, accelerated: bool | None, cut: Any) -> None:
    loss, start = unrolled(rule, accelerated, cut)
    where = "(cut before "
    check_cut(loss, start, unrolled(rule, accelerated), where, " step 3)", "Detached before")


@ACCELERATED
@pytest.mark.parametrize("rule", ["adam", "momentum", "sgd"])
@pytest.mark.parametrize("cut", [stop_both, stop_net, stop_half, recover_copy, stop_state])
def test_a_learned_rate(rule: str, accelerated: bool | None, cut: Any) -> None:
    loss, lr = unrolled(rule, accelerated, cut, of="lr")
    whole = unrolled(rule, accelerated, of="lr")
    if rule == "sgd" and cut is stop_state:
        assert torch.equal(gradient_of(loss, lr), gradient_of(*whole))
        assert not is_partial(loss, lr)
        return
    check_cut(loss, lr, whole)


@ACCELERATED
@pytest.mark.parametrize("cut", [stop_net, stop_both, recover_copy])
def test_losses_on_both_sides_of_a_cut(accelerated: bool | None, cut: Any) -> None:
    loss, start = unrolled("sgd", accelerated, cut, sum_of_losses=True)
    check_cut(loss, start, unrolled("sgd", accelerated, sum_of_losses=True), "SGD step 3")


@ACCELERATED
def test_a_step_without_grad_in_between(accelerated: bool | None) -> None:
    loss, lr = unrolled("adam", accelerated, step_without_grad, of="lr")

    def same_with_grad(net: nn.Module, inner: Any, step: int) -> None:
        if step == 2:
            inner.step(square(net))

    whole = unrolled("adam", accelerated, same_with_grad, of="lr")
    check_cut(loss, lr, whole, "if it acted before Adam step 4 too")


@ACCELERATED
def test_what_begins_at_the_cut_is_whole(accelerated: bool | None) -> None:
    """Nothing before a cut can have been made by what the cut made."""
    for cut in (stop_both, stop_net, recover_copy):
        net = network()
        inner, begun = meta(net, "adam", accelerated), net[0].weight
        for step in range(1, 4):
            inner.step(square(net))
            cut(net, inner, step)
            begun = net[0].weight if step == 2 else begun
        assert not is_partial(square(net), begun)


@ACCELERATED
def test_fast_weights_are_whole(accelerated: bool | None) -> None:
    net = network()
    inner = meta(net, "adam", accelerated)
    fast = []
    for step in range(1, 4):
        inner.step(square(net))
        fast.append(net[0].weight)
        stop_net(net, inner, step)
    loss = square(net)
    assert not is_partial(loss, fast[2])
    assert "it is not in the graph of the loss" in explain(
        loss, fast[1]
    )  # the state was made before it


def test_a_cut_in_another_network() -> None:
    """The cut of one network takes nothing from another one that it does not know of."""
    one, other = network(), nn.Linear(2, 1).double()
    first, second = meta(one, "sgd", None), meta(other, "sgd", None)
    start = other.weight
    for step in range(1, 4):
        first.step(square(one))
        second.step(square(other))
        stop_net(one, first, step)
    assert not is_partial(square(one) + square(other), start)


# First order --------------------------------------------------------------------------------------


@ACCELERATED
@pytest.mark.parametrize("rule", ["adam", "momentum", "sgd"])
@pytest.mark.parametrize("of", ["start", "lr"])
def test_first_order(rule: str, accelerated: bool | None, of: str) -> None:
    loss, tensor = unrolled(rule, accelerated, of=of, create_graph=False)
    check_cut(loss, tensor, unrolled(rule, accelerated, of=of), "(cut in ", "create_graph=False")


@ACCELERATED
def test_one_first_order_step_has_the_whole_gradient_of_its_rate(accelerated: bool | None) -> None:
    def program(create_graph: bool) -> tuple[Tensor, Tensor]:
        net, lr = network(), learned()
        meta(net, "adam", accelerated, lr=lr).step(square(net), create_graph=create_graph)
        return square(net), lr

    torch.testing.assert_close(gradient_of(*program(True)), gradient_of(*program(False)))
    assert not is_partial(*program(False))


@ACCELERATED
@pytest.mark.parametrize("rule", ["adam", "momentum", "sgd"])
def test_a_linear_loss_has_no_second_derivatives(rule: str, accelerated: bool | None) -> None:
    net = nn.Linear(2, 1).double()
    start = net.weight
    inner = meta(net, rule, accelerated)
    inner.step(net(X).mean())
    inner.step(square(net))  # its slots carry no graph by nature
    assert not is_partial(square(net), start)
    assert not any(node.cuts for node in build(square(net)).nodes)


def test_gradients_that_the_user_took() -> None:
    """There the graph does not tell whether the loss is linear."""

    def program(create_graph: bool) -> tuple[Tensor, Tensor]:
        tx, w = torchopt.adam(0.1), nonzero(3, requires_grad=True)
        state = tx.init(w)
        new = w
        for _ in range(2):
            (g,) = torch.autograd.grad((new**3).sum(), [new], create_graph=create_graph)
            new, state = tx.apply_gradients(g, state, new, inplace=False)
        return new.square().sum(), w

    torch.manual_seed(1)
    cut = program(False)
    torch.manual_seed(1)
    check_cut(*cut, program(True), "but only in part unless the inner loss is linear")


def test_a_body_that_acts_in_the_inner_loss() -> None:
    """ANIL: only the head is adapted; the body reaches the outer loss without it as well."""

    def program(create_graph: bool) -> tuple[Tensor, Tensor]:
        net = network()
        inner = meta(net[2], "sgd", None)
        inner.step(square(net), create_graph=create_graph)
        return square(net), net[0].weight

    check_cut(*program(False), program(True), "if it acts in the inner loss too")


@ACCELERATED
def test_what_acts_in_the_outer_loss_only(accelerated: bool | None) -> None:
    """Second-order steps that it does not reach prove that it is not in the inner loss."""
    net, weight = network(), learned()
    inner = meta(net, "adam", accelerated)
    for step in range(1, 4):
        inner.step(square(net))
        stop_both(net, inner, step)
    assert not is_partial(weight * square(net), weight)
    inner.step(square(net), create_graph=False)
    assert not is_partial(weight * square(net), weight)


# In the loss --------------------------------------------------------------------------------------


class Identity(torch.autograd.Function):
    """An operation whose derivative is missing, or is there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, whole: bool) -> Tensor:
        ctx.whole = whole
        return x.clone()

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return (bar if ctx.whole else None), None


def uses() -> Iterator[Any]:
    """Give ways to use a tensor a second time, without and with its graph."""
    yield pytest.param(lambda w, cut: w.detach() if cut else w, id="detach")
    yield pytest.param(lambda w, cut: w.data if cut else w, id="data")
    yield pytest.param(lambda w, cut: w.detach()[:, 1:] if cut else w[:, 1:], id="part")
    yield pytest.param(lambda w, cut: w.data.t() if cut else w.t(), id="view")
    yield pytest.param(lambda w, cut: nn.Parameter(w.detach()) if cut else w, id="Parameter")
    yield pytest.param(
        lambda w, cut: w.detach().requires_grad_() if cut else w, id="detach-requires_grad_"
    )
    yield pytest.param(lambda w, cut: w.detach().clone() if cut else w.clone(), id="clone")
    yield pytest.param(
        lambda w, cut: w.detach().clone().requires_grad_() if cut else w, id="copied-leaf"
    )


@pytest.mark.parametrize("use", list(uses()))
@pytest.mark.parametrize("parameter", [True, False])
def test_used_a_second_time(use: Callable[[Tensor, bool], Tensor], parameter: bool) -> None:
    def program(cut: bool) -> tuple[Tensor, Tensor]:
        torch.manual_seed(2)
        w, other = nonzero(3, 2, requires_grad=True), nonzero(3, 2, requires_grad=True)
        w = nn.Parameter(w.detach()) if parameter else w
        second = use(w, cut)
        return (w * other).sum() + (second * nonzero(*second.shape, requires_grad=True)).sum(), w

    loss, w = program(True)
    assert not torch.allclose(gradient_of(loss, w), gradient_of(*program(False)))
    assert is_partial(loss, w)
    assert not is_partial(*program(False))


@pytest.mark.parametrize("use", list(uses())[:6])
@ACCELERATED
def test_fast_weights_used_without_their_graph(use: Any, accelerated: bool | None) -> None:
    def program(cut: bool) -> tuple[Tensor, Tensor]:
        net = network()
        start = net[0].weight
        inner = meta(net, "sgd", accelerated)
        inner.step(square(net))
        second = use(net[2].weight, cut)
        return square(net) + (second * nonzero(*second.shape, requires_grad=True)).sum(), start

    check_cut(*program(True), program(False), "SGD step 1")


def test_a_learned_rate_that_some_steps_took_as_a_number() -> None:
    for make in (lambda x: x.item(), lambda x: x.detach(), lambda x: x.data.clone()):
        for accelerated in (None, False):

            def program(cut: bool, make: Any = make, how: Any = accelerated) -> Any:
                net, lr = network(), learned()
                inner = meta(net, "sgd", how)
                for step in range(3):
                    inner.param_groups[0]["lr"] = make(lr) if cut and step == 1 else lr
                    inner.step(square(net))
                return square(net), lr

            check_cut(*program(True), program(False), "SGD step 2", drawn=False)


def test_a_schedule_of_other_numbers_is_no_cut() -> None:
    net, lr = network(), learned()
    inner = meta(net, "sgd", None, lr=0.5)
    inner.step(square(net))
    inner.param_groups[0]["lr"] = lr
    inner.step(square(net))
    assert not is_partial(square(net), lr)


def test_a_function_without_derivative_on_one_path() -> None:
    def program(cut: bool) -> tuple[Tensor, Tensor]:
        torch.manual_seed(3)
        x = nonzero(3, requires_grad=True)
        return (x.exp() + Identity.apply(x.sin(), not cut)).sum(), x  # pyright: ignore[reportAttributeAccessIssue, reportOperatorIssue]

    check_cut(
        *program(True), program(False), "cut at Identity", "returns no derivative", drawn=False
    )


def test_explain_of_a_cut_changes_nothing() -> None:
    loss, start = unrolled("adam", None, stop_net)
    before = gradient_of(loss, start)
    explain(loss, start)
    assert start.grad is None
    assert torch.equal(gradient_of(loss, start), before)
