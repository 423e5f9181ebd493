"""Modules with a mind of their own: tied, recurrent, parametrized, with buffers."""

import pytest
import torch
from adapting import mlp
from torch import nn


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(3, 3)
        self.decode = nn.Linear(3, 3)
        self.decode.weight = self.encode.weight
        self.again = self.encode
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.again(torch.tanh(self.decode(torch.tanh(self.encode(x))))))


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.heads = nn.ModuleDict({"a": nn.Linear(4, 2), "b": nn.Linear(4, 2)})

    def forward(self, x, head):
        return self.heads[head](torch.tanh(self.body(x)))


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.rnn = kind(3, 4, batch_first=True, **options)
        width = options.get("proj_size", 0) or 4
        self.head = nn.Linear(width * (2 if options.get("bidirectional") else 1), 2)

    def forward(self, x):
        return self.head(self.rnn(x.unsqueeze(1).expand(-1, 3, -1))[0][:, -1])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attend = nn.MultiheadAttention(3, 1, batch_first=True)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        x = x.unsqueeze(0)
        return self.head(self.attend(x, x, x, need_weights=True)[0][0])


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ParameterList([torch.randn(3, 3), torch.randn(3, 2)])
        self.shifts = nn.ParameterDict({"first": torch.randn(3), "last": torch.randn(2)})

    def forward(self, x):
        x = torch.tanh(x @ self.layers[0] + self.shifts["first"])
        return x @ self.layers[1] + self.shifts["last"]


class UnitRows(nn.Module):
    """Weight normalisation in plain operations.

    That of ``torch.nn.utils.parametrizations`` has a wrong second derivative in torch 2.13 (it
    takes the norm as a constant; ``gradgradcheck`` of ``torch._weight_norm`` fails).
    """

    def forward(self, direction, scale):
        return scale * direction / direction.square().sum(1, keepdim=True).sqrt()

    def right_inverse(self, weight):
        return weight, weight.square().sum(1, keepdim=True).sqrt()


def normalised():
    net = mlp()
    nn.utils.parametrize.register_parametrization(net[0], "weight", UnitRows())
    return net


MODULES = {
    "lstm": lambda: Recurrent(nn.LSTM),
    "lstm_two_layers_both_ways": lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True),
    "lstm_projected": lambda: Recurrent(nn.LSTM, proj_size=2),
    "gru": lambda: Recurrent(nn.GRU),
    "rnn": lambda: Recurrent(nn.RNN),
    "attention": Attention,
    "weight_norm": lambda: nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)
    ),
    "spectral_norm": lambda: nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)
    ),
    "parametrization": normalised,
    "parameter_list_and_dict": Listed,
    "layer_norm": lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)),
    "batch_norm": lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)),
}


every_module = pytest.mark.parametrize("kind", MODULES)
