"""Exceptions in the middle of an update of the differentiable face: nothing has changed."""

import pytest
import torch
from adapting import batch, mse
from torch import nn
from unchanged import Net, adapted, nothing_changes, refused

import torchopt


pytestmark = pytest.mark.usefixtures("float64_by_default")


class BoomError(Exception):
    """What the users' own code raises below."""


@torchopt.transformation
class _FailsAt(torchopt.ElementwiseTransformation):
    """Raises at the second parameter of the second update, after others have been updated."""

    slots = ("seen",)
    uses_step = True

    def rule(self, g, p, t, slots):
        if t == 2 and g.shape == (4,):
            raise BoomError("in a rule")
        return g, (slots[0] + g,)


def _failing_schedule(count):
    if count == 1:
        raise BoomError("in a schedule")
    return 0.1


class _Masks:
    """A mask that fails at a later call."""

    def __init__(self, good):
        self.good = good

    def __call__(self, params):
        self.good -= 1
        if self.good < 0:
            raise BoomError("in a mask")
        return dict.fromkeys(params, True)


FAILING = {
    "rule": lambda: torchopt.chain(torchopt.scale_by_adam(), _FailsAt(), torchopt.scale(-0.1)),
    "schedule": lambda: torchopt.adam(_failing_schedule),
    "mask": lambda: torchopt.chain(
        torchopt.trace(0.9), torchopt.masked(torchopt.scale(0.5), _Masks(2))
    ),
}


@pytest.mark.parametrize("kind", FAILING)
def test_an_exception_in_the_middle_of_an_update(kind):
    net = Net().eval()
    optimizer = torchopt.MetaOptimizer(net, FAILING[kind]())
    optimizer.step(mse(net, batch()))
    loss = mse(net, batch())
    with nothing_changes(net, optimizer), pytest.raises(BoomError):
        optimizer.step(loss)


def test_a_norm_that_is_not_finite():
    net = Net().eval()
    tx = torchopt.chain(torchopt.clip_grad_norm(1.0, error_if_nonfinite=True), torchopt.adam(0.1))
    optimizer = torchopt.MetaOptimizer(net, tx)
    optimizer.step(mse(net, batch()))
    with refused(RuntimeError, "not finite", net, optimizer):
        optimizer.step(mse(net, batch()) * torch.inf)


def test_a_rule_that_returns_another_shape():
    @torchopt.transformation
    class Sums(torchopt.ElementwiseTransformation):
        def rule(self, g, p, t, slots):
            return g.sum(0, keepdim=True).expand(2, *g.shape), slots

    net = Net().eval()
    optimizer = torchopt.MetaOptimizer(net, Sums())
    loss = mse(net, batch())
    with nothing_changes(net, optimizer), pytest.raises((ValueError, RuntimeError), match="shape"):
        optimizer.step(loss)


def test_a_rule_that_returns_nothing():
    @torchopt.transformation
    class Forgets(torchopt.ElementwiseTransformation):
        def rule(self, g, p, t, slots):
            return None, slots

    net = Net().eval()
    optimizer = torchopt.MetaOptimizer(net, Forgets())
    loss = mse(net, batch())
    with nothing_changes(net, optimizer), pytest.raises((TypeError, ValueError), match="Forgets"):
        optimizer.step(loss)


def test_a_tensor_hook_that_raises():
    net, optimizer = adapted()

    def hook(grad):
        raise BoomError("in a hook")

    loss = mse(net, batch())
    loss.register_hook(hook)
    with refused(BoomError, "in a hook", net, optimizer):
        optimizer.step(loss)


def test_a_backward_hook_of_a_module_that_raises():
    net, optimizer = adapted()

    def hook(module, grad_input, grad_output):
        raise BoomError("in a hook")

    handle = net.head.register_full_backward_hook(hook)
    loss = mse(net, batch())
    with nothing_changes(net, optimizer), pytest.raises(BoomError):
        optimizer.step(loss)
    handle.remove()
    optimizer.step(mse(net, batch()))
    assert torchopt.extract_state_dict(optimizer)[0].step == 2


def test_an_exception_in_the_second_group_leaves_the_first():
    first, second = Net().eval(), nn.Linear(2, 2)
    calls = []

    def schedule(count):
        calls.append(count)
        if count == 1:
            raise BoomError
        return 0.1

    optimizer = torchopt.MetaOptimizer([first, {"params": second, "lr": schedule}], torchopt.adam())
    optimizer.step(second(first(batch()[0])).square().mean())
    loss = second(first(batch()[0])).square().mean()
    with (
        nothing_changes(second, optimizer),
        nothing_changes(first, optimizer),
        pytest.raises(BoomError),
    ):
        optimizer.step(loss)
    assert calls[-1] == 1
