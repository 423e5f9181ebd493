"""Groups, live hyperparameters, schedules and chains in the differentiable face."""

import copy

import pytest
import torch
from adapting import adapted_loss, all_close, assert_derivative, batch, close, mlp, mse
from cases import every_torch_meta_case
from torch import nn

import torchopt


pytestmark = pytest.mark.usefixtures("float64_by_default")


@every_torch_meta_case
def test_several_networks_with_their_own_hyperparameters(case):
    body, head = nn.Linear(3, 4), nn.Linear(4, 2)
    twins = copy.deepcopy((body, head))
    optimizer = torchopt.MetaOptimizer([body], case.tx())
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": head, "lr": 0.02})
    peer = case.torch_cls(
        [
            {"params": list(twins[0].parameters())},
            {"params": list(twins[1].parameters()), "lr": 0.02},
        ],
        **case.kwargs,
    )
    for k in range(6):
        if k == 3:
            optimizer.param_groups[0]["lr"] = peer.param_groups[0]["lr"] = 0.2
        x, y = batch()
        optimizer.step((head(torch.tanh(body(x))) - y).square().mean())
        peer.zero_grad()
        (twins[1](torch.tanh(twins[0](x))) - y).square().mean().backward()
        peer.step()
    for p, q in zip(
        [*body.parameters(), *head.parameters()], [*twins[0].parameters(), *twins[1].parameters()]
    ):
        close(p, q.data)
    assert [g["lr"] for g in optimizer.param_groups] == [0.2, 0.02]
    assert [state.step for state in torchopt.extract_state_dict(optimizer)] == [6, 6]


def test_a_group_added_later_starts_its_own_count():
    body, head = nn.Linear(3, 4), nn.Linear(4, 2)
    twins = copy.deepcopy((body, head))
    optimizer = torchopt.MetaAdam(body, lr=0.1)
    peer = torch.optim.Adam(twins[0].parameters(), lr=0.1)
    for k in range(5):
        if k == 2:
            torchopt.stop_gradient(body)  # else the gradient of head also flows through body's past
            optimizer.add_param_group(head)
            peer.add_param_group({"params": list(twins[1].parameters())})
        x, y = batch()
        optimizer.step((head(torch.tanh(body(x))) - y).square().mean())
        for twin in twins:
            twin.zero_grad()
        (twins[1](torch.tanh(twins[0](x))) - y).square().mean().backward()
        peer.step()
    for p, q in zip(
        [*body.parameters(), *head.parameters()], [*twins[0].parameters(), *twins[1].parameters()]
    ):
        close(p, q.data)
    assert [state.step for state in torchopt.extract_state_dict(optimizer)] == [5, 3]


def test_the_gradient_is_total_through_recorded_steps_of_another_network():
    """What opponent shaping and unrolled GANs need: the other's step depends on mine."""
    mine, other, data = nn.Linear(3, 2), nn.Linear(3, 2), batch()
    start = list(mine.parameters())

    def play():
        state = torchopt.extract_state_dict(other)
        torchopt.MetaSGD(other, lr=0.3).step((other(data[0]) * mine(data[0])).square().mean())
        loss = (mine(data[0]) - other(data[0]) * data[1]).square().mean()
        torchopt.recover_state_dict(other, state)
        return loss

    assert_derivative(play, start)
    grads = torch.autograd.grad(play(), start)
    rate = 0.5
    loss = play()
    torchopt.MetaSGD(mine, lr=rate).step(loss)
    for p, s, g in zip(mine.parameters(), start, grads):
        close(p, s - rate * g)


def test_live_change_to_a_learned_rate():
    net, support, query = mlp(), batch(), batch()
    optimizer = torchopt.MetaSGD(net, lr=0.1)
    optimizer.step(mse(net, support))
    lr = torch.tensor(0.2, requires_grad=True)
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step(mse(net, support))
    assert torch.autograd.grad(mse(net, query), lr)[0].abs() > 0


# Chains -------------------------------------------------------------------------------------------


def test_hook_that_blocks_the_gradient_gives_first_order():
    net, support, query = mlp(), batch(), batch()
    start = list(net.parameters())
    seen = []
    hook = lambda g: seen.append(g.shape) or torch.zeros_like(g)  # noqa: E731
    tx = torchopt.chain(torchopt.register_hook(hook), torchopt.sgd(0.1))
    blocked = torch.autograd.grad(adapted_loss(net, tx, support, query)(), start)
    with torchopt.inner_loop(net, torchopt.sgd(0.1), create_graph=False) as inner:
        for _ in range(3):
            inner.step(mse(net, support))
        expected = torch.autograd.grad(mse(net, query), start)
    all_close(blocked, expected)
    assert len(seen) == 3 * len(start)


@pytest.mark.parametrize(
    "first",
    [
        torchopt.clip_grad_norm(0.05),
        torchopt.clip_grad_norm(0.05, norm_type=1.0),
        torchopt.clip_grad_value(0.05),
        torchopt.nan_to_num(),
        torchopt.masked(torchopt.scale(3.0), {"0": True, "2": False}),
        torchopt.register_hook(lambda g: g),
    ],
    ids=["clip_norm", "clip_norm_1", "clip_value", "nan_to_num", "masked", "register_hook"],
)
def test_chains_against_central_differences(first):
    net = mlp()
    tx = torchopt.chain(first, torchopt.adam(0.05, eps=1e-3))
    assert_derivative(adapted_loss(net, tx, batch(), batch()), list(net.parameters()))


def test_nan_to_num_saves_a_step():
    net, data = mlp(), batch()
    plain, repaired = copy.deepcopy(net), copy.deepcopy(net)

    def broken(module):
        return mse(module, data) + (module[0].bias * 0.0).sum() * torch.inf

    torchopt.MetaOptimizer(plain, torchopt.sgd(0.1)).step(broken(plain))
    assert plain[0].bias.isnan().all()
    tx = torchopt.chain(torchopt.nan_to_num(), torchopt.sgd(0.1))
    torchopt.MetaOptimizer(repaired, tx).step(broken(repaired))
    assert all(p.isfinite().all() for p in repaired.parameters())
    assert not torch.equal(repaired[2].bias, net[2].bias)


def test_mask_function_sees_parameter_names():
    net, data, seen = mlp(), batch(), []

    def mask(params):
        seen.append(list(params))
        return {n: n.endswith("bias") for n in params}

    tx = torchopt.chain(torchopt.masked(torchopt.scale(0.0), mask), torchopt.sgd(0.1))
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    torchopt.MetaOptimizer(net, tx).step(mse(net, data))
    for n, p in net.named_parameters():
        assert torch.equal(p, before[n]) == n.endswith("bias")
    assert seen[-1] == list(before)
