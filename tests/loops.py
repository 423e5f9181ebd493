"""Loops to differentiate, shared by the tests of ``torchopt.diff.unroll``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import torchopt
from torchopt.diff import Checkpointed, Forward, Mixed, grad_and_value, unroll


STEPS = 5

#: Adjoints that replay, and are exact.
REPLAYING = {
    "every 1": Checkpointed(),
    "every 2": Checkpointed(2),
    "sqrt": Checkpointed("sqrt"),
    "log": Checkpointed("log"),
    "revolve": Checkpointed("revolve"),
    "revolve 1": Checkpointed("revolve", slots=1),
    "cpu": Checkpointed("sqrt", store="cpu"),
    "graphs": Checkpointed("log", graphs=2),
    "segments": Checkpointed(3, graphs=3),
}
EXACT = {**REPLAYING, "forward": Forward(most=100), "mixed": Mixed()}


def inputs(seed: int = 0) -> dict[str, Tensor]:
    """Return what the meta-loss depends on: random, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        "w": draw(3),
        "exp_avg": draw(3) * 0.1,
        "log_lr": draw() - 1,  # makes a tensor that the step closes over, and is no leaf
        "decay": draw().abs(),  # closed over, and reaches only the inner loss
        "xs": draw(STEPS, 4, 3),
    }


def meta_loss(adjoint: Any, autograd: bool = False) -> Callable[..., Tensor]:
    """Return a function of :func:`inputs`: five steps of Adam, with a count and a ``None``."""
    tx = torchopt.adam(0.1)

    def function(w: Tensor, exp_avg: Tensor, log_lr: Tensor, decay: Tensor, xs: Tensor) -> Tensor:
        lr = log_lr.exp()

        def loss_fn(w: Tensor, x: Tensor) -> Tensor:
            return (x @ w).tanh().square().mean() + decay * w.square().sum()

        def step(carry: Any, x: Tensor) -> Any:
            w, state, count, nothing = carry
            if autograd:
                loss = loss_fn(w, x)
                (grads,) = torch.autograd.grad(loss, w, create_graph=True)
            else:
                grads, loss = grad_and_value(loss_fn)(w, x)
            updates, state = tx.update(grads, state, w, inplace=False)
            y = {"loss": loss, "count": count, "nothing": None}
            return (w + lr * updates, state, count + 1, nothing), y

        state = tx.init(w.detach())
        state.slots["exp_avg"] = exp_avg
        (w, state, count, nothing), ys = unroll(step, (w, state, 0, None), xs, adjoint=adjoint)
        assert count == STEPS
        assert nothing is None
        assert ys["nothing"] is None
        assert bool((ys["count"] == torch.arange(STEPS)).all())  # torch 2.6 has no tolist() here
        weights = torch.arange(1, STEPS + 1, dtype=torch.float64)
        return w.square().sum() + (w * state.exp_avg).sum() + (weights * ys["loss"]).sum()

    return function


def leaves(values: dict[str, Tensor]) -> list[Tensor]:
    """Return copies that require grad."""
    return [value.clone().requires_grad_() for value in values.values()]


def flat(tensors: Any) -> Tensor:
    """Return all entries of tensors in a row."""
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def gradient(function: Callable[..., Tensor], values: dict[str, Tensor]) -> Tensor:
    """Return the gradient of a function, flat."""
    by = leaves(values)
    return flat(torch.autograd.grad(function(*by), by))


def hessian_product(
    function: Callable[..., Tensor], values: dict[str, Tensor], v: Tensor
) -> Tensor:
    """Return the Hessian of a function times a flat vector."""
    by = leaves(values)
    grads = torch.autograd.grad(function(*by), by, create_graph=True)
    pieces = v.split([t.numel() for t in by])
    products = [(g * p.view_as(g)).sum() for g, p in zip(grads, pieces)]
    return flat(torch.autograd.grad(torch.stack(products).sum(), by))


def moved(values: dict[str, Tensor], v: Tensor, by: float) -> dict[str, Tensor]:
    """Return the inputs moved along a flat vector."""
    pieces = v.split([t.numel() for t in values.values()])
    return {name: t + by * p.view_as(t) for (name, t), p in zip(values.items(), pieces)}


def direction(values: dict[str, Tensor], seed: int = 1) -> Tensor:
    """Return a random flat vector as long as the inputs."""
    generator = torch.Generator().manual_seed(seed)
    number = sum(t.numel() for t in values.values())
    return torch.randn(number, generator=generator, dtype=torch.float64)
