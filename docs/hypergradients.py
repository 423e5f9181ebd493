"""Hypergradients of a small transformer: ``python docs/hypergradients.py`` prints the table.

A causal transformer learns to continue a text that a small grammar makes; a part of the examples
has been shuffled. The hypergradient is that of the loss on clean examples by a weight for each
training example and by the logarithm of the weight decay. Every method is compared with the
solution of the linear system to a relative residual of 1e-5, at the same weights, which 1,000
steps of Adam have found.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import torchopt
from torchopt.diff import SAMA, T1T2, FiniteDifference, Implicit, Neumann, hypergradient
from torchopt.linear_solve import solve_cg, solve_minres, solve_nystrom


WORDS = ["the", "old", "cat", "dog", "sees", "hears", "a", "bird", "and", "sleeps"]
CONTEXT, WIDTH, HEADS, LAYERS, STEPS = 16, 16, 2, 2, 1000


class Block(nn.Module):
    """Attention and two linear layers, in operations that have second derivatives."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Return the next layer."""
        batch, length, _ = x.shape
        parts = self.qkv(self.first(x)).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        q, k, v = parts
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        mask = torch.ones(length, length, dtype=torch.bool).triu(1)
        mixed = (scores.masked_fill(mask, -math.inf).softmax(-1) @ v).transpose(1, 2)
        x = x + self.out(mixed.reshape(batch, length, WIDTH))
        return x + self.down(nn.functional.gelu(self.up(self.second(x))))


class Transformer(nn.Module):
    """Predicts the next letter."""

    def __init__(self, letters: int) -> None:
        super().__init__()
        self.letters, self.places = nn.Embedding(letters, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, letters)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of shape ``(batch, length, letters)``."""
        h = self.letters(x) + self.places(torch.arange(x.shape[1]))
        return self.head(self.norm(self.blocks(h)))


def texts(count: int, shuffled: int, seed: int) -> tuple[Tensor, int]:
    """Return texts as numbers, some with their letters in disorder."""
    g = torch.Generator().manual_seed(seed)
    letters = sorted({c for word in WORDS for c in word} | {" "})
    rows = []
    for k in range(count):
        text = ""
        while len(text) <= CONTEXT:
            text += WORDS[int(torch.randint(len(WORDS), (), generator=g))] + " "
        row = torch.tensor([letters.index(c) for c in text[: CONTEXT + 1]])
        rows.append(row[torch.randperm(CONTEXT + 1, generator=g)] if k < shuffled else row)
    return torch.stack(rows), len(letters)


def problem() -> tuple[Any, Any, dict[str, Tensor], dict[str, Tensor], Any]:
    """Return outer and inner loss, trained weights, outer parameters, and Adam's state."""
    torch.manual_seed(0)
    train, letters = texts(24, 6, seed=1)
    clean, _ = texts(24, 0, seed=2)
    net = Transformer(letters).double()
    params = {name: p.detach() for name, p in net.named_parameters()}

    def losses(w: dict[str, Tensor], rows: Tensor) -> Tensor:
        logits = torch.func.functional_call(net, w, (rows[:, :-1],))
        return nn.functional.cross_entropy(logits.mT, rows[:, 1:], reduction="none").mean(1)

    def inner(w: dict[str, Tensor], h: dict[str, Tensor]) -> Tensor:
        decay = sum(p.square().sum() for p in w.values())
        return (h["weights"] * losses(w, train)).mean() + h["log_decay"].exp() * decay

    def outer(w: dict[str, Tensor], _: dict[str, Tensor]) -> Tensor:
        return losses(w, clean).mean()

    h = {"weights": torch.ones(24).double(), "log_decay": torch.tensor(math.log(2e-2)).double()}
    tx = torchopt.adam(torchopt.schedules.cosine_decay(1e-2, STEPS))
    w, state = params, tx.init(params)
    for _ in range(STEPS):
        grads = torch.func.grad(inner)(w, h)
        updates, state = tx.update(grads, state, w, inplace=False)
        w = torchopt.apply_updates(w, updates, inplace=False)
    return outer, inner, w, h, state


def measured(call: Callable[[], dict[str, Tensor]]) -> tuple[dict[str, Tensor], float]:
    """Return a result, and the processor's seconds that it took."""
    start = time.process_time()
    found = call()
    seconds = time.process_time() - start
    return found, seconds


def main() -> None:
    """Print the table."""
    outer, inner, w, h, state = problem()
    count = sum(p.numel() for p in w.values())
    grads = torch.func.grad(inner)(w, h)
    size = max(float(g.abs().max()) for g in grads.values())
    print(
        f"{count} weights, inner loss {inner(w, h):.3f}, largest entry of its gradient {size:.1e}\n"
    )
    methods = {
        "exact: `Implicit(solve=solve_minres(rtol=1e-5))`": Implicit(
            solve=solve_minres(rtol=1e-5, maxiter=1000)
        ),
        "`Implicit(solve=solve_cg(maxiter=100))`": Implicit(
            solve=solve_cg(maxiter=100, on_failure="ignore")
        ),
        "`Implicit(solve=solve_cg(maxiter=20))`": Implicit(
            solve=solve_cg(maxiter=20, on_failure="ignore")
        ),
        "`Implicit(solve=solve_nystrom(rank=20, rho=0.01))`": Implicit(
            solve=solve_nystrom(rank=20, rho=0.01, on_failure="ignore")
        ),
        "`Neumann(100)`": Neumann(100),
        "`Neumann(20)`": Neumann(20),
        "`T1T2()`": T1T2(),
        "`FiniteDifference()`": FiniteDifference(),
        "`SAMA(adam)`": SAMA(torchopt.adam(1e-3), state),
    }
    exact: dict[str, Tensor] = {}
    print("| method | weights: cosine | weights: error | weight decay: error | seconds |")
    print("| --- | --- | --- | --- | --- |")
    for name, method in methods.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found, seconds = measured(lambda m=method: hypergradient(outer, inner, w, h, m))
        exact = exact or found
        errors = {k: float((found[k] - x).norm() / x.norm()) for k, x in exact.items()}
        cosine = nn.functional.cosine_similarity(found["weights"], exact["weights"], 0)
        print(
            f"| {name} | {cosine:.3f} | {errors['weights']:.2g} | {errors['log_decay']:.2g} "
            f"| {seconds:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
