"""A network and an optimizer that a refused call must leave as they are, objects and bits."""

import contextlib

import pytest
import torch
from adapting import batch, mse
from torch import nn

import torchopt


class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.body = nn.Linear(3, width)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 2)

    def forward(self, x):
        return self.head(self.norm(torch.tanh(self.body(x))))


def adapted(cls=torchopt.MetaAdam, steps=1, **options):
    """Return an evaluating network after some steps, and its optimizer."""
    net = Net()
    net(batch()[0])
    net.eval()
    optimizer = cls(net, **{"lr": 0.1, **options})
    for _ in range(steps):
        optimizer.step(mse(net, batch()))
    return net, optimizer


def _picture(net, optimizer):
    """Return every object of a network and an optimizer, with its bits."""
    tensors = [*net.named_parameters(remove_duplicate=False), *net.named_buffers()]
    for k, state in enumerate(optimizer.extract_state() if optimizer else ()):
        tensors += [(f"{k}.step", state.step)]
        for slot, column in state.slots.items():
            tensors += [(f"{k}.{slot}.{name}", value) for name, value in column.items()]
    for k, group in enumerate(optimizer.param_groups if optimizer else ()):
        tensors += [(f"group {k}.{name}", value) for name, value in group.items()]
    modules = [
        *net.modules(),
        *(g["params"] for g in (optimizer.param_groups if optimizer else ())),
    ]
    grads = [(f"{n}.grad", p.grad) for n, p in net.named_parameters() if p.is_leaf]
    return [*tensors, *enumerate(modules), *grads]


@contextlib.contextmanager
def nothing_changes(net, optimizer=None):
    """Assert that the block leaves a network and an optimizer as they are, objects and bits."""
    before = [
        (name, value, value.detach().clone() if isinstance(value, torch.Tensor) else None)
        for name, value in _picture(net, optimizer)
    ]
    training = [module.training for module in net.modules()]
    yield
    after = _picture(net, optimizer)
    assert [name for name, _ in after] == [name for name, _, _ in before]
    for (name, value), (_, original, bits) in zip(after, before):
        if isinstance(original, (torch.Tensor, nn.Module)):
            assert value is original, f"{name} is another object"
        else:
            assert value == original, f"{name} is {value!r} instead of {original!r}"
        if bits is not None:
            assert torch.equal(value, bits), f"{name} has other bits"
    assert [module.training for module in net.modules()] == training


@contextlib.contextmanager
def refused(error, message, net, optimizer=None):
    """Assert that the block raises and changes nothing, and that the optimizer still works."""
    with nothing_changes(net, optimizer), pytest.raises(error, match=message):
        yield
    if optimizer is not None and any(p.requires_grad for p in net.parameters()):
        old = [p for p in net.parameters() if p.requires_grad]
        optimizer.step(mse(net, batch()))
        new = [p for p in net.parameters() if p.requires_grad]
        assert all(p is not q for p, q in zip(new, old))
        assert all(p.isfinite().all() for p in new)
