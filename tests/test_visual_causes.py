"""What explain says of four common mistakes, each in a sentence of its own; and how it says it."""

from __future__ import annotations

import contextlib
import re
from typing import Any

import pytest
import torch
from conftest import nonzero
from fusing import needs_library
from torch import Tensor, nn
from torch.nn.functional import one_hot
from visual_words import explain, explain_wrapped

import torchopt


X = torch.tensor([[0.3, -0.7], [1.1, 0.4], [-0.6, 0.9]], dtype=torch.float64)
OUTSIDE = "The loss was taken outside of the inner_loop block"
NOT_RECORDED = "The inner steps were not recorded"
ANOTHER = "The loss is of another network"


def network(hidden: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, hidden), nn.Tanh(), nn.Linear(hidden, 1)).double()


def loss_of(net: nn.Module) -> Tensor:
    return net(X).square().mean()


def learned_rate() -> Tensor:
    return torch.tensor(0.1, dtype=torch.float64, requires_grad=True)


def gradient(loss: Tensor, tensor: Tensor) -> Tensor | None:
    (found,) = torch.autograd.grad(loss, [tensor], retain_graph=True, allow_unused=True)
    return found


# A loss taken outside of the block ----------------------------------------------------------------


@pytest.mark.parametrize("adjoint", [None, torchopt.diff.Checkpointed("sqrt")])
def test_a_loss_taken_outside_of_the_block(adjoint: Any) -> None:
    net, lr = network(), learned_rate()
    with torchopt.inner_loop(net, torchopt.sgd(lr), adjoint=adjoint) as inner:
        inner.step((lambda: loss_of(net)) if adjoint else loss_of(net))
        inside = loss_of(net)
        fast = dict(net.named_parameters())
    outside = loss_of(net)
    names = [{"lr": lr}, dict(net.named_parameters())]
    assert gradient(outside, lr) is None
    assert OUTSIDE in explain(outside, "lr", names)
    assert OUTSIDE in explain(outside, lr)
    assert OUTSIDE in explain(outside, fast["0.weight"])
    text = explain(outside, net[0].weight)  # this gradient is not zero, but not what was meant
    assert "its gradient arrives" in text
    assert OUTSIDE in text
    if adjoint is None:
        assert OUTSIDE not in explain(inside, "lr", names)
        assert OUTSIDE not in explain(inside, "0.weight", names)


def test_a_block_without_steps_or_another_network_is_not_blamed() -> None:
    net, lr = network(), learned_rate()
    with torchopt.inner_loop(net, torchopt.sgd(lr)):
        loss = loss_of(net)
    assert OUTSIDE not in explain(loss, "lr", {"lr": lr})
    with torchopt.inner_loop(net, torchopt.sgd(lr)) as inner:
        inner.step(loss_of(net))
    assert OUTSIDE not in explain(loss_of(network()), "lr", {"lr": lr})


def test_after_stop_gradient_the_line_of_a_loss_outside_says_so() -> None:
    net, lr = network(), learned_rate()
    for _ in range(2):
        with torchopt.inner_loop(net, torchopt.sgd(lr)) as inner:
            inner.step(loss_of(net))
            torchopt.stop_gradient(net)
            text = explain(loss_of(net), lr)
    assert f"{OUTSIDE}, before the first step, or after stop_gradient: no inner step leads" in text


# Steps that were not recorded ---------------------------------------------------------------------


@pytest.mark.parametrize("used", [False, True])  # by a block before
@pytest.mark.parametrize("block", [False, True])
def test_steps_under_no_grad_are_not_taken_for_a_loss_outside(used: bool, block: bool) -> None:
    net, lr = network(), learned_rate()
    if used:
        with torchopt.inner_loop(net, torchopt.sgd(lr)) as inner:
            inner.step(loss_of(net))
    with contextlib.ExitStack() as stack:
        optimizer = (
            stack.enter_context(torchopt.inner_loop(net, torchopt.sgd(lr)))
            if block
            else torchopt.MetaSGD(net, lr=lr)
        )
        before = loss_of(net)
        assert (OUTSIDE in explain(before, lr)) == used  # it has not been taken yet
        with torch.no_grad():
            optimizer.step(before)
        loss = loss_of(net)
        names = {"lr": lr, "weight": net[0].weight}
    assert gradient(loss, lr) is None
    text = explain(loss, "lr", names)
    assert NOT_RECORDED in text
    assert OUTSIDE not in text
    text = explain(loss, "weight", names)  # nothing is wrong with this one
    assert "its gradient arrives" in text
    assert OUTSIDE not in text
    assert NOT_RECORDED not in text


def test_recorded_steps_are_not_called_unrecorded() -> None:
    net, lr = network(), learned_rate()
    inner = torchopt.MetaSGD(net, lr=0.1)
    inner.step(loss_of(net))
    assert NOT_RECORDED not in explain(loss_of(net), lr)


# A weight that was frozen at the step -------------------------------------------------------------


@pytest.mark.parametrize("fused", [pytest.param(True, marks=needs_library), False])
@pytest.mark.parametrize("recipe", [torchopt.sgd, torchopt.adam])
def test_a_weight_that_was_frozen_at_the_step(recipe: Any, fused: bool) -> None:
    net = network()
    weight, bias = net[0].weight, net[0].bias
    weight.requires_grad_(False)
    inner = torchopt.MetaOptimizer(net, recipe(0.1, use_accelerated_op=fused))
    inner.step(loss_of(net))
    name = {torchopt.sgd: "SGD", torchopt.adam: "Adam"}[recipe]
    frozen = f"a frozen parameter, which {name} step 1 left as it was"
    assert frozen in explain(loss_of(net), weight)

    weight.requires_grad_(True)
    loss = loss_of(net)
    assert gradient(loss, weight) is not None
    text = explain(loss, weight)
    assert f"It was frozen at {name} step 1 (requires_grad=False), or belongs to no" in text
    assert "frozen" not in explain(loss, bias)

    inner.step(loss)
    text = explain(loss_of(net), weight)
    assert f"It was frozen at {name} step 1 (requires_grad=False): no path leads" in text
    assert "frozen" not in explain(loss_of(net), bias)


def test_weights_that_were_cut_off_are_not_called_frozen() -> None:
    net = network()
    inner = torchopt.MetaAdam(net, lr=0.1)
    for _ in range(3):
        inner.step(loss_of(net))
        torchopt.stop_gradient(net)
        names = dict(net.named_parameters())
    inner.step(loss_of(net))
    text = explain(loss_of(net), "0.weight", names)
    assert "its gradient arrives" in text
    assert "frozen" not in text


# A path through argmax ----------------------------------------------------------------------------


def test_a_path_through_argmax_of_the_tensor() -> None:
    table, x = nonzero(4, 3, requires_grad=True), nonzero(5, 4, requires_grad=True)
    for chosen in (table[x.argmax(1)], one_hot(x.argmax(1), 4).double() @ table):
        loss = chosen.square().sum()
        assert gradient(loss, x) is None
        text = explain(loss, "x", {"x": x, "table": table})
        assert "A path through argmax: what chooses at " in text
        assert "is the argmax of 'x'. Those are integers" in text


@pytest.mark.parametrize("index", [lambda x: x.argmax(), lambda x: int(x.argmax())])
def test_one_number_may_agree_by_chance(index: Any) -> None:
    table, x = nonzero(4, 3, requires_grad=True), nonzero(4, requires_grad=True)
    loss = table[index(x)].square().sum()
    text = explain(loss, "x", {"x": x})
    assert "A path through argmax: what chooses at Select of shape (3,)" in text
    assert "is the argmax of 'x', unless they agree by chance" in text
    both = loss + x.square().sum()  # it arrives, and one number proves nothing
    assert "argmax" not in explain(both, "x", {"x": x})


def test_a_path_through_argmax_of_what_was_computed_from_it() -> None:
    head, table = nn.Linear(2, 4).double(), nonzero(4, 3, requires_grad=True)
    scores = head(X)
    loss = table[scores.argmax(1)].square().sum()
    named = {"weight": head.weight, "table": table, "scores": scores}
    text = explain(loss, "weight", named)
    assert "is the argmax of 'scores', which was computed from it" in text
    del named["scores"]
    text = explain(loss, "weight", named)
    assert "is the argmax" not in text
    assert "Index: indices[0] of int64" in text  # all that the graph tells
    other = one_hot(scores.argmax(1), 4).double() @ table
    assert "Mm: self, one-hot" in explain(other.sum(), "weight", named)


def test_entries_counted_from_the_last() -> None:
    table = nonzero(4, 3, requires_grad=True)
    x = torch.tensor([0.1, 0.2, 0.3, 0.9], dtype=torch.float64, requires_grad=True)
    assert "is the argmax of 'x', unless" in explain(table[-1].sum(), "x", {"x": x})
    assert "argmax of" not in explain(table[-2].sum(), "x", {"x": x})
    assert "argmax of" not in explain((table[-1] + table[2]).sum(), "x", {"x": x})


def test_an_index_that_is_no_argmax() -> None:
    table, x = nonzero(4, 3, requires_grad=True), nonzero(5, 4, requires_grad=True)
    index = (x.argmax(1) + 1) % 4
    assert "A path through" not in explain(table[index].sum(), "x", {"x": x})


# A loss of another network ------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["alike", "larger", "copy"])
def test_a_loss_of_another_network(other: str) -> None:
    net, lr = network(), learned_rate()
    inner = torchopt.MetaAdam(net, lr=lr)
    named = [dict(net.named_parameters()), {"lr": lr}]
    inner.step(loss_of(net))
    strange = {
        "alike": network,
        "larger": lambda: network(5),
        "copy": lambda: torchopt.module_clone(net, by="deepcopy"),
    }[other]()
    for name in ("0.weight", "lr"):
        text = explain(loss_of(strange), name, named)
        assert ANOTHER in text
        assert ("of the same shapes" in text) == (other != "larger")
        assert ANOTHER not in explain(loss_of(net), name, named)


def test_meta_parameters_that_were_not_used_are_no_network() -> None:
    rates = nn.ParameterDict({name: nn.Parameter(nonzero(2)) for name in ("a", "b")})
    assert ANOTHER not in explain(loss_of(network()), "a", rates)


# How it is said -----------------------------------------------------------------------------------


def test_lines_are_wrapped() -> None:
    net, lr = network(), learned_rate()
    inner = torchopt.MetaAdam(net, lr=lr)
    named = [dict(net.named_parameters()), {"lr": lr, "a_long_name_of_a_tensor" * 6: nonzero(2)}]
    for step in range(12):
        inner.step(loss_of(net))
        if step == 5:
            torchopt.stop_gradient(net)
    for tensor in ("lr", "0.weight", "a_long_name_of_a_tensor" * 6):
        text = explain_wrapped(loss_of(net), tensor, named)
        long = [line for line in text.splitlines() if len(line) > 90]
        assert all("a_long_name" in line for line in long)  # a name is one word
        assert all(re.match(r"\* |  |'", line) for line in text.splitlines())


@pytest.mark.parametrize("whole", [True, False])
def test_many_cuts_and_many_leaves_are_told_in_short(whole: bool) -> None:
    net, lr = network(), learned_rate()
    start = net[0].weight
    inner = torchopt.MetaAdam(net, lr=lr)
    for _ in range(20):
        inner.step(loss_of(net))
        torchopt.stop_gradient(net)
        if whole:
            torchopt.stop_gradient(inner)
    inner.step(loss_of(net))
    loss = loss_of(net)
    for tensor in (lr, start):
        text = explain(loss, tensor)
        assert 1 <= text.count("Detached before Adam step") <= 3
        assert len(text.splitlines()) < 9
    assert (gradient(loss, start) is None) == whole
    if whole:
        end = "The graph of the loss has 5 leaves: 4 weights, step 21, unnamed ()."
        assert explain(loss, start).endswith(end)
        end = "The graph of the loss has 5 leaves: lr, 4 weights, step 21."
        assert explain(loss, start, {"lr": lr}).endswith(end)
    else:
        assert "more cuts of this kind." in explain(loss, start)


def test_leaves_without_a_name_are_counted() -> None:
    text = explain(loss_of(network()), learned_rate())
    assert text.endswith("The graph of the loss has 4 leaves, none of them named.")


def test_it_ends_at_the_loss_and_counts_no_paths_by_the_million() -> None:
    net, lr = network(), learned_rate()
    inner = torchopt.MetaAdam(net, lr=lr)
    for _ in range(5):
        inner.step(loss_of(net))
    text = explain(loss_of(net), "lr", {"lr": lr})
    assert "Paths to the loss: more than 1,000. The shortest: lr -> Adam step 5 -> " in text
    assert " -> Mean -> the loss." in text
    assert "result" not in text
    x = nonzero(2, requires_grad=True)
    y = x
    for _ in range(6):
        y = y.sin() + y.cos() + y.exp()
    assert "Paths to the loss: 729." in explain(y.sum(), x)  # 3 ** 6
