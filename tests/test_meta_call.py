"""Steps like the one before take a short way; whatever differs must still be seen."""

import copy

import pytest
import torch
from conftest import nonzero
from fusing import needs_library
from tolerances import assert_close
from torch import nn

import torchopt
from torchopt.core import engine
from torchopt.kernels import cached_call, fused


pytestmark = needs_library


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4, bias=False))
        self.again = nn.Linear(4, 4, bias=False)
        self.head = nn.Linear(4, 1)

    def forward(self, x):
        return self.head(torch.tanh(self.again(torch.tanh(self.body(x)))))


def loss_of(net, seed):
    torch.manual_seed(seed)
    weight = next(net.parameters())
    return net(nonzero(5, 3).to(weight.dtype)).square().mean()


def build(use, dtype=torch.float64):
    torch.manual_seed(0)
    net = Net().to(dtype)
    tx = torchopt.adam(0.05, weight_decay=0.1, amsgrad=False, use_accelerated_op=use)
    return net, torchopt.MetaOptimizer(net, tx)


@pytest.fixture
def repeats(monkeypatch):
    """Whether each step of a fused optimizer was computed as one like that before."""
    seen = []
    original = fused.take_cached

    def watched(*args):
        result = original(*args)
        seen.append(result is not None)
        return result

    monkeypatch.setattr(engine.accelerator, "take_cached", watched)
    return seen


def change_lr(net, optimizer):
    optimizer.param_groups[0]["lr"] = 0.5


def change_betas(net, optimizer):
    optimizer.param_groups[0]["betas"] = (0.5, 0.7)


def learn_lr(net, optimizer):
    optimizer.param_groups[0]["lr"] = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)


def schedule_lr(net, optimizer):
    optimizer.param_groups[0]["lr"] = lambda step: 0.1 * (step + 1)


def switch_on_maximize(net, optimizer):
    optimizer.param_groups[0]["maximize"] = True


def freeze(net, optimizer):
    net.body[0].weight = nn.Parameter(net.body[0].weight.detach(), requires_grad=False)


def replace_a_weight(net, optimizer):
    net.head.weight = nn.Parameter(torch.linspace(1, 2, 4, dtype=torch.float64).reshape(1, 4))


def replace_a_layer(net, optimizer):
    torch.manual_seed(9)
    net.body[2] = nn.Linear(4, 4, bias=False).double()


def tie(net, optimizer):
    net.body[2].weight = nn.Parameter(net.body[2].weight.detach())
    net.again.weight = net.body[2].weight


def transpose_a_weight(net, optimizer):
    net.body[2].weight = nn.Parameter(net.body[2].weight.detach().t())


def go_back(net, optimizer):
    state = torchopt.extract_state_dict(optimizer)
    optimizer.step(loss_of(net, 77))
    torchopt.recover_state_dict(optimizer, state)


def stop(net, optimizer):
    torchopt.stop_gradient(net)
    torchopt.stop_gradient(optimizer)


CHANGES = [
    *(change_lr, change_betas, learn_lr, schedule_lr, switch_on_maximize, freeze),
    *(replace_a_weight, replace_a_layer, tie, transpose_a_weight, go_back, stop),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_between_steps_is_seen(change):
    outcomes = []
    for use in (None, False):
        net, optimizer = build(use)
        for step in range(6):
            if step == 3:
                change(net, optimizer)
            optimizer.step(loss_of(net, step))
        outcomes.append([*net.parameters()])
    for fast, slow in zip(*outcomes):
        torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-14)


def test_meta_gradients_are_those_of_the_rules():
    gradients = []
    for use in (None, False):
        net, optimizer = build(use)
        start = [*net.parameters()]
        for step in range(4):
            optimizer.step(loss_of(net, step))
        gradients.append(torch.autograd.grad(loss_of(net, 50), start))
    for fast, slow in zip(*gradients):
        torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-14)


def test_like_steps_are_repeated_also_in_the_next_task(repeats):
    cached_call.executable.cache_clear()
    net, optimizer = build(None)
    for task in range(3):
        with torchopt.inner_loop(net, optimizer) as inner:
            for step in range(3):
                inner.step(loss_of(net, 10 * task + step))
    first, *others = repeats
    assert not first
    assert others[1:] == [True] * 7  # the second step has other guards than the first


@pytest.mark.parametrize("recipe", [torchopt.adam, torchopt.sgd, torchopt.rmsprop])
def test_other_numbers_begin_where_others_of_their_structure_left(repeats, recipe):
    cached_call.executable.cache_clear()
    results = {}
    for use in (None, False):
        for lr in (0.05, 0.3):
            net, _ = build(use)
            optimizer = torchopt.MetaOptimizer(net, recipe(lr, use_accelerated_op=use))
            repeats.clear()
            for step in range(3):
                optimizer.step(loss_of(net, step))
            if lr == 0.3 and use is None:
                assert repeats == [True] * 3
            results[use, lr] = [*net.parameters()]
    for lr in (0.05, 0.3):
        for fast, slow in zip(results[None, lr], results[False, lr]):
            torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-14)


def test_structures_are_told_apart(repeats):
    """By shapes, flags, slots that there are, fields that are no hyperparameters, and dtype."""
    cached_call.executable.cache_clear()
    kinds = [
        lambda use: torchopt.adam(0.05, use_accelerated_op=use),
        lambda use: torchopt.adam(0.05, amsgrad=True, use_accelerated_op=use),
        lambda use: torchopt.adam(0.05, maximize=True, use_accelerated_op=use),
        lambda use: torchopt.sgd(0.05, use_accelerated_op=use),
        lambda use: torchopt.sgd(0.05, momentum=0.9, use_accelerated_op=use),
        lambda use: torchopt.sgd(0.05, momentum=0.9, nesterov=True, use_accelerated_op=use),
    ]
    for dtype in (torch.float64, torch.float32):
        for kind in kinds:
            results = []
            for use in (None, False):
                net, _ = build(use, dtype)
                optimizer = torchopt.MetaOptimizer(net, kind(use))
                for step in range(3):
                    optimizer.step(loss_of(net, step))
                results.append([*net.parameters()])
            for fast, slow in zip(*results):
                assert_close(fast, slow)


def test_a_task_after_another_starts_anew():
    net, optimizer = build(None)
    results = []
    for _ in range(3):
        with torchopt.inner_loop(net, optimizer) as inner:
            for step in range(3):
                inner.step(loss_of(net, step))
            results.append([p.detach().clone() for p in net.parameters()])
    for later in results[1:]:
        assert all(map(torch.equal, results[0], later))


def test_dtype_may_change_between_tasks():
    outcomes = []
    for use in (None, False):
        net, optimizer = build(use)
        with torchopt.inner_loop(net, optimizer) as inner:
            inner.step(loss_of(net, 0))
            inner.step(loss_of(net, 1))
        net.float()
        with torchopt.inner_loop(net, optimizer) as inner:
            for step in range(3):
                inner.step(loss_of(net, step))
            outcomes.append([p.detach() for p in net.parameters()])
    for fast, slow in zip(*outcomes):
        assert fast.dtype == torch.float32
        torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-6)


def test_a_gradient_may_be_missing_at_one_step():
    outcomes = []
    for use in (None, False):
        net, optimizer = build(use)
        for step in range(5):
            if step == 2:
                optimizer.step(net.head(nonzero(5, 4)).square().mean())
            else:
                optimizer.step(loss_of(net, step))
            torch.manual_seed(1)
        outcomes.append([*net.parameters()])
    for fast, slow in zip(*outcomes):
        torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-14)


def test_copies_go_their_own_ways():
    net, optimizer = build(None)
    for step in range(3):
        optimizer.step(loss_of(net, step))
    copied = copy.deepcopy(optimizer)
    other = copied.param_groups[0]["params"]
    optimizer.step(loss_of(net, 3))
    before = [p.detach().clone() for p in net.parameters()]
    copied.step(loss_of(other, 3))
    copied.step(loss_of(other, 4))
    assert all(map(torch.equal, before, net.parameters()))
    optimizer.step(loss_of(net, 4))
    assert all(map(torch.equal, other.parameters(), net.parameters()))


def test_steps_of_another_dtype_are_repeated_too(repeats):
    net, optimizer = build(None)
    for dtype in (torch.float64, torch.float32):
        net.to(dtype)
        with torchopt.inner_loop(net, optimizer) as inner:
            for step in range(4):
                inner.step(loss_of(net, step))
        assert repeats[-1] is True
        assert repeats[-2] is True
