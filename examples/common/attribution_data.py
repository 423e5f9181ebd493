"""Two small problems to attribute to training data: digits, and the text of Python's manual."""

from __future__ import annotations

import math
import pydoc_data.topics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from common import EXTRA


Params = dict[str, Tensor]

WRONG_SHARE = 0.1  # of the digits, which get another label
LENGTH, WIDTH, HEADS = 24, 24, 2  # characters of a text, of the transformer


@dataclass(frozen=True)
class Problem:
    """Functions of a network's parameters.

    Attributes:
        losses: ``(params, index)``: the loss of each of these training examples.
        held_out_loss: ``(params)``: the mean loss of examples that are not trained on.
        marked: The examples that were made worse on purpose, true or false.
        texts: What the examples are, where that can be printed.
    """

    losses: Callable[[Params, Tensor], Tensor]
    held_out_loss: Callable[[Params], Tensor]
    marked: Tensor
    texts: tuple[str, ...] = ()


def make_problem(name: str, examples: int, seed: int) -> tuple[Problem, Params]:
    """Return a problem and the initial weights of its network, in double precision."""
    generator = torch.Generator().manual_seed(seed)
    return (digits if name == "digits" else text)(examples, generator)


def _weight(generator: torch.Generator, *shape: int, scale: float | None = None) -> Tensor:
    factor = shape[0] ** -0.5 if scale is None else scale
    return factor * torch.randn(shape, generator=generator, dtype=torch.float64)


# Digits ------------------------------------------------------------------------------------------


def digits(examples: int, generator: torch.Generator) -> tuple[Problem, Params]:
    """Return scikit-learn's digits, some of them with wrong labels, and a two-layer network.

    Raises:
        ImportError: If scikit-learn is not installed.
        ValueError: If there are not as many.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(f"The digits need scikit-learn: {EXTRA}") from error
    pixels, labels = datasets.load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=generator)
    if not 1 <= examples <= len(order) - 300:
        raise ValueError(f"There are {len(order)} digits, of which 300 are held out: {examples}?")
    x, y = torch.from_numpy(pixels)[order] / 16, torch.from_numpy(labels).long()[order]
    held_x, held_y, x, y = x[-300:], y[-300:], x[:examples], y[:examples]
    wrong = torch.rand(examples, generator=generator) < WRONG_SHARE
    y = torch.where(wrong, (y + 1 + torch.arange(examples) % 9) % 10, y)
    params = {
        "first": _weight(generator, 64, 24),
        "bias": torch.zeros(24, dtype=torch.float64),
        "last": _weight(generator, 24, 10),
    }

    def logits(params: Params, x: Tensor) -> Tensor:
        return (x @ params["first"] + params["bias"]).tanh() @ params["last"]

    def losses(params: Params, index: Tensor) -> Tensor:
        return F.cross_entropy(logits(params, x[index]), y[index], reduction="none")

    def held_out_loss(params: Params) -> Tensor:
        return F.cross_entropy(logits(params, held_x), held_y)

    return Problem(losses, held_out_loss, wrong), params


# Text --------------------------------------------------------------------------------------------


def text(examples: int, generator: torch.Generator) -> tuple[Problem, Params]:
    """Return pieces of the manual that comes with Python, and a small transformer.

    Raises:
        ValueError: If it does not have as many.
    """
    topics = pydoc_data.topics.topics
    whole = " ".join(" ".join(topics[name].split()) for name in sorted(topics)).lower()
    pieces = [whole[i : i + LENGTH + 1] for i in range(0, len(whole) - LENGTH, LENGTH + 1)]
    if not 1 <= examples <= len(pieces) - 100:
        raise ValueError(f"The manual has {len(pieces)} pieces, of which 100 are held out.")
    common = "abcdefghijklmnopqrstuvwxyz .,()_"
    codes = {c: k for k, c in enumerate(common)}
    chosen = [pieces[k] for k in torch.randperm(len(pieces), generator=generator)[: examples + 100]]
    tokens = torch.tensor([[codes.get(c, len(common)) for c in piece] for piece in chosen])
    held, tokens = tokens[-100:], tokens[:examples]
    params = transformer(len(common) + 1, generator)

    def losses_of(params: Params, tokens: Tensor) -> Tensor:
        logits = predicted(params, tokens[:, :-1])
        each = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        return each.mean(1)

    def losses(params: Params, index: Tensor) -> Tensor:
        return losses_of(params, tokens[index])

    def held_out_loss(params: Params) -> Tensor:
        return losses_of(params, held).mean()

    marked = torch.zeros(examples, dtype=torch.bool)
    return Problem(losses, held_out_loss, marked, tuple(chosen[:examples])), params


def transformer(vocabulary: int, generator: torch.Generator) -> Params:
    """Return the weights of one block of attention and one of two linear layers."""
    return {
        "embedding": _weight(generator, vocabulary, WIDTH, scale=0.3),
        "position": _weight(generator, LENGTH, WIDTH, scale=0.3),
        "attention": _weight(generator, WIDTH, 3 * WIDTH),
        "joined": _weight(generator, WIDTH, WIDTH),
        "up": _weight(generator, WIDTH, 2 * WIDTH),
        "down": _weight(generator, 2 * WIDTH, WIDTH),
        "head": _weight(generator, WIDTH, vocabulary),
    }


def predicted(params: Params, tokens: Tensor) -> Tensor:
    """Return the logits of the next characters: ``[texts, length, vocabulary]``.

    Attention is written out: the fused kernel has no second derivative.
    """
    x = params["embedding"][tokens] + params["position"][: tokens.shape[1]]
    count, length, _ = x.shape
    parts = (_normalised(x) @ params["attention"]).reshape(count, length, 3, HEADS, -1)
    q, k, v = parts.permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    joined = (scores.masked_fill(later, -1e9).softmax(-1) @ v).transpose(1, 2)
    x = x + joined.reshape(count, length, -1) @ params["joined"]
    x = x + F.gelu(_normalised(x) @ params["up"]) @ params["down"]
    return _normalised(x) @ params["head"]


def _normalised(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])
