"""Answers of explain: each case is made on purpose, and the verdict compared with autograd's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import nonzero
from fusing import needs_library
from torch import Tensor, nn
from visual_words import explain

import torchopt


X = torch.tensor([[0.3, -0.7], [1.1, 0.4], [-0.6, 0.9]], dtype=torch.float64)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()


def leaf(*shape: int) -> Tensor:
    return nonzero(*shape, requires_grad=True)


def inner_loop(
    tx: Any,
    inner_loss: Callable[[nn.Module], Tensor] = lambda net: net(X).square().mean(),
    steps: int = 3,
    between: Any = None,
    **options: Any,
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the initial weights and a loss after some inner steps."""
    net = network()
    with torchopt.inner_loop(net, tx, **options) as inner:
        start = dict(net.named_parameters())
        for step in range(1, steps + 1):
            inner.step(inner_loss(net))
            if between is not None:
                between(net, inner, step)
        return start, net(X).square().mean()


def gradient(loss: Tensor, tensor: Tensor) -> Tensor | None:
    (found,) = torch.autograd.grad(loss, [tensor], retain_graph=True, allow_unused=True)
    return found


def test_it_arrives() -> None:
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    start, loss = inner_loop(torchopt.sgd(lr))
    text = explain(loss, "lr", [start, {"lr": lr}])
    found = gradient(loss, lr)
    assert found is not None
    assert text.splitlines()[0] == (
        f"'lr' (shape (), float64): its gradient arrives; its norm is {float(found.abs()):.3g}."
    )
    assert "The shortest: lr -> SGD step 3 -> " in text
    assert "It enters SGD step 1, SGD step 2, SGD step 3 directly." in text
    assert "First-order" not in text


def test_paths_are_counted() -> None:
    """Each layer below has three paths, so ten have 3 ** 10."""
    x = leaf(2)
    y = x
    for _ in range(10):
        y = y.sin() + y.cos() + y.exp()
    assert "Paths to the loss: more than 1,000." in explain(y.sum(), x)


def test_zeros_among_entries_are_counted() -> None:
    x = torch.tensor([1.0, -1.0, -2.0], requires_grad=True)
    assert "its norm is 1, 2 of its 3 entries are zero" in explain(torch.relu(x).sum(), x)


def test_a_fast_weight_is_reached_by_its_own_paths_only() -> None:
    fast: list[dict[str, Tensor]] = []
    _, loss = inner_loop(
        torchopt.adam(0.1),
        between=lambda net, inner, step: fast.append(dict(net.named_parameters())),
    )
    text = explain(loss, fast[-1]["2.bias"])
    assert "Paths to the loss: 1. The shortest: the tensor -> Addmm -> Pow -> Mean" in text


# Never reached ------------------------------------------------------------------------------------


def check_never(loss: Tensor, tensor: Tensor, *words: str, names: Any = None) -> str:
    assert gradient(loss, tensor) is None
    text = explain(loss, tensor, names)
    assert "its gradient is None: it is not in the graph of the loss" in text.splitlines()[0]
    assert "* The graph of the loss has " in text.splitlines()[-1]
    for word in words:
        assert word in text
    return text


def test_never_used() -> None:
    start, loss = inner_loop(torchopt.adam(0.1))
    text = check_never(loss, leaf(3), "values are nowhere in the graph", names=start)
    reached = text.partition("The graph of the loss has 4 leaves: ")[2].removesuffix(".")
    assert set(reached.split(", ")) == set(start)


def test_no_step_before_the_loss() -> None:
    _, loss = inner_loop(torchopt.adam(0.1), steps=0)
    check_never(loss, leaf(3), "No optimizer step lies before the loss")


def test_steps_without_grad() -> None:
    net = network()
    weight = net[0].weight  # pyright: ignore[reportIndexIssue]
    inner_loss = net(X).square().mean()
    with torch.no_grad():
        torchopt.MetaSGD(net, lr=0.1).step(inner_loss)
    check_never(net(X).mean(), weight, "under torch.no_grad()")


@pytest.mark.parametrize("accelerated", [None, False])
def test_detached_at_an_inner_step(accelerated: bool | None) -> None:
    def cut(net: nn.Module, inner: torchopt.MetaOptimizer, step: int) -> None:
        if step == 2:
            torchopt.stop_gradient(net)
            torchopt.stop_gradient(inner)

    tx = torchopt.adam(0.1, use_accelerated_op=accelerated)
    start, loss = inner_loop(tx, between=cut)
    text = check_never(
        loss, start["0.weight"], "Detached before Adam step 3: the weights that entered it"
    )
    assert "its state (exp_avg, exp_avg_sq)" in text
    assert "Adam step 2:" not in text


@pytest.mark.parametrize("accelerated", [None, False])
def test_first_order_mode(accelerated: bool | None) -> None:
    weight = torch.tensor([[0.5], [0.7], [0.9]], dtype=torch.float64, requires_grad=True)

    def weighted(net: nn.Module) -> Tensor:
        return (weight * net(X).square()).mean()

    tx = torchopt.adam(0.1, use_accelerated_op=accelerated)
    _, loss = inner_loop(tx, weighted, create_graph=False)
    check_never(loss, weight, "First-order: Adam step 1, Adam step 2, Adam step 3 took", "=True")
    start, loss = inner_loop(tx, weighted)
    assert "its gradient arrives" in explain(loss, weight)
    start, loss = inner_loop(tx, create_graph=False)
    text = explain(loss, start["0.weight"])
    assert "its gradient arrives" in text
    assert "First-order: Adam step 1, Adam step 2, Adam step 3" in text


@needs_library
def test_a_hyperparameter_made_a_number() -> None:
    lr = torch.tensor(0.13, requires_grad=True)
    _, loss = inner_loop(torchopt.adam(lr.item()))
    check_never(loss, lr, "Adam step 1, Adam step 2, Adam step 3 took the number 0.13", ".item()")


@pytest.mark.parametrize("given", [lambda x: x.detach(), lambda x: x.item(), lambda x: x.data * 1])
def test_a_detached_hyperparameter(given: Any) -> None:
    lr = torch.tensor(0.13, requires_grad=True)
    _, loss = inner_loop(torchopt.sgd(given(lr), use_accelerated_op=False))
    check_never(loss, lr, "A constant with the same values enters at SGD step 1")


def test_a_detached_alias() -> None:
    x, y = leaf(3), leaf(3)
    check_never((x.detach() * y).sum(), x, "Detached: its values enter as a constant", "at Mul")


def test_a_copied_constant() -> None:
    x, y = leaf(3), leaf(3)
    check_never((x.detach().clone() * y).sum(), x, "A constant with the same values enters at Mul")


def test_another_leaf_in_the_same_memory() -> None:
    x = leaf(3)
    other = x.detach().requires_grad_()
    text = check_never(other.exp().sum(), x, "detached alias", names={"other": other})
    assert "reaches 'other' instead (it enters Exp)" in text


def test_a_deep_copy() -> None:
    net = network()
    clone = torchopt.module_clone(net, by="deepcopy")
    weight = net[0].weight  # pyright: ignore[reportIndexIssue]
    check_never(clone(X).sum(), weight, "a copy with the same values", "by='copy' keeps it")


def test_a_weight_made_after_the_loss() -> None:
    net = network()
    inner = torchopt.MetaAdam(net, lr=0.1)
    inner.step(net(X).square().mean())
    loss = net(X).square().mean()
    inner.step(loss)
    weight = net[0].weight  # pyright: ignore[reportIndexIssue]
    check_never(loss, weight, "It was made by Adam step 2, which is not in the graph")


def test_an_intermediate_beside_the_loss() -> None:
    x = leaf(3)
    check_never(x.sin().sum(), x.cos(), "computed from tensors that the loss reaches")


# Integers -----------------------------------------------------------------------------------------


def test_integer_tensors_have_no_gradient() -> None:
    assert "nothing flows through integers" in explain(leaf(2).sum(), torch.tensor([1, 2]))


def test_an_integer_loss() -> None:
    x = leaf(3)
    assert "the loss has the type int64" in explain(x.argmax(), x)


def test_a_path_through_indices() -> None:
    x, table = leaf(3), leaf(4, 3)
    loss = table.gather(0, x.argsort()[None]).sum()
    check_never(loss, x, "A path through sorting: what chooses at Gather")


def test_a_path_through_a_comparison() -> None:
    x, y = leaf(3), leaf(3)
    words = ("A path through a comparison: what chooses at Where", "is the sign of the tensor")
    check_never(torch.where(x > 0, y, 2 * y).sum(), x, *words)
    # of another tensor than the one that was asked about
    check_never(torch.where(x > 0, y, 2 * y).sum(), leaf(2), "Where: condition of bool")


def test_rounding() -> None:
    x = leaf(3)
    check_zero(x.mul(3).round().sum(), x, "ends at Round", "step function")


# Zero, although reached ---------------------------------------------------------------------------


def check_zero(loss: Tensor, tensor: Tensor, *words: str) -> None:
    found = gradient(loss, tensor)
    assert found is not None
    assert not found.any()
    text = explain(loss, tensor)
    assert (
        "its gradient is exactly zero, although it is in the graph of the loss"
        in text.splitlines()[0]
    )
    for word in words:
        assert word in text


def test_a_dead_unit() -> None:
    x = leaf(3)
    check_zero(torch.relu(-x.abs()).sum(), x, "ends at Relu", "nowhere positive")


def test_multiplied_by_zeros() -> None:
    x = leaf(3)
    check_zero((x.exp() * torch.zeros(3)).sum(), x, "ends at Mul", "zero everywhere", "Exp -> Mul")


def test_clamped() -> None:
    x = leaf(3)
    check_zero(x.clamp(5, 6).sum(), x, "ends at Clamp", "outside of the bounds")


def test_the_other_branch() -> None:
    x = leaf(3)
    check_zero(torch.where(x > 9, x, 0.0).sum(), x, "ends at Where", "other branch")


def test_a_stationary_point() -> None:
    x = torch.zeros(3, requires_grad=True)
    check_zero(x.square().sum(), x, "ends at Pow", "its input is zero")


def test_contributions_that_cancel() -> None:
    x = leaf(3)
    check_zero((x.exp() - x.exp()).sum(), x, "cancel exactly", "Paths to the loss: 2")


def test_overwritten_by_numbers() -> None:
    x = leaf(3)
    y = x.clone()
    y.zero_()
    check_zero((y * leaf(3)).sum(), x, "ends at Zero", "overwritten in place")


def test_a_learning_rate_of_zero() -> None:
    weight = torch.tensor([[0.5], [0.7], [0.9]], dtype=torch.float64, requires_grad=True)
    _, loss = inner_loop(torchopt.sgd(0.0), lambda net: (weight * net(X).square()).mean(), steps=1)
    check_zero(loss, weight, "ends at SGD step 1", "learning rate of 0")


def test_only_the_dead_path_is_blamed() -> None:
    x, y = leaf(3), leaf(3)
    text = explain((torch.relu(-x.abs()) + torch.relu(y.abs())).sum(), x)
    assert "ends at Relu" in text
    assert "times)" not in text


class Nothing(torch.autograd.Function):
    """An operation that returns no derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> None:
        return None


def test_an_operation_without_derivative() -> None:
    x = leaf(3)
    loss = Nothing.apply(x).sum()  # pyright: ignore[reportAttributeAccessIssue]
    assert gradient(loss, x) is None
    text = explain(loss, x)
    assert "is None, although it is in the graph of the loss" in text
    assert "ends at Nothing" in text


# Not finite, in place, freed ----------------------------------------------------------------------


def test_an_infinite_slope() -> None:
    x = torch.zeros(3, requires_grad=True)
    text = explain((x * 2).sqrt().sum(), x)
    assert "is not finite" in text
    assert "at Sqrt of shape (3,): the slope of a square root at zero" in text


def test_zero_times_infinity() -> None:
    x = torch.zeros(3, requires_grad=True)
    assert "at Sqrt" in explain((x.square().sqrt() * 1.5).sum(), x)


def test_overwritten_in_place() -> None:
    x = leaf(3)
    y = x.clone()
    loss = (y * y).sum()
    y.add_(1)
    text = explain(loss, x)
    assert "the backward pass fails" in text
    assert "Mul of shape (3,) has saved" in text
    assert "x = x + y" in text


@needs_library
def test_weights_overwritten_between_inner_loss_and_backward() -> None:
    start, loss = inner_loop(torchopt.adam(0.1))
    with torch.no_grad():
        start["2.weight"].add_(1.0)
    text = explain(loss, start["0.weight"])
    assert "overwritten in place" in text
    assert "Adam step 1 has saved" in text


def test_overwritten_after_the_loss() -> None:
    y = leaf(3) * 2
    loss = y.exp().sum()
    y += 1
    check_never(loss, y, "It was overwritten in place: the loss may depend on what it was before")


def test_a_freed_graph() -> None:
    x = leaf(3)
    loss = x.exp().sum()
    loss.backward()
    assert "freed by an earlier backward" in explain(loss, x)


# What it does not do ------------------------------------------------------------------------------


def test_nothing_changes() -> None:
    start, loss = inner_loop(torchopt.adam(0.1))
    weight = start["0.weight"]
    versions = [w._version for w in start.values()]
    explain(loss, weight, start)
    explain(loss * 0, weight)
    with torch.no_grad():
        explain(loss, weight)
    assert all(w.grad is None for w in start.values())
    assert versions == [w._version for w in start.values()]
    assert gradient(loss, weight) is not None  # the graph is whole


def test_what_has_no_gradient() -> None:
    x = leaf(2)
    assert "frozen parameter" in explain(x.sum(), nn.Parameter(x.detach(), requires_grad=False))
    assert "does not require grad: it was made without" in explain(x.sum(), nonzero(2))
    assert "the loss has no graph at all" in explain(nonzero(2).sum(), x)
    loss = x.sum()
    assert "it is the loss itself" in explain(loss, loss)


def test_bad_input_is_refused() -> None:
    x = leaf(2)
    with pytest.raises(ValueError, match=r"must be a scalar, got shape \(2,\)"):
        explain(x.exp(), x)
    with pytest.raises(TypeError, match="loss must be a tensor, got float"):
        explain(1.0, x)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="name of one in params, got int"):
        explain(x.sum(), 3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"no tensor of the name 'y'; it has 'x'\."):
        explain(x.sum(), "y", {"x": x})
    with pytest.raises(ValueError, match="none at all"):
        explain(x.sum(), "y")
