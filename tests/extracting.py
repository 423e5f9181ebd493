"""A network with everything that a state has to hold, for the tests of states at hand."""

import pytest
import torch
from adapting import batch, mse
from torch import nn
from torch.utils import _pytree

import torchopt


class Net(nn.Module):
    """Tied weights, a frozen bias, BatchNorm buffers, a buffer that is ``None``."""

    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(3, 3)
        self.decode = nn.Linear(3, 3)
        self.decode.weight = self.encode.weight
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 2)
        self.head.bias.requires_grad_(False)
        self.register_buffer("nothing", None)

    def forward(self, x):
        x = torch.tanh(self.decode(torch.tanh(self.encode(x))))
        return self.head(self.norm(x))


def adapted(recipe=torchopt.MetaAdam):
    """Return a network after two steps, its optimizer and its initial parameters."""
    net = Net()
    start = list(net.parameters())
    optimizer = recipe(net, lr=0.1)
    data = batch()
    for _ in range(2):
        optimizer.step(mse(net, data))
    return net, optimizer, start


def leaves_of(state):
    return [t for t in _pytree.tree_leaves(state) if isinstance(t, torch.Tensor)]


SPELLINGS = {
    "reference": ["reference", "ref"],
    "copy": ["copy", "clone"],
    "deepcopy": ["deepcopy", "deepclone"],
}


every_spelling = pytest.mark.parametrize(
    ("by", "spelling"), [(by, s) for by, all_ in SPELLINGS.items() for s in all_]
)


every_way = pytest.mark.parametrize("by", SPELLINGS)


def assert_same_tree(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert a.requires_grad == b.requires_grad
        assert torch.equal(a, b)
    elif isinstance(a, torchopt.OptState):
        assert a.step == b.step
        assert_same_tree(a.slots, b.slots)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_tree(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same_tree(x, y)
    else:
        assert a == b
