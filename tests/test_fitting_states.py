"""A state just taken from an optimizer fits it; what has no state to take is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import kind, rows
from tolerances import assert_close
from torch import nn

import torchopt


MASKED = torchopt.chain(
    torchopt.masked(torchopt.scale_by_adam(), {"0": True, "1": False}), torchopt.scale(-0.1)
)
EVERY = pytest.mark.parametrize(
    "make_tx",
    [
        *(
            pytest.param(row.values[0].tx, id=row.id, marks=row.marks)
            for row in rows(lambda case: case.meta, each=kind)
        ),
        pytest.param(lambda: MASKED, id="masked"),
    ],
)


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)).double()


def loss_of(net):
    return net(torch.tensor([[0.3, -0.7], [1.1, 0.4]]).double()).square().sum()


def cut(net):
    torchopt.stop_gradient(net)


def load(net, optimizer):
    optimizer.load_state_dict(optimizer.state_dict())


def in_a_loop(net, optimizer):
    with torchopt.inner_loop(net, optimizer) as inner:
        inner.step(loss_of(net))


def deep(net, optimizer):
    cut(net)
    return copy.deepcopy(optimizer)


USES = {
    "stop_gradient": lambda n, o: torchopt.stop_gradient(o),
    "recover": lambda n, o: torchopt.recover_state_dict(o, torchopt.extract_state_dict(o)),
    "recover-copy": lambda n, o: torchopt.recover_state_dict(
        o, torchopt.extract_state_dict(o, by="deepcopy")
    ),
    "load_state_dict": load,
    "inner_loop": in_a_loop,
    "module_clone": lambda n, o: torchopt.module_clone(o),
    "deepcopy": deep,
}


def late(make_tx, steps_frozen):
    """Return a network after steps with a frozen weight, which is trainable again."""
    net = make()
    optimizer = torchopt.MetaOptimizer(net, make_tx())
    net[0].weight.requires_grad_(False)
    for _ in range(steps_frozen):
        optimizer.step(loss_of(net))
        cut(net)
    net[0].weight.requires_grad_(True)
    return net, optimizer


@pytest.mark.sampled(2)
@EVERY
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("steps", [0, 2], ids=["fresh", "unfrozen"])
def test_its_own_state_fits_and_changes_nothing(make_tx, use, steps):
    net, optimizer = late(make_tx, steps)
    expected_net, expected = late(make_tx, steps)
    result = USES[use](net, optimizer)
    if isinstance(result, torchopt.MetaOptimizer):
        optimizer, net = result, result.param_groups[0]["params"]
    for module, one in ((net, optimizer), (expected_net, expected)):
        for _ in range(2):
            one.step(loss_of(module))
    assert_close(dict(net.named_parameters()), dict(expected_net.named_parameters()))
    (state,), (wanted,) = optimizer.extract_state(), expected.extract_state()
    assert counts(state, net) == counts(wanted, net)


def counts(state, net):
    """Return how often each parameter has been updated, as a number."""
    steps = state.step
    if not isinstance(steps, dict):
        steps = dict.fromkeys([n for n, _ in net.named_parameters()], steps)
    return {name: int(count) for name, count in steps.items()}


@EVERY
def test_a_state_from_when_it_was_frozen_fits_later(make_tx):
    net = make()
    optimizer = torchopt.MetaOptimizer(net, make_tx())
    net[0].weight.requires_grad_(False)
    optimizer.step(loss_of(net))
    cut(net)
    state, weights = torchopt.extract_state_dict(optimizer), torchopt.extract_state_dict(net)
    saved = optimizer.state_dict()
    net[0].weight.requires_grad_(True)
    optimizer.step(loss_of(net))
    after = [p.detach() for p in net.parameters()]
    torchopt.recover_state_dict(net, weights)
    torchopt.recover_state_dict(optimizer, state)
    optimizer.step(loss_of(net))
    assert_close([p.detach() for p in net.parameters()], after)
    fresh = make()
    torchopt.recover_state_dict(fresh, weights)
    again = torchopt.MetaOptimizer(fresh, make_tx())
    again.load_state_dict(saved)
    again.step(loss_of(fresh))
    assert_close([p.detach() for p in fresh.parameters()], after)


def test_a_parameter_that_came_later_has_no_state_yet():
    net = make()
    optimizer = torchopt.MetaAdam(net, lr=0.1)
    optimizer.step(loss_of(net))
    net[1].extra = nn.Parameter(torch.ones(1).double())
    torchopt.stop_gradient(optimizer)
    load(net, optimizer)
    assert counts(optimizer.extract_state()[0], net)["1.extra"] == 0
    del net[1].extra
    torchopt.stop_gradient(optimizer)


def test_the_state_of_a_smaller_network_is_still_refused():
    net, small = make(), make()
    small[1].bias = None
    optimizer, other = torchopt.MetaAdam(net), torchopt.MetaAdam(small)
    for one, module in ((optimizer, net), (other, small)):
        one.step(loss_of(module))
    with pytest.raises(ValueError, match=r"'1\.bias' is missing"):
        torchopt.recover_state_dict(optimizer, torchopt.extract_state_dict(other))
    with pytest.raises(ValueError, match=r"'1\.bias' is missing"):
        optimizer.load_state_dict(other.state_dict())


# What has no state to take --------------------------------------------------------------------

FUNCTIONS = {
    "extract_state_dict": torchopt.extract_state_dict,
    "recover_state_dict": lambda target: torchopt.recover_state_dict(target, target),
    "stop_gradient": torchopt.stop_gradient,
    "module_clone": torchopt.module_clone,
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("cls", [torchopt.Adam, torch.optim.SGD])
def test_optimizers_that_change_parameters_in_place_are_refused(function, cls):
    net = make()
    optimizer = cls(net.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=rf"{function} takes .* {cls.__name__}.*state_dict\(\)"):
        FUNCTIONS[function](optimizer)
    with pytest.raises(TypeError, match=f"{function} .* {cls.__name__} at 'b'"):
        FUNCTIONS[function]({"a": torch.ones(1), "b": optimizer})


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_holds_no_tensors_is_refused(function):
    net = make()
    targets = (net.parameters(), "net", [net], torchopt.FuncOptimizer(torchopt.sgd(0.1)))
    for target in targets:
        with pytest.raises(TypeError, match=f"{function} takes"):
            FUNCTIONS[function](target)
    for nothing in ({}, [], None):
        FUNCTIONS[function](nothing)
