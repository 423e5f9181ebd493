"""Networks whose parameters are differentiated by values."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import nonzero
from tolerances import assert_close
from torch import Tensor, nn

import torchopt
from torchopt.diff.zero_order import zero_order
from torchopt.nn import ZeroOrderGradientModule


class Net(ZeroOrderGradientModule, method="antithetic", num_samples=5, sigma=0.3):
    """As it was written for 0.7.3."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 2).double(), nn.Linear(2, 1).double()
        self.generator = torch.Generator().manual_seed(seed)

    def forward(self, x: Tensor, power: int = 2) -> Tensor:
        return (self.second(self.first(x).tanh()) ** power).mean()

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        return torch.randn(sample_shape, generator=self.generator)


def plain(net: Any, params: Any, x: Tensor, power: int = 2) -> Tensor:
    hidden = (x @ params["first.weight"].T + params["first.bias"]).tanh()
    out = hidden @ params["second.weight"].T + params["second.bias"]
    return (out**power).mean()


def test_it_does_what_the_decorator_does() -> None:
    net, x = Net(), nonzero(4, 3, requires_grad=True)
    params = dict(net.named_parameters())
    value = net(x, power=4)
    assert_close(value, plain(net, params, x, 4))
    value.backward()
    (by_input,) = torch.autograd.grad(plain(net, params, x, 4), x)
    assert_close(x.grad, by_input)

    order = ["first.weight", "first.bias", "second.weight", "second.bias"]
    generator = torch.Generator().manual_seed(0)
    list_of = [params[name].detach().requires_grad_() for name in order]
    by_list = zero_order(
        lambda shape: torch.randn(shape, generator=generator), "antithetic", 0, 5, 0.3
    )(lambda given: plain(net, dict(zip(order, given)), x.detach(), 4))
    by_list(list_of).backward()
    for name, leaf in zip(order, list_of):
        assert_close(params[name].grad, leaf.grad, what=name)


def test_only_what_is_trained_is_perturbed() -> None:
    net, x = Net(), nonzero(4, 3)
    net.first.requires_grad_(False)
    net(x).backward()
    assert net.first.weight.grad is None
    assert net.second.weight.grad.abs().sum() > 0
    drawn = net.generator.get_state()
    net.requires_grad_(False)
    assert_close(net(x), plain(net, dict(net.named_parameters()), x))
    with torch.no_grad():
        net.requires_grad_(True)(x)
    assert torch.equal(net.generator.get_state(), drawn)


def test_it_trains_where_there_is_no_gradient() -> None:
    class Mistakes(ZeroOrderGradientModule, method="forward", num_samples=100, sigma=0.5):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 1)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return ((self.linear(x).squeeze(-1) > 0) != y).float().mean()

    x = torch.randn(64, 2)
    net, y = Mistakes(), x[:, 0] > x[:, 1]
    optimizer = torchopt.Adam(net.parameters(), lr=0.1)
    before = net(x, y).item()
    for _ in range(40):
        optimizer.zero_grad()
        net(x, y).backward()
        optimizer.step()
    assert net(x, y).item() < min(0.15, before)


def test_in_an_inner_loop() -> None:
    """The step is by the estimate, and what comes after it is differentiated through the step."""
    net, x = Net(), nonzero(4, 3)
    start = dict(net.named_parameters())
    twin = Net()
    twin.load_state_dict(net.state_dict())
    twin(x).backward()
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    with torchopt.inner_loop(net, torchopt.sgd(lr)) as inner:
        inner.step(net(x))
        for (name, w), p in zip(net.named_parameters(), twin.parameters()):
            assert_close(w, start[name] - 0.1 * p.grad, what=name)
        loss = net.second.weight.sum()
        (slope,) = torch.autograd.grad(loss, lr)
    assert_close(slope, -twin.second.weight.grad.sum())


def test_through_torch_func() -> None:
    net, x = Net(), nonzero(4, 3)
    params = dict(net.named_parameters())
    grads = torch.func.grad(lambda p: torch.func.functional_call(net, p, (x,)))(params)
    net.generator.manual_seed(0)
    net(x).backward()
    for name, p in params.items():
        assert_close(grads[name], p.grad, what=name)


def test_tied_weights_are_one_parameter() -> None:
    class Tied(Net):
        def __init__(self) -> None:
            super().__init__()
            self.third = nn.Linear(2, 1, bias=False).double()
            self.third.weight = self.second.weight

        def forward(self, x: Tensor, power: int = 2) -> Tensor:
            hidden = self.first(x)
            return (self.second(hidden) - self.third(hidden) - self.second.bias).square().sum()

    net = Tied()
    net(nonzero(4, 3)).backward()
    assert net.first.weight.grad.abs().max() < 1e-12  # they are perturbed alike
    assert net.third.weight.grad is net.second.weight.grad


def test_a_subclass_has_the_arguments_of_its_base() -> None:
    class More(Net, num_samples=50):
        def forward(self, x: Tensor, power: int = 2) -> Tensor:
            return super().forward(x, power) + 1

    class Same(Net):
        pass

    x = nonzero(4, 3)
    for kind, samples in ((More, 50), (Same, 5)):
        net, asked = kind(), []
        net.sample = lambda shape, asked=asked: asked.append(shape) or torch.randn(shape)
        value = net(x)
        value.backward()
        exact = plain(net, dict(net.named_parameters()), x)
        assert_close(value, exact + (kind is More))
        assert len(asked) == samples * 4  # for each of four parameters; once, not in super() again
    assert type(copy.deepcopy(Same())) is Same


def test_bad_classes_and_calls() -> None:
    with pytest.raises(ValueError, match="method must be one of"):
        type("Bad", (ZeroOrderGradientModule,), {}, method="central")
    with pytest.raises(TypeError, match=r"has no argument 'samples'; it has .*'num_samples'"):
        type("Bad", (ZeroOrderGradientModule,), {}, samples=3)
    for wrap in (staticmethod, classmethod):
        with pytest.raises(TypeError, match=r"Bad.forward must be a method"):
            type("Bad", (ZeroOrderGradientModule,), {"forward": wrap(lambda x: x)})
    with pytest.raises(RuntimeError, match="Empty has no parameters"):
        type("Empty", (ZeroOrderGradientModule,), {"forward": lambda self: torch.ones(())})()()
    with pytest.raises(NotImplementedError, match="Blank must define forward"):
        type("Blank", (ZeroOrderGradientModule,), {})()()
    vector = type("Vector", (Net,), {"forward": lambda self, x: self.first(x)})
    with pytest.raises(ValueError, match=r"Vector.forward must return a scalar, got shape \(4, 2"):
        vector()(nonzero(4, 3))
