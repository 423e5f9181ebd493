"""``inner_loop``: adapt inside a ``with`` block, be what one was after it."""

import copy

import pytest
import torch
from adapting import (
    all_close,
    assert_derivative,
    assert_unchanged,
    batch,
    batch_normed,
    central_difference,
    follow,
    mlp,
    mse,
    slope_of,
    snapshot,
)
from cases import every_meta_kind
from torch import nn
from torch.func import functional_call

import torchopt


pytestmark = pytest.mark.usefixtures("float64_by_default")


# Restoring --------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("make", [mlp, batch_normed], ids=["mlp", "batch_norm"])
def test_restores_the_same_objects_and_values(make, training):
    net, data = make().train(training), batch()
    before = snapshot(net)
    with torchopt.inner_loop(net, torchopt.adam(0.1)) as inner:
        for _ in range(3):
            inner.step(mse(net, data))
        assert all(p is not t for p, (_, t, _) in zip(net.parameters(), before))
        if make is batch_normed and training:
            assert net[1].num_batches_tracked == 3
    assert_unchanged(net, before)
    assert torchopt.extract_state_dict(inner)[0].step == 0
    assert net.training is training


def test_restores_when_the_block_raises():
    net, data = batch_normed(), batch()
    before = snapshot(net)
    optimizer = torchopt.MetaAdam(net, lr=0.1)
    error = KeyError("anything")

    def run():
        with torchopt.inner_loop(net, optimizer, create_graph=False):
            optimizer.step(mse(net, data))
            raise error

    with pytest.raises(KeyError) as caught:
        run()
    assert caught.value is error
    assert_unchanged(net, before)
    assert torchopt.extract_state_dict(optimizer)[0].step == 0
    assert optimizer.create_graph is True


@pytest.mark.parametrize("leave", ["break", "return"])
def test_restores_when_the_block_is_left_early(leave):
    net, data = mlp(), batch()
    before = snapshot(net)

    def run():
        for _ in range(2):
            with torchopt.inner_loop(net, torchopt.sgd(0.1)) as inner:
                inner.step(mse(net, data))
                if leave == "break":
                    break
                return 1
        return 0

    assert run() == (leave == "return")
    assert_unchanged(net, before)


def test_frozen_and_tied_parameters_come_back():
    net = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "c": nn.Linear(3, 2)})
    net["b"].weight = net["a"].weight
    net["c"].bias.requires_grad_(False)
    before, x = snapshot(net), torch.randn(5, 3)
    with torchopt.inner_loop(net, torchopt.sgd(0.1)) as inner:
        inner.step(net["c"](torch.tanh(net["b"](torch.tanh(net["a"](x))))).square().mean())
        assert net["b"].weight is net["a"].weight
        assert net["c"].bias is before[-1][1]
    assert_unchanged(net, before)
    assert net["b"].weight is net["a"].weight
    assert not net["c"].bias.requires_grad


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN], ids=["lstm", "gru", "rnn"])
def test_recurrent_module_computes_with_the_restored_weights(kind):
    net, x = kind(3, 4), torch.randn(5, 2, 3)
    before, output = snapshot(net), net(x)[0].detach()
    with torchopt.inner_loop(net, torchopt.sgd(1.0)) as inner:
        inner.step(net(x)[0].square().mean())
        assert (net(x)[0] - output).abs().max() > 1e-3
    assert_unchanged(net, before)
    assert torch.equal(net(x)[0], output)


def test_parameters_with_history_come_back_too():
    """The block may start from an adapted network."""
    net, data = mlp(), batch()
    torchopt.MetaSGD(net, lr=0.1).step(mse(net, data))
    before = snapshot(net)
    with torchopt.inner_loop(net, torchopt.sgd(0.1)) as inner:
        inner.step(mse(net, data))
    assert_unchanged(net, before)
    assert all(p.grad_fn is not None for p in net.parameters())


# Derivatives inside and after the block ---------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("make", [mlp, batch_normed], ids=["mlp", "batch_norm"])
def test_outer_loss_inside_and_after_the_block_gives_the_same_gradient(make, training):
    net, support, query = make().train(training), batch(), batch()
    params, state = dict(net.named_parameters()), None
    buffers = {n: b.clone() for n, b in net.named_buffers()}
    tx, start = torchopt.adam(0.1), list(net.parameters())
    state = tx.init(params)
    for _ in range(2):  # by hand
        out = functional_call(net, {**params, **buffers}, support[0])
        grads = torch.autograd.grad(
            (out - support[1]).square().mean(), list(params.values()), create_graph=True
        )
        updates, state = tx.update(dict(zip(params, grads)), state, params, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)
    out = functional_call(net, {**params, **buffers}, query[0])
    expected = torch.autograd.grad((out - query[1]).square().mean(), start)

    def outer(inside):
        with torchopt.inner_loop(net, torchopt.adam(0.1)) as inner:
            for _ in range(2):
                inner.step(mse(net, support))
            loss = mse(net, query)
            if inside:
                return torch.autograd.grad(loss, start)
        return torch.autograd.grad(loss, start)

    for inside in (True, False):
        all_close(outer(inside), expected, rtol=1e-10)


def test_statistics_that_move_after_the_block_do_not_change_the_outer_gradient():
    """BatchNorm moves its buffers behind autograd's back; the block works on copies of them."""
    net, support, query = batch_normed().eval(), batch(), batch()
    start = list(net.parameters())
    losses = []
    for _ in range(2):
        with torchopt.inner_loop(net, torchopt.sgd(0.1)) as inner:
            inner.step(mse(net, support))
            losses.append(mse(net, query))
    expected = torch.autograd.grad(losses[0], start)
    old = net[1].running_var.clone()
    net.train()(support[0])
    assert (net[1].running_var - old).abs().max() > 1e-3
    losses[1].backward()
    all_close([p.grad for p in start], expected, rtol=1e-10)
    assert net[3].weight.grad.abs().max() > 0


def test_several_tasks_accumulate_and_one_backward_is_their_sum():
    net, tasks = batch_normed(), [(batch(), batch()) for _ in range(3)]
    start, losses = list(net.parameters()), []
    for support, query in tasks:
        with torchopt.inner_loop(net, torchopt.sgd(0.1)) as inner:
            inner.step(mse(net, support))
            losses.append(mse(net, query))
    together = torch.autograd.grad(sum(losses), start, retain_graph=True)
    for loss in losses:
        loss.backward()
    all_close([p.grad for p in start], together, rtol=1e-10)
    assert any(g.abs().max() > 0 for g in together)


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 2, 3, bias=False),
            nn.BatchNorm2d(2),
            nn.Softplus(),
            nn.AvgPool2d(2),
            nn.Flatten(),
        )
        self.head = nn.Linear(8, 3)
        # not zero, where the ratio of a norm to another jumps
        nn.init.uniform_(self.body[1].bias, 0.2, 0.5)

    def forward(self, x):
        return self.head(self.body(x))


@every_meta_kind
def test_maml_of_a_conv_net_with_batch_norm_against_central_differences(case):
    net = Convolutional()
    x, y = torch.randn(6, 1, 6, 6), torch.arange(6) % 3
    u, v = torch.randn(9, 1, 6, 6), torch.arange(9) % 3
    before = snapshot(net)

    def outer():
        with torchopt.inner_loop(net, case.smooth(eps=0.1)) as inner:
            for _ in range(3):
                inner.step(nn.functional.cross_entropy(net(x), y))
            return nn.functional.cross_entropy(net(u), v)

    assert_derivative(outer, list(net.parameters()), directions=3)
    for (name, t), (_, original, bits) in zip(net.named_parameters(), before):
        assert t is original
        assert torch.equal(t, bits), name


# Options ----------------------------------------------------------------------------------------


def test_given_a_meta_optimizer_its_state_goes_in_and_comes_back():
    net, data = mlp(), batch()
    optimizer = torchopt.MetaAdam(net, lr=0.1)
    optimizer.step(mse(net, data))
    before = snapshot(net)
    (state,) = torchopt.extract_state_dict(optimizer)
    twin = copy.deepcopy(optimizer)
    with torchopt.inner_loop(net, optimizer) as inner:
        assert inner is optimizer
        inner.step(mse(net, data))
        assert torchopt.extract_state_dict(inner)[0].step == 2
        twin_net = twin.param_groups[0]["params"]
        twin.step(mse(twin_net, data))
        all_close(net.parameters(), twin_net.parameters())
    assert_unchanged(net, before)
    (after,) = torchopt.extract_state_dict(optimizer)
    assert after.step == state.step == 1
    for slot, column in state.slots.items():
        for name, value in column.items():
            assert after.slots[slot][name] is value


def test_given_a_meta_optimizer_its_first_order_switch_holds():
    """``optimizer.create_graph = False`` must not be overruled by a default."""
    net, support, query = mlp(), batch(), batch()
    start = list(net.parameters())
    with torchopt.inner_loop(net, torchopt.sgd(0.1), create_graph=False) as inner:
        inner.step(mse(net, support))
        expected = torch.autograd.grad(mse(net, query), start)
    optimizer = torchopt.MetaSGD(net, lr=0.1)
    optimizer.create_graph = False
    with torchopt.inner_loop(net, optimizer):
        optimizer.step(mse(net, support))
        found = torch.autograd.grad(mse(net, query), start)
    all_close(found, expected, rtol=1e-10)
    assert optimizer.create_graph is False


def test_live_hyperparameters_set_before_the_block_hold_in_it():
    net, data = mlp(), batch()
    before = snapshot(net)
    optimizer = torchopt.MetaSGD(net, lr=0.1)
    optimizer.param_groups[0]["lr"] = 0.0
    with torchopt.inner_loop(net, optimizer):
        optimizer.step(mse(net, data))
        assert all(p.grad_fn is not None for p in net.parameters())
        assert all(torch.equal(p, bits) for p, (_, _, bits) in zip(net.parameters(), before))
    assert optimizer.param_groups[0]["lr"] == 0.0


def test_hyperparameters_changed_in_the_block_come_back():
    net, data = mlp(), batch()
    optimizer = torchopt.MetaSGD(net, lr=0.1)
    with torchopt.inner_loop(net, optimizer):
        optimizer.param_groups[0]["lr"] = 0.5
        optimizer.step(mse(net, data))
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_restore_buffers_false_keeps_the_statistics_of_the_block():
    net, data = batch_normed(), batch()
    buffer = net[1].running_mean
    twin = copy.deepcopy(net)
    with torchopt.inner_loop(net, torchopt.sgd(0.1), restore_buffers=False) as inner:
        for _ in range(2):
            inner.step(mse(net, data))
    peer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for _ in range(2):
        follow(peer, twin, data)
    assert net[1].running_mean is buffer
    assert net[1].num_batches_tracked == 2
    torch.testing.assert_close(net[1].running_mean, twin[1].running_mean)
    torch.testing.assert_close(net[1].running_var, twin[1].running_var)
    assert all(p.is_leaf for p in net.parameters())


def test_an_optimizer_of_a_part_adapts_the_part_alone():
    """ANIL: the body is meta-learned, only the head adapts."""
    net, support, query = mlp(), batch(), batch()
    before = snapshot(net)
    with torchopt.inner_loop(net[2], torchopt.sgd(0.1)) as inner:
        inner.step(mse(net, support))
        assert net[0].weight is before[0][1]
        assert net[2].weight is not before[2][1]
        grads = torch.autograd.grad(mse(net, query), [t for _, t, _ in before])
    assert_unchanged(net, before)
    assert all(g.abs().max() > 0 for g in grads)


def test_every_network_of_the_optimizer_is_restored():
    net, head, data = mlp(), nn.Linear(2, 2), batch()
    optimizer = torchopt.MetaOptimizer([net, head], torchopt.sgd(0.1))
    before = snapshot(net), snapshot(head)
    with torchopt.inner_loop(net, optimizer):
        optimizer.step((head(net(data[0])) - data[1]).square().mean())
        assert net[0].weight.grad_fn is not None
        assert head.weight.grad_fn is not None
    assert_unchanged(net, before[0])
    assert_unchanged(head, before[1])


def test_groups_added_in_the_block_go_with_it():
    net, head, data = mlp(), nn.Linear(2, 2), batch()
    optimizer = torchopt.MetaAdam(net, lr=0.1)
    before = snapshot(net)
    with torchopt.inner_loop(net, optimizer):
        optimizer.step(mse(net, data))
        optimizer.add_param_group(head)
        optimizer.step((head(net(data[0])) - data[1]).square().mean())
    assert len(optimizer.param_groups) == 1
    assert_unchanged(net, before)
    optimizer.step(mse(net, data))
    assert torchopt.extract_state_dict(optimizer)[0].step == 1


@pytest.mark.parametrize(
    ("module", "tx"),
    [(nn.Linear(2, 1), torch.nn.Linear), (nn.Linear(2, 1), 0.1), (nn.ReLU(), torchopt.sgd(0.1))],
    ids=["class", "number", "no_parameters"],
)
def test_bad_arguments_are_refused_before_the_block(module, tx):
    before, entered = snapshot(module), False
    with pytest.raises((TypeError, ValueError)), torchopt.inner_loop(module, tx):
        entered = True
    assert not entered
    assert_unchanged(module, before)


def test_parameters_instead_of_a_module_are_refused_by_name():
    with (
        pytest.raises(TypeError, match=r"nn\.Module"),
        torchopt.inner_loop(list(mlp().parameters()), torchopt.sgd(0.1)),
    ):
        pass


# Nesting ----------------------------------------------------------------------------------------


def test_nested_loops_restore_level_by_level():
    net, data = batch_normed(), batch()
    before = snapshot(net)
    with torchopt.inner_loop(net, torchopt.sgd(0.1)) as outer:
        outer.step(mse(net, data))
        middle = snapshot(net)
        with torchopt.inner_loop(net, torchopt.adam(0.1)) as inner:
            inner.step(mse(net, data))
            assert net[0].weight is not middle[0][1]
        assert_unchanged(net, middle)
        outer.step(mse(net, data))
        assert torchopt.extract_state_dict(outer)[0].step == 2
    assert_unchanged(net, before)


@pytest.mark.parametrize("recipe", [torchopt.sgd, torchopt.adam], ids=["sgd", "adam"])
def test_two_levels_against_central_differences(recipe):
    """The middle level is trained on what the inner one reaches: third derivatives of the loss."""
    net = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2))
    support, query, test = batch(), batch(), batch()
    lr = torch.tensor(0.2, requires_grad=True)

    def top():
        with torchopt.inner_loop(net, recipe(0.1)) as middle:
            for _ in range(2):
                with torchopt.inner_loop(net, torchopt.sgd(lr)) as inner:
                    for _ in range(2):
                        inner.step(mse(net, support))
                    loss = mse(net, query)
                middle.step(loss)
            return mse(net, test)

    assert_derivative(top, [*net.parameters(), lr], directions=3)


def test_the_third_derivative_of_an_adapted_loss():
    """d3/dt3 of the loss after one step, along a line, against differences of the second."""
    net, support, query = mlp(), batch(), batch()
    params = list(net.parameters())
    direction = [torch.randn_like(p) for p in params]

    def derivatives(order):
        with torchopt.inner_loop(net, torchopt.adam(0.1, eps=1e-2)) as inner:
            inner.step(mse(net, support))
            value = mse(net, query)
        for k in range(order):
            grads = torch.autograd.grad(value, params, create_graph=k + 1 < order)
            value = slope_of(grads, direction)
        return value

    third = derivatives(3)
    expected = central_difference(lambda: derivatives(2), params, direction)
    assert third.abs() > 1e-4
    torch.testing.assert_close(third, expected, rtol=1e-6, atol=1e-9)
