"""What a function uses without being given it, and the function around other tensors."""

from __future__ import annotations

import functools
from collections import OrderedDict, namedtuple
from typing import Any

import torch
from conftest import nonzero
from torch import Tensor, nn

from torchopt.base.captured import Captured, leaves_of, stray_leaf


GLOBAL = nonzero(3)


def use_global(x: Tensor) -> Tensor:
    return GLOBAL * x


class Held:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def method(self, x: Tensor) -> Tensor:
        return self.tensor * x

    def __call__(self, x: Tensor) -> Tensor:
        return self.tensor * x


Pair = namedtuple("Pair", "first second")


def functions(t: Tensor, net: nn.Module) -> dict[str, Any]:
    def recursive(x: Tensor, k: int = 2) -> Tensor:
        return t * x if k == 0 else recursive(x, k - 1)

    def defaults(x: Tensor, y: Any = (t,), *, z: Any = {"k": [t]}) -> Tensor:  # noqa: B006
        return x * y[0] + z["k"][0]

    pair, ordered = Pair(t, None), OrderedDict(a=t)
    return {
        "cell": lambda x: t * x,
        "nested": lambda x: (lambda: t * x)(),
        "global": use_global,
        "through": lambda x: use_global(x),
        "recursive": recursive,
        "defaults": defaults,
        "partial": functools.partial(torch.mul, other=t),
        "positions": functools.partial(torch.add, t),
        "method": Held(t).method,
        "object": Held(t),
        "module": net,
        "loss": lambda x: net(x).sum(),
        "containers": lambda x: x * pair.first + ordered["a"],
        "func": torch.func.grad(lambda x: (t * x.square()).sum()),
    }


def test_tensors_are_found_and_exchanged_everywhere() -> None:
    """The function with zeros (or other tensors) is the one that is written with them."""
    t, net, x = nonzero(3), nn.Linear(3, 2, dtype=torch.float64), nonzero(3)
    other, other_net = nonzero(3), nn.Linear(3, 2, dtype=torch.float64)
    exchange = {id(t): other, id(GLOBAL): other}
    for p, q in zip(net.parameters(), other_net.parameters()):
        exchange[id(p)] = q
    wanted = functions(other, other_net)
    for name, function in functions(t, net).items():
        before = function(x)
        captured = Captured(function)
        assert captured.values, name
        rebuilt = captured.with_values([exchange[id(v)] for v in captured.values])
        expected = other * x if name in ("global", "through") else wanted[name](x)
        assert torch.equal(rebuilt(x), expected), name
        assert torch.equal(function(x), before), name  # nothing has changed
    assert GLOBAL is globals()["GLOBAL"]


def test_a_tensor_counts_once_and_what_is_shared_stays_shared() -> None:
    t = nonzero(3)
    held = Held(t)
    captured = Captured((lambda x: held.tensor + t * x, held.method, [t]))
    assert len(captured.values) == 1
    first, second, (third,) = captured.with_values([torch.ones(3)])
    assert third is second.__self__.tensor
    assert torch.equal(first(third), 2 * torch.ones(3))
    assert not Captured(lambda x: x + 1).values


def test_leaves_that_are_not_known() -> None:
    a, b = nonzero(3, requires_grad=True), nonzero(3, requires_grad=True)
    y = (a * 2 * b).sum()
    assert [x is b for x in leaves_of(y, [a])] == [True]
    assert stray_leaf(y, [a]) is b
    assert stray_leaf(y, [a, b]) is None
    assert stray_leaf(a.detach(), []) is None
    assert stray_leaf(a, []) is a
