"""Mistakes and what is to be said about them: what the tables of the tests of words share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchopt


LONGEST = 400
Entry = tuple[Callable[[], Any], type[Exception], tuple[str, ...]]


def net() -> nn.Module:
    """A network."""
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def loss(network: nn.Module) -> Tensor:
    """Its loss."""
    return network(torch.ones(2, 3)).square().mean()


def tree() -> dict[str, Tensor]:
    """Parameters."""
    return {"w": torch.ones(2, requires_grad=True), "b": torch.ones(1, requires_grad=True)}


def like_tree() -> dict[str, Tensor]:
    """Gradients of :func:`tree`."""
    return {"w": torch.ones(2), "b": torch.ones(1)}


def parameters() -> Any:
    """What is often given for a tree: a generator."""
    return net().parameters()


def using(network: Any, function: Callable[..., Any]) -> Callable[[], Any]:
    """Call a function with a fresh network, or with what is made of one."""
    return lambda: function(network())


TX = functools.partial(torchopt.adam, 0.1)


def enter(*args: Any) -> None:
    """Enter the block of an inner loop."""
    with torchopt.inner_loop(*args):
        pass


def check_words(entry: Entry) -> None:
    """Make a mistake, and look for the phrases in what is said about it."""
    call, error, phrases = entry
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) is error
    assert len(message) < LONGEST
    assert "\n" not in message
    assert " at 0x" not in message
    for phrase in phrases:
        assert phrase in message, message
